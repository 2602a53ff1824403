"""What is launched before the first request has everything that a batch can ask for, by what Triton compiles apart.

The keys are those of Triton's own launcher, which needs no GPU for them.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: its layers' tables can't be made")
pytest.importorskip("triton", reason="Triton is not installed: what it compiles apart can't be asked")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from vllm_loraserve.engine.paged_layers import SlotTables
from vllm_loraserve.kernels import triton_expand, triton_shrink
from vllm_loraserve.kernels.lora_linear import lora_linear
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.paged import PagedLinear
from vllm_loraserve.kernels.tuning import DeviceShape
from vllm_loraserve.kernels.warm_up import distinct, warm_up

pytestmark = pytest.mark.vllm

RANKS = (16, 8, 64, 200, 33, 128, 17, 1)
LLAMA = [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))]
ODD = [(1000, (200, 72)), (64, (32,))]


class Recorder:
    """In place of a kernel: notes what each launch would be compiled for on an sm_90."""

    def __init__(self, kernel):
        self.seen, self.launches = set(), 0
        self.binder = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
        )

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        _, specialised, options = self.binder(*args, **options, debug=False)
        self.seen.add((str(specialised), str(sorted(options.items()))))
        self.launches += 1


@pytest.fixture
def kernels(monkeypatch):
    """The recorders of shrink and expand. A device of 132 SMs, so that K is split as on a GPU."""
    shrink, expand = Recorder(triton_shrink.shrink_kernel), Recorder(triton_expand.expand_kernel)
    monkeypatch.setattr(triton_shrink, "shrink_kernel", shrink)
    monkeypatch.setattr(triton_expand, "expand_kernel", expand)
    for module in ("lora_linear", "warm_up"):
        monkeypatch.setattr(f"vllm_loraserve.kernels.{module}.device_shape", lambda device: DeviceShape())
    return shrink, expand


def model(shapes, slots):
    """Two decoder layers of these linears, with the tables that an engine has for so many slots."""
    slices = [size for _, out_sizes in shapes * 2 for size in out_sizes]
    layout = SimpleLayout(slices)
    tables = SlotTables(layout, slots, 256, torch.device("cpu"))
    for slot in range(slots):
        tables.ranks[:, slot] = RANKS[slot % len(RANKS)]
    linears, at = [], 0
    for in_size, out_sizes in shapes * 2:
        offsets = np.cumsum([0] + [8 * size for out in out_sizes for size in (in_size, out)]).tolist()
        linears.append(
            PagedLinear(
                arena=torch.zeros(offsets[-1], dtype=torch.bfloat16),
                page_table=tables.page_tables[0],
                ranks=tables.ranks[at : at + len(out_sizes)],
                page_stride=offsets[-1],
                page_rows=8,
                a_offsets=tuple(offsets[:-1:2]),
                b_offsets=tuple(offsets[1::2]),
                in_size=in_size,
                out_sizes=out_sizes,
                name=f"{len(linears)}",
            )
        )
        at += len(out_sizes)
    return linears


class SimpleLayout:
    """What `SlotTables` asks of a layout of one group."""

    page_rows, groups = 8, (None,)

    def __init__(self, slices):
        self.slice_index = dict(enumerate(slices))


def metadata_of(slots, batch_invariant=False):
    metadata = StepMetadata(slots=slots, max_rank=256, graph_tokens=512, device="cpu", batch_invariant=batch_invariant)
    for slot in range(slots):
        metadata.set_slot_rank(slot, RANKS[slot % len(RANKS)])
    return metadata


def batches(slots):
    """Steps of all sizes, one adapter or all, with base-model tokens between them or without."""
    rng = np.random.default_rng(0)
    for tokens in (1, 16, 64, 200, 512, 513, 600, 1000, 2048, 4096):
        for some in ([0], [min(2, slots - 1)], [slots - 1], list(range(slots))):
            for base in (0.0, 0.9):
                chosen = rng.choice(some, tokens).astype(np.int32)
                yield np.where(rng.random(tokens) < base, -1, chosen).astype(np.int32)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 8, 32])
@pytest.mark.parametrize(
    ("shapes", "options", "add_inputs"),
    [
        pytest.param(LLAMA, {}, True, id="llama"),
        pytest.param(LLAMA, {}, False, id="on two streams"),
        pytest.param(LLAMA, {"batch_invariant": True}, True, id="batch invariant"),
        pytest.param(ODD, {}, True, id="odd sizes"),
    ],
)
def test_no_batch_asks_for_what_was_not_launched(kernels, shapes, options, add_inputs, slots):
    linears, metadata = model(shapes, slots), metadata_of(slots, **options)
    launches = warm_up(linears, metadata, add_inputs=(True, add_inputs))
    before = [set(kernel.seen) for kernel in kernels]
    assert launches == sum(kernel.launches for kernel in kernels)
    for kernel in kernels:
        kernel.seen.clear()
    for token_slots in batches(slots):
        metadata.build(token_slots)
        for linear in linears:
            x = torch.empty(token_slots.size, linear.in_size, dtype=torch.bfloat16)
            y = torch.empty(token_slots.size, sum(linear.out_sizes), dtype=torch.bfloat16)
            lora_linear(y, x, linear, metadata, add_inputs=add_inputs)
    for kernel, warmed in zip(kernels, before, strict=True):
        assert kernel.seen
        assert kernel.seen <= warmed


@pytest.mark.parametrize("slots", [1, 3, 32])
def test_the_variants_are_few(kernels, slots):
    """Each takes the compiler about half a second."""
    warm_up(model(LLAMA, slots), metadata_of(slots))
    assert [len(kernel.seen) for kernel in kernels] == [12, 20]
    assert not [key for kernel in kernels for key in kernel.seen if "launch_pdl" in str(key)], (
        "AMD's backend refuses it"
    )


def test_layers_of_one_kind_are_launched_once():
    assert [linear.name for linear in distinct(model(LLAMA, 8))] == ["0", "1", "2", "3"]
    other = model(LLAMA, 8)[0]
    other.ranks = torch.zeros(other.ranks.numel() + 1, dtype=torch.int32)[1:].view(other.ranks.shape)
    assert len(list(distinct([model(LLAMA, 8)[0], other]))) == 2, "Triton compiles for an alignment"
