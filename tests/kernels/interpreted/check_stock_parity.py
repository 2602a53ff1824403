"""Equality with vLLM's own Triton kernels, both interpreted: the same adapters, zero-padded for vLLM, paged
for us."""

import numpy as np
import pytest
import torch

from vllm_loraserve.kernels.lora_linear import lora_linear
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.paged import PagedLinear, reference_linear
from vllm_loraserve.kernels.stock_sources import configured, find_vllm_source, load_stock
from vllm_loraserve.kernels.synthetic import padded_weights, synthetic_linear


def stock_linear(stock, y, x, linear: PagedLinear, token_slots, max_rank):
    a, b = padded_weights(linear, max_rank)
    meta = stock.LoRAKernelMeta.make(linear.slots, x.shape[0], device="cpu")
    meta.prepare_tensors(torch.from_numpy(token_slots).long())
    buffer = torch.empty(linear.n_slices, x.shape[0], max_rank)
    args = meta.meta_args(x.shape[0], True)
    with configured(stock, lambda op, config: config | ({"split_k": 2} if op == "shrink" else {})):
        stock.lora_shrink(x, a, buffer, *args, 1.0)
        stock.lora_expand(buffer, b, y, *args, offset_start=0, add_inputs=True)


@pytest.mark.parametrize("out_sizes", [(96,), (64, 32, 32)])
def test_same_result_as_vllm(out_sizes):
    stock = load_stock()
    ranks = [[8, 16, 3]] * len(out_sizes)
    linear = synthetic_linear(in_size=256, out_sizes=out_sizes, ranks=ranks, max_rank=16, dtype=torch.float16, seed=5)
    token_slots = np.asarray([0, 2, -1, 1, 1, 0, -1], np.int32)
    x = torch.randn(7, 256).half()
    y = torch.randn(7, sum(out_sizes)).half()
    ours, theirs = y.clone(), y.clone()
    metadata = StepMetadata(slots=3, max_rank=16, graph_tokens=16, device="cpu")
    metadata.build(token_slots)
    lora_linear(ours, x, linear, metadata)
    stock_linear(stock, theirs, x, linear, token_slots, max_rank=16)
    torch.testing.assert_close(ours, theirs, atol=6e-3, rtol=6e-3)
    expected = reference_linear(y, x, linear, torch.from_numpy(token_slots))
    error = [(out.double() - expected).abs().max() for out in (ours, theirs)]
    assert error[0] <= error[1] * 1.5, "adding in fp32 must not be less exact than adding in fp16"


def test_loading_leaves_no_stand_in_behind():
    import sys

    load_stock()
    assert not any(name == "vllm" and not hasattr(module, "__file__") for name, module in sys.modules.items())


def test_a_folder_without_vllm_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not an unpacked vLLM wheel"):
        find_vllm_source(tmp_path)
