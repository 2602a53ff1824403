"""engine/lora_memory.py: the scratch memory of the largest step is there while vLLM measures, and only then."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

import torch

from vllm_loraserve.adapters.layout import ModuleShape, build_layout
from vllm_loraserve.engine.lora_memory import ScratchReserve, scratch_bytes

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
