"""engine/lora_memory.py: the scratch memory of the largest step is there while vLLM measures, and only then; what the
log says of the arena."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch

from vllm_loraserve.adapters.layout import ModuleShape, build_layout
from vllm_loraserve.engine.lora_memory import ScratchReserve, log_arena, scratch_bytes
from vllm_loraserve.memory.arena import Arena

pytestmark = pytest.mark.vllm


def test_the_largest_step_is_all_tokens_at_the_largest_rank_in_the_layer_of_most_slices() -> None:
    layout = build_layout(
        [ModuleShape("qkv", "qkv", 64, (64, 32, 32)), ModuleShape("o", "o", 64, (64,))],
        model="tiny",
        dtype="float32",
        page_rows=8,
        tp_rank=0,
        tp_size=1,
    )
    assert scratch_bytes(layout, max_rank=256, arena_rows=1024, max_tokens=8192) == 3 * 8192 * 256 * 4
    assert scratch_bytes(layout, max_rank=256, arena_rows=40, max_tokens=100) == 3 * 100 * 48 * 4
    empty = build_layout([], model="tiny", dtype="float32", page_rows=8, tp_rank=0, tp_size=1)
    assert scratch_bytes(empty, max_rank=256, arena_rows=1024, max_tokens=8192) == 0


def test_it_is_held_in_the_first_warm_up_alone() -> None:
    scratch = ScratchReserve(4096, torch.device("cpu"))
    scratch.hold()
    first = scratch.held
    scratch.hold()
    assert first is not None
    assert scratch.held is first
    assert first.nbytes == 4096
    scratch.release()
    scratch.hold()
    assert scratch.held is None


@pytest.mark.parametrize("fully_sharded", [False, True])
def test_the_log_names_the_arena_and_what_stock_takes(said: list[str], fully_sharded: bool) -> None:
    modules = [] if fully_sharded else [ModuleShape("qkv", "qkv", 64, (64, 32, 32)), ModuleShape("o", "o", 64, (64,))]
    layout = build_layout(modules, model="tiny", dtype="float32", page_rows=8, tp_rank=0, tp_size=1)
    arena = Arena(layout, 44, torch.device("cpu"))
    lora = SimpleNamespace(max_lora_rank=64, fully_sharded_loras=fully_sharded)
    log_arena(arena, 16, 3 << 30, lora)
    (line,) = said
    if fully_sharded:
        assert "because of --fully-sharded-loras" in line
        assert "padded to --max-lora-rank 64" in line
    else:
        assert "40 rank rows (5 pages of 8 rows in 2 module groups) and 16 slots" in line
        assert "stock vLLM takes 3.000 GiB for --max-loras 16 --max-lora-rank 64" in line
