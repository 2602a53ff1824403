"""The count agrees with closed forms, and the stored figures are those of the present code."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: vLLM's kernels cannot be read")

from vllm_loraserve.kernels.cost import Batch, LayerShape, count_ours, count_stock
from vllm_loraserve.kernels.stock_sources import load_stock
from vllm_loraserve.kernels.tuning import DeviceShape
from vllm_loraserve.kernels.workloads import LLAMA_8B, batches, interference, slots_sweep, spread

ROOT = Path(__file__).parents[2]
DEVICE = DeviceShape()
O_PROJ = LLAMA_8B[1]


@pytest.fixture(scope="module")
def stock():
    return load_stock()


def test_stock_programs_are_vllms_grid(stock):
    """Decode, R=128: split 64 x one row block x 8 rank blocks, and 32 column blocks, for 33 adapters each."""
    batch = next(b for b in batches() if b.name.startswith("D1"))
    assert count_stock(stock, O_PROJ, batch).programs == 33 * (64 * 8 + 4096 // 128)
    assert count_stock(stock, O_PROJ, batch, specialised=True).programs == 16 * (64 * 8 + 4096 // 128)


def test_weight_bytes_follow_the_rank_each_side_pays_for(stock):
    batch = Batch("two", (0, 1, -1), (8, 128, 0), 128)
    pair = (O_PROJ.in_size + O_PROJ.out_sizes[0]) * 2
    assert count_ours(O_PROJ, batch, DEVICE).weight_bytes == (8 + 128) * pair
    assert count_stock(stock, O_PROJ, batch).weight_bytes == 2 * 128 * pair


def test_both_sides_agree_on_what_is_useful(stock):
    for batch in batches():
        for layer in LLAMA_8B:
            ours, theirs = count_ours(layer, batch, DEVICE), count_stock(stock, layer, batch)
            assert ours.useful_flops == theirs.useful_flops == batch.useful_flops(layer)
            assert ours.flops >= ours.useful_flops
            assert theirs.flops >= theirs.useful_flops


def test_equal_ranks_and_one_adapter_leave_no_padding_to_save(stock):
    batch = Batch("uniform", spread(16, 1), (128,), 128)
    layer = LayerShape("square", 4096, (4096,))
    assert count_ours(layer, batch, DEVICE).weight_bytes == count_stock(stock, layer, batch).weight_bytes


def test_cost_is_flat_in_the_number_of_slots():
    costs = {slots: count_ours(O_PROJ, slots_sweep(slots), DEVICE) for slots in (16, 64, 256, 1024)}
    assert len({cost.live_programs for cost in costs.values()}) == 1
    assert len({cost.issued_bytes for cost in costs.values()}) == 1
    assert max(cost.programs for cost in costs.values()) <= 2 * DEVICE.resident


def test_one_large_adapter_costs_its_own_rows_and_nothing_of_the_others():
    small, large = (count_ours(O_PROJ, interference(rank), DEVICE) for rank in (8, 128))
    assert large.weight_bytes - small.weight_bytes == 120 * (4096 + 4096) * 2


def test_a_batch_of_base_tokens_costs_nothing(stock):
    batch = Batch("base", (-1, -1), (8, 8), 128)
    assert count_ours(O_PROJ, batch, DEVICE).programs == 0
    assert count_stock(stock, O_PROJ, batch).programs == 0


def test_missing_modules_cost_nothing():
    """A slice of rank 0 adds no bytes: k and v of an adapter that targets q alone."""
    from vllm_loraserve.kernels.cost import count_paged, layout_only, metadata_of

    batch = Batch("q only", (0,) * 4, (8,), 8)
    linear = layout_only(LLAMA_8B[0], batch)
    linear.ranks[1:] = 0
    cost = count_paged(linear, metadata_of(batch), 4, DEVICE)
    assert cost.weight_bytes == 8 * (4096 + 4096) * 2
    assert cost.live_programs == math.prod((1, 8)) + 32


def test_stored_counts_are_current():
    """CI's guard: any change of a launch or of a list shows here. If it is meant, write the file anew."""
    stored = ROOT / "benchmarks" / "results" / "lora_cost_count.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "lora_cost_count.py"), "--check", str(stored)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "counts are as stored" in run.stderr
