"""The launch formulas: grids fixed by capacity, split-K sized to K, powers of two."""

import dataclasses

import numpy as np
import pytest
import torch

from vllm_loraserve.kernels.lora_linear import plan_launch
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.synthetic import synthetic_linear
from vllm_loraserve.kernels.tuning import MAX_SPLIT_K, DeviceShape, prefill_blocks, split_k_for

H100 = DeviceShape()


@pytest.mark.parametrize("k", [16, 512, 1000, 4096, 8192, 14336, 53248])
@pytest.mark.parametrize("items", [1, 3, 40, 10_000])
def test_split_k_is_a_power_of_two_that_leaves_each_split_some_work(k, items):
    split = split_k_for(k, items, H100)
    assert split & (split - 1) == 0
    assert 1 <= split <= min(MAX_SPLIT_K, max(1, k // 512))


def test_split_k_follows_the_need():
    assert split_k_for(4096, 1, H100) == 8
    assert split_k_for(14336, 1, H100) == 16
    assert split_k_for(4096, 33, H100) == 4
    assert split_k_for(4096, 132, H100) == 1
    assert split_k_for(4096, 1, H100, batch_invariant=True) == split_k_for(4096, 999, H100, batch_invariant=True)


def test_a_graph_launch_depends_on_the_row_count_alone():
    linear = synthetic_linear(in_size=1024, out_sizes=(64,), ranks=[[8, 64]], max_rank=64, dtype=torch.float16)
    metadata = StepMetadata(slots=2, max_rank=64, graph_tokens=128, device="cpu")
    launches = set()
    for token_slots in ([0], [1] * 100, [-1, 0, 1]):
        plan = metadata.build(np.asarray(token_slots, np.int32))
        launches.add(plan_launch(linear, plan, 128, H100, graph_tokens=128))
    assert len(launches) == 1


def test_grids_are_bounded_by_the_device_and_do_not_grow_with_the_slots():
    programs = []
    for slots in (64, 1024):
        linear = synthetic_linear(
            in_size=1024, out_sizes=(64,), ranks=[[8] + [0] * (slots - 1)], max_rank=64, dtype=torch.float16
        )
        metadata = StepMetadata(slots=slots, max_rank=64, graph_tokens=64, device="cpu")
        launch = plan_launch(linear, metadata.build(np.zeros(64, np.int32)), 64, H100, graph_tokens=64)
        programs.append((launch.shrink_programs, launch.expand_programs))
        assert launch.shrink_programs <= H100.resident
    assert programs[0] == programs[1]


def test_prefill_blocks_follow_tokens_per_adapter_and_the_largest_rank():
    ranks = np.asarray([8, 128, 0, 32], np.int32)
    few = np.asarray([0, 1, 2, 3] * 8, np.int32)
    many = np.repeat(np.asarray([0, 1], np.int32), 100)
    assert prefill_blocks(few, ranks) == (16, 16)
    assert prefill_blocks(many, ranks) == (64, 64)
    assert prefill_blocks(many[:100], ranks) == (64, 16)
    assert prefill_blocks(np.full(9, -1, np.int32), ranks) == (16, 16)


def test_a_configuration_for_other_blocks_is_refused():
    linear = synthetic_linear(in_size=512, out_sizes=(64,), ranks=[[8]], max_rank=8, dtype=torch.float16)
    metadata = StepMetadata(slots=1, max_rank=8, graph_tokens=8, device="cpu")
    plan = metadata.build(np.zeros(4, np.int32))
    config = plan_launch(linear, plan, 4, H100, graph_tokens=8).config
    tall = metadata.build(np.zeros(200, np.int32))
    with pytest.raises(ValueError, match="the plan was made for blocks of 64"):
        plan_launch(linear, tall, 200, H100, graph_tokens=8, config=config)


def test_planes_loaded_at_once_must_divide_the_split():
    linear = synthetic_linear(in_size=4096, out_sizes=(64,), ranks=[[8]], max_rank=8, dtype=torch.float16)
    metadata = StepMetadata(slots=1, max_rank=8, graph_tokens=8, device="cpu")
    config = plan_launch(linear, metadata.build(np.zeros(4, np.int32)), 4, H100, graph_tokens=8).config
    assert (config.split_k, config.expand_planes) == (8, 8)
    assert dataclasses.replace(config, expand_planes=1).expand_planes == 1
    for planes in (0, 3, 16):
        with pytest.raises(ValueError, match=f"expand_planes={planes} must be a power of two up to split_k=8"):
            dataclasses.replace(config, expand_planes=planes)
    with pytest.raises(ValueError, match="split_k=24 must be a power of two"):
        dataclasses.replace(config, split_k=24)
