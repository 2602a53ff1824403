"""kernels/cpu_paged.py and cpu_native.py (every instruction set) against float64, NaN where nobody may read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_layers import make_layer

from vllm_loraserve.kernels import cpu_native, cpu_paged
from vllm_loraserve.kernels.grouping import group_by_slot
from vllm_loraserve.kernels.paged import PagedLinear, reference_linear

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NATIVE = ["avx512_bf16", "avx512", "avx2", "generic"]


@pytest.fixture(params=["torch", *NATIVE])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch":
        yield "torch"
        return
    library = cpu_native.load()
    if library is None:
        pytest.skip("the native library is not built")
    if not library.force_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    try:
        assert library.isa == request.param
        yield request.param
    finally:
        library.force_isa(None)


def run(
    kernel: str,
    y: torch.Tensor,
    x: torch.Tensor,
    layer: PagedLinear,
    slots: list[int],
    *,
    add_inputs: bool = True,
) -> None:
    groups = group_by_slot(np.array(slots, np.int32))
    if kernel == "torch":
        cpu_paged.linear(y, x, layer, groups, add_inputs=add_inputs)
    else:
        library = cpu_native.load()
        assert library is not None
        done = library.linear(
            y, x, cpu_native.NativeLayer(layer), cpu_native.NativeBatch(groups), add_inputs=add_inputs
        )
        assert done


def check(kernel: str, layer: PagedLinear, slots: list[int], *, add_inputs: bool = True, seed: int = 0) -> None:
    torch.manual_seed(seed)
    dtype = layer.arena.dtype
    x = torch.randn(len(slots), layer.in_size).to(dtype)
    y = torch.randn(len(slots), sum(layer.out_sizes)).to(dtype)
    before = y.clone()
    want = reference_linear(y, x, layer, torch.tensor(slots), add_inputs=add_inputs)
    run(kernel, y, x, layer, slots, add_inputs=add_inputs)
    assert not y.isnan().any()
    assert (y.double() - want).abs().max() <= TOLERANCE[dtype] * max(want.abs().max(), 1.0)
    base = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y[base], before[base])
    untouched = torch.tensor([[r == 0 for r in layer.ranks[:, max(slot, 0)]] for slot in slots])
    start = 0
    for s, size in enumerate(layer.out_sizes):
        rows = untouched[:, s]
        assert torch.equal(y[rows, start : start + size], before[rows, start : start + size])
        start += size


RANKS = [[8, 0, 3, 128, 17], [8, 0, 16, 128, 0], [1, 0, 16, 40, 64]]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("add_inputs", [True, False])
def test_mixed_batch(kernel: str, dtype: torch.dtype, add_inputs: bool) -> None:
    layer = make_layer(slots=5, ranks=RANKS, in_size=96, out_sizes=(80, 48, 48), dtype=dtype)
    check(kernel, layer, [3, -1, 0, 2, 2, 4, -1, 1, 3, 0, 2], add_inputs=add_inputs)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("in_size", "out"), [(576, 1536), (1000, 200), (33, 7), (16, 1), (40, 515)])
def test_odd_sizes(kernel: str, dtype: torch.dtype, in_size: int, out: int) -> None:
    layer = make_layer(slots=2, ranks=[[13, 64]], in_size=in_size, out_sizes=(out,), dtype=dtype)
    check(kernel, layer, [0, 1, 1, -1, 0, 0, 1])


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 64, 65, 131])
def test_token_counts(kernel: str, tokens: int) -> None:
    layer = make_layer(slots=2, ranks=[[16, 24]], in_size=64, out_sizes=(72,), dtype=torch.bfloat16)
    check(kernel, layer, [1] * tokens)
    check(kernel, layer, [row % 2 for row in range(tokens)])


@pytest.mark.parametrize("page_rows", [1, 4, 8, 16])
def test_page_sizes(kernel: str, page_rows: int) -> None:
    layer = make_layer(slots=2, ranks=[[37, 5]], in_size=48, out_sizes=(64,), dtype=torch.float32, page_rows=page_rows)
    check(kernel, layer, [0, 1, 0])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    """The best kernel of this machine over random ranks, slices, orders and base tokens."""
    slots = data.draw(st.integers(1, 4))
    slices = data.draw(st.integers(1, 3))
    rank = st.one_of(st.sampled_from([0, 1, 8, 16]), st.integers(0, 40))
    ranks = [[data.draw(rank) for _ in range(slots)] for _ in range(slices)]
    batch = data.draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=20))
    layer = make_layer(
        slots=slots,
        ranks=ranks,
        in_size=data.draw(st.sampled_from([8, 24, 32, 70])),
        out_sizes=tuple(data.draw(st.sampled_from([8, 20, 48])) for _ in range(slices)),
        dtype=data.draw(st.sampled_from(list(TOLERANCE))),
        seed=data.draw(st.integers(0, 99)),
    )
    for kernel in ("torch", "native") if cpu_native.load() is not None else ("torch",):
        check(kernel, layer, batch)


def test_threads_change_nothing() -> None:
    library = cpu_native.load()
    if library is None:
        pytest.skip("the native library is not built")
    assert library.has_threads, "torch's OpenMP run time was not found"
    layer = make_layer(slots=2, ranks=[[64, 128]], in_size=512, out_sizes=(1024,), dtype=torch.bfloat16)
    x, results = torch.randn(150, 512).bfloat16(), []
    slots = [row % 3 - 1 for row in range(150)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(max(before, 2))
        for threads in (1, 2, 2, 0):
            library.set_threads(threads)
            y = torch.zeros(150, 1024).bfloat16()
            run("native", y, x, layer, slots)
            results.append(y)
    finally:
        library.set_threads(0)
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_company_changes_nothing(kernel: str, dtype: torch.dtype) -> None:
    """A token's result is bit for bit the same alone and in any batch, so that chunks and preemption tell nothing."""
    if kernel == "torch":
        pytest.skip("torch chooses its sums by the batch")
    layer = make_layer(slots=1, ranks=[[21]], in_size=100, out_sizes=(170,), dtype=dtype)
    x = torch.randn(37, 100).to(dtype)
    together = torch.zeros(37, 170).to(dtype)
    run(kernel, together, x, layer, [0] * 37)
    for size in (1, 2, 3, 7, 16):
        for first in range(0, 37, size):
            part = torch.zeros(len(x[first : first + size]), 170).to(dtype)
            run(kernel, part, x[first : first + size].contiguous(), layer, [0] * len(part))
            assert torch.equal(part, together[first : first + size]), (size, first)


