"""The kernels on a real GPU: bf16 and fp16 against float64, captured in a CUDA graph, bit-equal when repeated.

The same checks run interpreted in `interpreted/`, without bf16.
"""

import dataclasses

import numpy as np
import pytest
import torch

from vllm_loraserve.kernels.lora_linear import device_shape, lora_linear, plan_launch
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.paged import reference_linear
from vllm_loraserve.kernels.synthetic import synthetic_linear
from vllm_loraserve.kernels.warm_up import warm_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels were not run on a GPU"),
]

RANKS = (8, 33, 0, 128, 1, 16, 7, 64)
SHAPES = [(4096, (4096, 1024, 1024)), (14336, (4096,)), (8192, (1024, 128, 128)), (1000, (200, 72))]
CUDA = torch.device("cuda")


def build(in_size, out_sizes, dtype, graph_tokens=512):
    ranks = [list(RANKS), *([list(reversed(RANKS))] * (len(out_sizes) - 1))]
    linear = synthetic_linear(in_size=in_size, out_sizes=out_sizes, ranks=ranks, max_rank=128, dtype=dtype, device=CUDA)
    metadata = StepMetadata(slots=len(RANKS), max_rank=128, graph_tokens=graph_tokens, device=CUDA)
    for slot in range(len(RANKS)):
        metadata.set_slot_rank(slot, max(row[slot] for row in ranks))
    return linear, metadata


