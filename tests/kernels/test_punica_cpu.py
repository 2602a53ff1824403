"""kernels/punica_cpu.py over vLLM's padded tensors, against a float64 reference."""

import pytest

pytest.importorskip("vllm")

import torch
from paged_layers import make_layer
from vllm.lora.layers import LoRAMapping

from vllm_loraserve.kernels import cpu_native
from vllm_loraserve.kernels.punica_cpu import PunicaWrapperCPU

pytestmark = pytest.mark.vllm

SLOTS, RANK, IN, OUT = 4, 16, 48, (40, 24, 24)
IDS: list[int | None] = [11, None, 13, 14]
TOKENS = [14, 0, 11, 14, 0, 13, 11, 14]


def wrapper(tokens: list[int], prompts: list[int]) -> PunicaWrapperCPU:
    made = PunicaWrapperCPU(64, 64, torch.device("cpu"))
    made.update_metadata(LoRAMapping(tuple(tokens), tuple(prompts), True), IDS, SLOTS + 1, 1000)
    return made


def weights(dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    a = tuple(torch.randn(SLOTS, 1, RANK, IN).to(dtype) for _ in OUT)
    b = tuple(torch.randn(SLOTS, 1, out, RANK).to(dtype) for out in OUT)
    for tensor in (*a, *b):
        tensor[1] = float("nan")  # an empty slot must never be read
    return a, b


def expected(
    y: torch.Tensor, x: torch.Tensor, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], ids: list[int]
) -> torch.Tensor:
    result = y.double().clone()
    for row, lora in enumerate(ids):
        if lora:
            slot, start = IDS.index(lora), 0
            for a_s, b_s in zip(a, b, strict=True):
                delta = x[row].double() @ a_s[slot, 0].double().T @ b_s[slot, 0].double().T
                result[row, start : start + len(delta)] += delta
                start += len(delta)
    return result


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [TOKENS, [0] * 5, [14] * 5, [14], [0]])
def test_linear(dtype: torch.dtype, tokens: list[int]) -> None:
    torch.manual_seed(0)
    a, b = weights(dtype)
    x, y = torch.randn(len(tokens), IN).to(dtype), torch.randn(len(tokens), sum(OUT)).to(dtype)
    before = y.clone()
    want = expected(y, x, a, b, tokens)
    wrapper(tokens, tokens).add_lora_linear(y, x, a, b, 1.0, OUT)
    assert (y.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    base = [row for row, lora in enumerate(tokens) if lora == 0]
    assert torch.equal(y[base], before[base])


def test_linear_without_inputs_leaves_base_rows() -> None:
    a, b = weights(torch.float32)
    x, y = torch.randn(len(TOKENS), IN), torch.zeros(len(TOKENS), sum(OUT))
    want = expected(y, x, a, b, TOKENS)
    y[:] = torch.where(torch.tensor(TOKENS)[:, None] == 0, 5.0, 7.0)
    wrapper(TOKENS, TOKENS).add_lora_linear(y, x, a, b, 1.0, OUT, add_inputs=False)
    base = torch.tensor(TOKENS) == 0
    assert torch.allclose(y[~base].double(), want[~base], atol=1e-3)
    assert (y[base] == 5).all()


def test_shrink_and_expand_apart_equal_linear() -> None:
    a, b = weights(torch.float32)
    x, y = torch.randn(len(TOKENS), IN), torch.randn(len(TOKENS), sum(OUT))
    want = expected(y, x, a, b, TOKENS)
    made = wrapper(TOKENS, TOKENS)
    h = torch.zeros(len(OUT), len(TOKENS), RANK)
    made.add_shrink(h, x, a, 1.0)
    made.add_expand(y, h, b, OUT)
    assert torch.allclose(y.double(), want, atol=1e-3)


def test_logits_use_the_rows_that_are_sampled() -> None:
    a, b = weights(torch.float32)
    prompts = [0, 14, 11]
    x, y = torch.randn(3, IN), torch.randn(3, OUT[0])
    before = y.clone()
    want = expected(y, x, a[:1], b[:1], prompts)
    wrapper(TOKENS, prompts).add_lora_logits(y, x, a[0], b[0], 1.0)
    assert torch.allclose(y.double(), want, atol=1e-3)
    assert torch.equal(y[0], before[0])


def test_embedding_never_touches_base_rows() -> None:
    _, b = weights(torch.float32)
    h, y = torch.randn(len(TOKENS), RANK), torch.randn(len(TOKENS), OUT[0])
    before = y.clone()
    wrapper(TOKENS, TOKENS).add_lora_embedding(y, h, b[0])
    for row, lora in enumerate(TOKENS):
        delta = 0 if lora == 0 else h[row] @ b[0][IDS.index(lora), 0].T
        assert torch.allclose(y[row], before[row] + delta, atol=1e-4)


def test_slots_without_such_weights_are_left_out() -> None:
    a, b = weights(torch.float32)
    x, y = torch.randn(3, IN), torch.randn(3, OUT[0])
    before = y.clone()
    made = wrapper(TOKENS, [14, 0, 11])
    made.occupied_slots = {b[0].data_ptr(): {IDS.index(11)}}
    want = expected(y, x, a[:1], b[:1], [0, 0, 11])
    made.add_lora_logits(y, x, a[0], b[0], 1.0)
    assert torch.allclose(y.double(), want, atol=1e-3)
    assert torch.equal(y[:2], before[:2])
    made.occupied_slots = {b[0].data_ptr(): set()}
    made.add_lora_logits(y, torch.full((3, IN), float("nan")), a[0], b[0], 1.0)
    assert not y.isnan().any()


def test_the_largest_step_takes_no_more_memory_than_start_up() -> None:
    """vLLM gives what start-up leaves to the KV cache; a step of all tokens at the largest rank must fit beside it."""
    library = cpu_native.load()
    if library is None:
        pytest.skip("the native library is not built")
    tokens, rank = library.reserve(0) // 96 + 64, 48
    layer = make_layer(slots=1, ranks=[[rank]] * 2, in_size=16, out_sizes=(16, 16), dtype=torch.float32)
    made = PunicaWrapperCPU(tokens, 64, torch.device("cpu"))
    made.configure_paged(max_rank=rank)
    made.register_linear(layer)
    held = library.reserve(0)
    assert held == tokens * rank * 2
    made.update_metadata(LoRAMapping((11,) * tokens, (11,), True), [11], 2, 1000)
    x, y = torch.randn(tokens, 16), torch.zeros(tokens, 32)
    made.add_lora_linear(y, x, (layer.handle,), (layer.handle,), 1.0, (16, 16))
    assert y.any()
    assert library.reserve(0) == held


def test_an_adapter_without_a_slot_is_an_error() -> None:
    with pytest.raises(KeyError):
        wrapper([99], [99])