def test_scratch_memory_is_kept_and_grows_as_needed() -> None:
    library = cpu_native.load()
    if library is None:
        pytest.skip("the native library is not built")
    held = library.reserve(0)
    assert library.reserve(held + 1000) == held + 1000
    assert library.reserve(10) == held + 1000
    layer = make_layer(slots=1, ranks=[[40], [40]], in_size=16, out_sizes=(16, 16), dtype=torch.float32)
    tokens = (held + 1000) // 80 + 5
    run("native", torch.zeros(tokens, 32), torch.randn(tokens, 16), layer, [0] * tokens)
    assert library.reserve(0) == tokens * 40 * 2


def test_rows_of_wider_tensors() -> None:
    """x and y may be columns of wider tensors, as a fused projection's are."""
    layer = make_layer(slots=1, ranks=[[8]], in_size=32, out_sizes=(16,), dtype=torch.float32)
    x, y = torch.randn(4, 50)[:, :32], torch.zeros(4, 40)[:, :16]
    want = reference_linear(y, x, layer, torch.zeros(4, dtype=torch.int64))
    for kernel in ("torch", "native") if cpu_native.load() is not None else ("torch",):
        out = torch.zeros(4, 40)
        run(kernel, out[:, :16], x, layer, [0] * 4)
        assert torch.allclose(out[:, :16].double(), want, atol=1e-4)
        assert (out[:, 16:] == 0).all()


def test_native_refuses_what_it_cannot_read() -> None:
    library = cpu_native.load()
    if library is None:
        pytest.skip("the native library is not built")
    layer = make_layer(slots=1, ranks=[[8]], in_size=32, out_sizes=(16,), dtype=torch.bfloat16)
    native = cpu_native.NativeLayer(layer)
    batch = cpu_native.NativeBatch(group_by_slot(np.zeros(4, np.int32)))
    assert not library.linear(torch.zeros(4, 16), torch.zeros(4, 32), native, batch)
    with pytest.raises(ValueError, match="needs"):
        library.linear(torch.zeros(4, 16).bfloat16(), torch.zeros(4, 31).bfloat16(), native, batch)
    with pytest.raises(ValueError, match="4 tokens"):
        library.linear(torch.zeros(3, 16).bfloat16(), torch.zeros(3, 32).bfloat16(), native, batch)
