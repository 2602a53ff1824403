"""The cost count against what interpreted kernels really did."""

import numpy as np
import pytest
import torch

from vllm_loraserve.kernels.cost import count_paged
from vllm_loraserve.kernels.lora_linear import device_shape, plan_launch, run_shrink
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.synthetic import synthetic_linear


@pytest.mark.parametrize("graph_tokens", [64, 4])
def test_partial_sums_written_are_those_counted(graph_tokens):
    """Shrink writes one fp32 for each (split, token, rank row), ranks filled up to groups of four: count the elements
    that are no longer NaN."""
    ranks = [[8, 33, 0, 64], [8, 17, 5, 64], [0, 33, 5, 7]]
    linear = synthetic_linear(in_size=512, out_sizes=(64, 32, 32), ranks=ranks, max_rank=64, dtype=torch.float16)
    metadata = StepMetadata(slots=4, max_rank=64, graph_tokens=graph_tokens, device="cpu")
    for slot in range(4):
        metadata.set_slot_rank(slot, max(row[slot] for row in ranks))
    token_slots = np.asarray([3, 1, 0, -1, 3, 2] * 5, np.int32)
    plan = metadata.build(token_slots)
    device = device_shape(torch.device("cpu"))
    launch = plan_launch(linear, plan, token_slots.size, device, graph_tokens=graph_tokens)
    planes = torch.full(launch.planes, float("nan"))
    run_shrink(planes, torch.randn(token_slots.size, 512).half(), linear, plan, launch)
    written = int((~planes.isnan()).sum())
    counts = np.bincount(token_slots[token_slots >= 0])
    columns = -(-np.asarray(ranks) // 4) * 4
    assert written == launch.config.split_k * int((counts * columns).sum())
    cost = count_paged(linear, metadata, token_slots.size, device)
    loaded = 0
    items = plan.items[: plan.n_items].tolist()
    for row in ranks:
        for slot, _, length, block in items:
            live = min(max(row[slot] - block * plan.block_r, 0), plan.block_r)
            loaded += (length + live) * 512 * 2 if live else 0
    expand = count_paged(linear, metadata, token_slots.size, device).issued_bytes - loaded - written * 4
    assert expand > 0
    by_hand = 0
    for row, filled, size in zip(ranks, columns.tolist(), (64, 32, 32), strict=True):
        for slot, _, length, _ in plan.tiles[: plan.n_tiles].tolist():
            by_hand += row[slot] * size * 2 + launch.config.split_k * filled[slot] * length * 4
            by_hand += 2 * length * size * 2 if row[slot] else 0
    assert expand == by_hand
    assert cost.weight_bytes == sum(sum(row) * (512 + size) * 2 for row, size in zip(ranks, (64, 32, 32), strict=True))