def check(out, y, x, linear, token_slots):
    slots = torch.full((len(x),), -1)
    slots[: len(token_slots)] = torch.from_numpy(token_slots).long()
    expected = reference_linear(y, x, linear, slots)
    tolerance = 2e-2 if x.dtype == torch.bfloat16 else 4e-3
    torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(out.cpu()[slots < 0], y.cpu()[slots < 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("in_size", "out_sizes"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 16, 64, 600, 2048])
def test_matches_float64_and_repeats_bit_for_bit(in_size, out_sizes, tokens, dtype):
    linear, metadata = build(in_size, out_sizes, dtype)
    token_slots = np.random.default_rng(tokens).integers(-1, len(RANKS), tokens).astype(np.int32)
    metadata.build(token_slots)
    x = torch.randn(tokens, in_size, device=CUDA).to(dtype)
    y = torch.randn(tokens, sum(out_sizes), device=CUDA).to(dtype)
    outs = [y.clone() for _ in range(3)]
    for out in outs:
        lora_linear(out, x, linear, metadata)
    check(outs[0], y, x, linear, token_slots)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize(("split_k", "planes"), [(16, 4), (16, 8), (16, 16), (32, 8), (32, 16)])
def test_planes_loaded_together_match_float64_and_repeat_bit_for_bit(split_k, planes):
    linear, metadata = build(14336, (4096,), torch.bfloat16)
    token_slots = np.random.default_rng(0).integers(-1, len(RANKS), 64).astype(np.int32)
    launch = plan_launch(linear, metadata.build(token_slots), 64, device_shape(CUDA), graph_tokens=512)
    config = dataclasses.replace(launch.config, split_k=split_k, expand_planes=planes)
    x = torch.randn(64, 14336, device=CUDA).bfloat16()
    y = torch.randn(64, 4096, device=CUDA).bfloat16()
    outs = [y.clone() for _ in range(3)]
    for out in outs:
        lora_linear(out, x, linear, metadata, config=config)
    check(outs[0], y, x, linear, token_slots)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


OVERLAPS = [
    pytest.param(early_y, dependent, id=f"early_y={early_y}-dependent_launch={dependent}")
    for early_y in (False, True)
    for dependent in (False, True)
]


def overlapping(linear, plan, tokens, early_y, dependent_launch):
    if dependent_launch and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0: it was not run")
    launch = plan_launch(linear, plan, tokens, device_shape(CUDA), graph_tokens=512)
    return dataclasses.replace(launch.config, expand_early_y=early_y, dependent_launch=dependent_launch)


@pytest.mark.parametrize(("early_y", "dependent_launch"), OVERLAPS[1:])
@pytest.mark.parametrize(("in_size", "out_sizes"), SHAPES)
@pytest.mark.parametrize("tokens", [64, 2048])
def test_what_overlaps_changes_no_bit(in_size, out_sizes, tokens, early_y, dependent_launch):
    """Many layers after each other on the same planes: each must wait for the one before it."""
    linear, metadata = build(in_size, out_sizes, torch.bfloat16)
    token_slots = np.random.default_rng(1).integers(-1, len(RANKS), tokens).astype(np.int32)
    plan = metadata.build(token_slots)
    config = overlapping(linear, plan, tokens, early_y, dependent_launch)
    xs = torch.randn(20, tokens, in_size, device=CUDA).bfloat16()
    y = torch.randn(tokens, sum(out_sizes), device=CUDA).bfloat16()
    outs = {}
    for name, given in (("plain", None), ("overlapping", config)):
        outs[name] = [y.clone() for _ in xs]
        for out, x in zip(outs[name], xs, strict=True):
            lora_linear(out, x, linear, metadata, config=given)
    check(outs["plain"][0], y, xs[0], linear, token_slots)
    assert all(torch.equal(*pair) for pair in zip(*outs.values(), strict=True))


@pytest.mark.parametrize(("early_y", "dependent_launch"), OVERLAPS)
def test_one_captured_graph_serves_every_later_batch(early_y, dependent_launch):
    linear, metadata = build(4096, (4096, 1024, 1024), torch.bfloat16)
    x = torch.randn(64, 4096, device=CUDA).bfloat16()
    y = torch.randn(64, 6144, device=CUDA).bfloat16()
    out = y.clone()
    config = overlapping(linear, metadata.build(np.zeros(64, np.int32)), 64, early_y, dependent_launch)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        lora_linear(out, x, linear, metadata, config=config)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora_linear(out, x, linear, metadata, config=config)
    rng = np.random.default_rng(0)
    for tokens in (64, 1, 17, 64, 40):
        token_slots = rng.integers(-1, len(RANKS), tokens).astype(np.int32)
        metadata.build(token_slots)
        out.copy_(y)
        graph.replay()
        check(out, y, x, linear, token_slots)


@pytest.mark.parametrize(("in_size", "out_sizes"), SHAPES)
def test_after_warming_up_nothing_is_compiled(in_size, out_sizes, monkeypatch):
    from triton import knobs

    from vllm_loraserve.kernels import triton_expand, triton_shrink

    linear, metadata = build(in_size, out_sizes, torch.bfloat16)
    for kernel in (triton_shrink.shrink_kernel, triton_expand.expand_kernel):
        kernel.device_caches.clear()
    warm_up([linear], metadata)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **about: compiled.append(about["repr"]))
    rng = np.random.default_rng(0)
    for tokens in (1, 64, 512, 600, 2048):
        for some in ([0], [3], [0, 5], list(range(len(RANKS)))):
            metadata.build(rng.choice([-1, *some], tokens).astype(np.int32))
            x = torch.randn(tokens, in_size, device=CUDA).bfloat16()
            lora_linear(torch.zeros(tokens, sum(out_sizes), device=CUDA).bfloat16(), x, linear, metadata)
    assert compiled == []


def test_a_capture_beyond_the_layout_is_refused():
    linear, metadata = build(1000, (200, 72), torch.float16, graph_tokens=16)
    x, y = torch.zeros(32, 1000, device=CUDA).half(), torch.zeros(32, 272, device=CUDA).half()
    metadata.build(np.zeros(32, np.int32))
    lora_linear(y, x, linear, metadata)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="graphs of up to 16"), torch.cuda.graph(graph):
        lora_linear(y, x, linear, metadata)
