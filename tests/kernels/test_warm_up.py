"""What is launched before the first request has everything that a batch can ask for, by what Triton compiles apart."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be named")

from vllm_loraserve.kernels import triton_expand, triton_shrink
from vllm_loraserve.kernels.lora_linear import device_shape, lora_linear
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.synthetic import synthetic_linear
from vllm_loraserve.kernels.warm_up import distinct, launch_configs, warm_up

RANKS = (1, 8, 16, 17, 33, 64, 128, 200)
SHAPES = [(4096, (512, 128, 128)), (8192, (256,)), (1000, (200, 72)), (64, (32,))]


class Recorder:
    """In place of a kernel: notes what a launch would be compiled for, as Triton's launcher decides it."""

    def __init__(self, kernel):
        self.arg_names, self.plain = kernel.arg_names, set(kernel.do_not_specialize)
        self.seen, self.launches = set(), 0

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        key = [self.of(name, value) for name, value in zip(self.arg_names, args, strict=False)]
        self.seen.add((*key, *sorted(options.items())))
        self.launches += 1

    def of(self, name, value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        return "int" if name in self.plain else (value == 1, value % 16 == 0)


@pytest.fixture
def kernels(monkeypatch):
    """The recorders of shrink and expand. A device of 132 SMs, so that K is split as on a GPU."""
    shrink, expand = Recorder(triton_shrink.shrink_kernel), Recorder(triton_expand.expand_kernel)
    monkeypatch.setattr(triton_shrink, "shrink_kernel", shrink)
    monkeypatch.setattr(triton_expand, "expand_kernel", expand)
    shape = device_shape.__wrapped__(torch.device("cpu")).__class__()
    for module in ("lora_linear", "warm_up"):
        monkeypatch.setattr(f"vllm_loraserve.kernels.{module}.device_shape", lambda device: shape)
    return shrink, expand


def layer(in_size, out_sizes, name="layer"):
    ranks = [list(RANKS)] * len(out_sizes)
    return synthetic_linear(
        in_size=in_size, out_sizes=out_sizes, ranks=ranks, max_rank=256, dtype=torch.bfloat16, name=name
    )


def metadata_of(batch_invariant=False):
    metadata = StepMetadata(
        slots=len(RANKS), max_rank=256, graph_tokens=512, device="cpu", batch_invariant=batch_invariant
    )
    for slot, rank in enumerate(RANKS):
        metadata.set_slot_rank(slot, rank)
    return metadata


def batches():
    """Steps of all sizes, a few adapters or many, short prompts or long, base-model tokens between them."""
    rng = np.random.default_rng(0)
    for tokens in (1, 7, 16, 40, 64, 100, 200, 256, 512, 513, 600, 1000, 2048, 8192):
        for some in ([0], [1], [3], [7], [0, 1], [4, 5], [0, 2, 5, 6], list(range(8))):
            for base in (0.0, 0.5, 0.9, 0.99):
                slots = rng.choice(some, tokens).astype(np.int32)
                yield np.where(rng.random(tokens) < base, -1, slots).astype(np.int32)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("in_size", "out_sizes"), SHAPES)
def test_no_batch_asks_for_what_was_not_launched(kernels, in_size, out_sizes, batch_invariant):
    linear, metadata = layer(in_size, out_sizes), metadata_of(batch_invariant)
    launches = warm_up([linear], metadata)
    before = [set(kernel.seen) for kernel in kernels]
    assert launches == sum(kernel.launches for kernel in kernels)
    for token_slots in batches():
        metadata.build(token_slots)
        x = torch.empty(token_slots.size, in_size, dtype=torch.bfloat16)
        lora_linear(torch.empty(token_slots.size, sum(out_sizes), dtype=torch.bfloat16), x, linear, metadata)
    asked = [kernel.seen for kernel in kernels]
    assert asked == before
    if not batch_invariant and in_size == 8192:
        assert len(asked[1]) > 10, "many variants were asked for"


def test_the_variants_are_few(kernels):
    """Each takes the compiler about half a second."""
    layers = [layer(*shape, name=f"{shape}") for shape in [(4096, (64, 32, 32)), (4096, (64,)), (4096, (64, 64))]]
    warm_up(layers, metadata_of())
    shrink, expand = kernels
    assert len(shrink.seen) <= 12
    assert len(expand.seen) <= 20


def test_layers_of_one_kind_are_launched_once():
    layers = [layer(64, (32,), "a"), layer(64, (32,), "b"), layer(64, (48,), "c")]
    assert [linear.name for linear in distinct(layers)] == ["a", "c"]
    metadata = metadata_of()
    assert len(launch_configs(layers[0], metadata, device_shape(torch.device("cpu")))) == 8
