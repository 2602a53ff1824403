"""The GPU Punica wrapper and its custom op inside a real vLLM, with interpreted kernels on CPU tensors.

vLLM's own wrapper cannot be built where Triton has no active driver: its per-step tables (`LoRAKernelMeta`,
plain torch) are loaded from vLLM's sources in its place.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper import punica_gpu as stock_module

from vllm_loraserve.kernels.paged import reference_linear
from vllm_loraserve.kernels.punica_gpu import PunicaWrapperGPU, largest_captured_batch
from vllm_loraserve.kernels.stock_sources import load_stock
from vllm_loraserve.kernels.synthetic import synthetic_linear

RANKS = [[8, 0, 17], [8, 5, 3]]


@pytest.fixture
def linear():
    return synthetic_linear(
        in_size=128, out_sizes=(64, 32), ranks=RANKS, max_rank=24, dtype=torch.float16, name="layers.0.qkv"
    )


@pytest.fixture
def wrapper(linear, monkeypatch):
    monkeypatch.setattr(stock_module, "LoRAKernelMeta", load_stock().LoRAKernelMeta, raising=False)
    config = SimpleNamespace(max_loras=3, specialize_active_lora=False)
    wrapper = PunicaWrapperGPU(64, 16, torch.device("cpu"), lora_config=config)
    wrapper.configure_paged(max_rank=24, graph_tokens=16)
    wrapper.register_linear(linear)
    return wrapper


def step(wrapper, ids):
    mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
    wrapper.update_metadata(mapping, [7, 9, 4], 3, 1000)
    return torch.tensor([{0: -1, 7: 0, 9: 1, 4: 2}[i] for i in ids])


def close(out, expected):
    torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=4e-3)


def test_graph_buffers_cover_the_largest_capture_of_the_engine():
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    assert largest_captured_batch() == 512
    config = VllmConfig(compilation_config=CompilationConfig(max_cudagraph_capture_size=512))
    config.compilation_config.max_cudagraph_capture_size = 2048
    with set_current_vllm_config(config):
        assert largest_captured_batch() == 2048


@pytest.mark.parametrize("count", [6, 40])
def test_add_lora_linear(wrapper, linear, count):
    ids = ([7, 0, 4, 9, 4, 4] * 10)[:count]
    slots = step(wrapper, ids)
    x, y = torch.randn(count, 128).half(), torch.randn(count, 96).half()
    out = y.clone()
    wrapper.add_lora_linear(out, x, linear.stacked, (), 1.0, linear.out_sizes)
    close(out, reference_linear(y, x, linear, slots))
    apart = torch.zeros_like(y)
    wrapper.add_lora_linear(apart, x, linear.stacked, (), 1.0, linear.out_sizes, add_inputs=False)
    close(apart, reference_linear(torch.zeros_like(y), x, linear, slots, add_inputs=False))


@pytest.mark.parametrize("two_streams", [False, True])
def test_warming_up_touches_nothing(wrapper, linear, two_streams, monkeypatch):
    from vllm_loraserve.kernels import punica_gpu

    said = []
    monkeypatch.setattr(punica_gpu.logger, "info", lambda text, *values: said.append(values))
    monkeypatch.setattr(punica_gpu.logger, "exception", pytest.fail)
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", str(int(two_streams)))
    tensors = linear.arena, linear.page_table, linear.ranks
    before = [tensor.clone() for tensor in tensors]
    wrapper.warm_up()
    for tensor, was in zip(tensors, before, strict=True):
        assert tensor.view(torch.uint8).equal(was.view(torch.uint8))  # byte for byte: NaN is not equal to itself
    (launches, _) = said[-1]
    assert launches == 8 * (3 if two_streams else 2)
    slots = step(wrapper, [7, 0, 4])
    wrapper.warm_up()
    x, y = torch.randn(3, 128).half(), torch.randn(3, 96).half()
    out = y.clone()
    wrapper.add_lora_linear(out, x, linear.stacked, (), 1.0, linear.out_sizes)
    close(out, reference_linear(y, x, linear, slots))


def test_a_kernel_that_does_not_compile_beforehand_is_left_to_the_step_that_wants_it(wrapper, monkeypatch):
    from vllm_loraserve.kernels import punica_gpu

    said = []
    monkeypatch.setattr(punica_gpu.logger, "exception", lambda text: said.append((text, sys.exc_info()[0])))
    monkeypatch.setattr(punica_gpu, "warm_up", lambda *_, **__: 1 // 0)
    wrapper.warm_up()
    assert len(said) == 1
    text, error = said[0]
    assert "could be compiled beforehand" in text
    assert error is ZeroDivisionError


def test_torch_compile_traces_it_as_one_node_and_later_batches_are_followed(wrapper, linear):
    nodes = []

    def backend(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def layer(y, x):
        out = y + 0
        wrapper.add_lora_linear(out, x, linear.stacked, (), 1.0, linear.out_sizes)
        return out

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    # Six rows first: a count equal to another dimension would be taken for the same symbol.
    for ids in ([7, 0, 4, 9, 9, 0], [0, 0, 9, 9, 7], [4] * 20, [0, 0, 0]):
        slots = step(wrapper, ids)
        x, y = torch.randn(len(ids), 128).half(), torch.randn(len(ids), 96).half()
        close(compiled(y, x), reference_linear(y, x, linear, slots))
    assert nodes.count("vllm.loraserve_lora_linear") == 1, nodes


def test_functionalised_compilation_keeps_the_mutation(wrapper, linear):
    ids = [7, 0, 4, 9]
    slots = step(wrapper, ids)

    def layer(y, x):
        out = y * 1
        wrapper.add_lora_linear(out, x, linear.stacked, (), 1.0, linear.out_sizes)
        return out * 1

    x, y = torch.randn(4, 128).half(), torch.randn(4, 96).half()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    close(compiled(y, x), reference_linear(y, x, linear, slots))


def test_a_rank_that_changes_under_an_unchanged_mapping_is_followed(wrapper, linear):
    slots = step(wrapper, [9, 9])
    wrapper.set_slot_rank(1, 1)
    linear.ranks[:, 1] = 1
    linear.page_table[1, 0] = linear.page_table[0, 0]
    x, y = torch.randn(2, 128).half(), torch.randn(2, 96).half()
    out = y.clone()
    wrapper.add_lora_linear(out, x, linear.stacked, (), 1.0, linear.out_sizes)
    close(out, reference_linear(y, x, linear, slots))


def test_stock_layers_keep_their_metadata(wrapper):
    step(wrapper, [7, 0, 4, 4])
    assert wrapper.token_lora_indices.tolist() == [0, -1, 2, 2]
    assert wrapper.token_mapping_meta.num_tokens_per_lora[:3].tolist() == [1, 1, 2]


def test_without_stock_layers_their_metadata_is_not_prepared(wrapper, monkeypatch):
    wrapper.configure_paged(max_rank=24, graph_tokens=16, stock_layers=False)
    monkeypatch.setattr(wrapper.token_mapping_meta, "prepare_tensors", None)
    step(wrapper, [7, 0, 4, 4])
    assert wrapper.paged_metadata.plan.n_active == 2


def test_mistakes_are_named(wrapper, linear):
    with pytest.raises(ValueError, match="fold the scaling into B"):
        wrapper.add_lora_linear(None, None, linear.stacked, (), 2.0, linear.out_sizes)
    with pytest.raises(NotImplementedError, match="--fully-sharded-loras"):
        wrapper.add_shrink(None, None, linear.stacked, 1.0)
    with pytest.raises(KeyError):
        wrapper.update_metadata(LoRAMapping((0, 5), (0, 5), is_prefill=True), [7, None, None], 3, 1000)
    with pytest.raises(RuntimeError, match="not registered"):
        torch.ops.vllm.loraserve_lora_linear(
            torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(1, 4, dtype=torch.int64), True
        )
    small = synthetic_linear(in_size=16, out_sizes=(16,), ranks=[[1, 1, 1]], max_rank=8, dtype=torch.float16)
    with pytest.raises(ValueError, match="page table for 3 slots of rank 8"):
        wrapper.register_linear(small)


def test_stock_linear_layers_fall_through(wrapper, monkeypatch):
    calls = []
    monkeypatch.setattr(stock_module.PunicaWrapperGPU, "add_lora_linear", lambda self, *a, **k: calls.append((a, k)))
    weights = (torch.zeros(3, 1, 8, 16),)
    wrapper.add_lora_linear(None, None, weights, weights, 1.0, (16,), add_inputs=False)
    assert calls[0][1] == {"buffer": None, "add_inputs": False}


def test_a_batch_without_adapters_touches_nothing(wrapper, linear):
    step(wrapper, [0, 0])
    x, y = torch.full((2, 128), float("nan")).half(), torch.randn(2, 96).half()
    out = y.clone()
    wrapper.add_lora_linear(out, x, linear.stacked, (), 1.0, linear.out_sizes)
    assert torch.equal(out, y)
