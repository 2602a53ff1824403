"""engine/memory_metrics.py: the figures are those of the memory, and of what had to leave it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch

from vllm_loraserve.adapters.layout import ModuleShape, build_layout
from vllm_loraserve.engine.arena_residents import ArenaResidents
from vllm_loraserve.engine.memory_metrics import MemoryMetrics
from vllm_loraserve.memory.arena import Arena
from vllm_loraserve.memory.host_tier import HostTier

pytestmark = pytest.mark.vllm


def test_figures_of_both_tiers() -> None:
    layout = build_layout(
        [ModuleShape("m.0.qkv", "qkv", 16, (16, 8, 8)), ModuleShape("m.0.down", "down", 24, (16,))],
        model="tiny",
        dtype="float32",
        page_rows=4,
        tp_rank=0,
        tp_size=1,
    )
    arena, host = Arena(layout, 32, torch.device("cpu")), HostTier(layout, 1 << 20, max_adapters=2)
    residents = ArenaResidents(arena)
    manager = SimpleNamespace(arena=arena, host=host, residents=residents, arena_evictions=5)

    def figures() -> dict[tuple[str, str], float]:
        samples = [sample for family in MemoryMetrics(1, manager).metrics() for sample in family.samples]
        assert {labels["worker"] for _, labels, _ in samples} == {"1"}
        return {(name, labels["tier"]): value for name, labels, value in samples}

    empty = figures()
    assert empty["loraserve:memory_used_bytes", "arena"] == empty["loraserve:memory_used_bytes", "host"] == 0
    assert empty["loraserve:memory_size_bytes", "arena"] == arena.nbytes
    assert empty["loraserve:memory_size_bytes", "host"] == 1 << 20
    for key in range(3):
        host.commit(host.create(key, "digest", (8, 8, 8, 8)))
    residents.reserve(1, layout.pages_for((8, 8, 8, 8)), 1)
    full = figures()
    assert full["loraserve:resident_adapters", "host"] == 2
    assert full["loraserve:evictions_total", "host"] == 1, "one too many for max_adapters"
    assert full["loraserve:evictions_total", "arena"] == 5
    assert full["loraserve:resident_adapters", "arena"] == 1
    assert full["loraserve:memory_used_bytes", "arena"] == residents.size_bytes(1) > 0
    assert full["loraserve:memory_used_bytes", "host"] == 2 * 4096, "whole extents"
