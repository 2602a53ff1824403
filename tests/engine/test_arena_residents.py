"""engine/arena_residents.py: every page has one owner, and just as many adapters go as another one needs."""

from __future__ import annotations

import pytest
import torch

from vllm_loraserve.adapters.layout import Layout, ModuleShape, build_layout
from vllm_loraserve.engine.arena_residents import ArenaFullError, ArenaResidents
from vllm_loraserve.memory.arena import Arena


@pytest.fixture
def residents() -> ArenaResidents:
    """Six pages of four rank rows in each of two groups."""
    layout = build_layout(
        [ModuleShape("a", "a", 16, (16,)), ModuleShape("b", "b", 24, (16,))],
        model="tiny",
        dtype="float32",
        page_rows=4,
        tp_rank=0,
        tp_size=1,
    )
    return ArenaResidents(Arena(layout, 24, torch.device("cpu")))


def bring(residents: ArenaResidents, lora_id: int, needed: tuple[int, int], generation: int = 1) -> list[list[int]]:
    layout: Layout = residents.arena.layout
    sources = [
        torch.full((count, layout.groups[group].page_elements), float(lora_id)) if count else None
        for group, count in enumerate(needed)
    ]
    pages = residents.reserve(lora_id, needed, generation)
    residents.arena.write(pages, sources)
    return pages


def test_pages_come_in_and_go(residents: ArenaResidents) -> None:
    pages = bring(residents, 7, (2, 1))
    assert (residents.arena.group_pages(0)[pages[0]] == 7).all()
    layout = residents.arena.layout
    assert residents.size_bytes(7) == 2 * layout.page_bytes(0) + layout.page_bytes(1)
    assert residents.is_current(7, 1)
    assert not residents.is_current(7, 2), "the host tier holds a later one"
    residents.check_integrity({7})
    with pytest.raises(AssertionError, match="not active"):
        residents.check_integrity({8})
    residents.release(7)
    residents.release(7)
    assert residents.arena.free_pages() == (6, 6)
    assert (residents.size_bytes(7), residents.is_current(7, 1)) == (0, False)
    residents.check_integrity(())


def test_only_who_helps_has_to_go(residents: ArenaResidents) -> None:
    bring(residents, 1, (0, 2))
    bring(residents, 2, (3, 1))
    bring(residents, 3, (3, 1))
    assert residents.to_evict(9, (0, 2), [1, 2, 3]) == []
    assert residents.to_evict(9, (2, 0), [1, 2, 3]) == [2], "1 holds nothing in the full group"
    assert residents.to_evict(9, (4, 3), [3, 1, 2]) == [3, 2]
    with pytest.raises(ArenaFullError, match=r"LoRA 9 needs 16 rank rows .* the arena has 24"):
        residents.to_evict(9, (4, 0), [1, 2])
    assert residents.arena.free_pages() == (0, 2), "nothing has changed"


def test_an_adapter_larger_than_the_arena_is_told_so(residents: ArenaResidents) -> None:
    assert residents.capacity_problem((6, 0)) is None
    assert "28 rank rows and the arena has 24" in str(residents.capacity_problem((1, 7)))
    assert residents.capacity_problem((2, 1), beside=2) is None
    problem = str(residents.capacity_problem((3, 1), beside=2))
    assert "12 rank rows and the arena has 24, which 3 adapters share (--max-loras); raise" in problem


def test_warm_up_adapters_share_zeros(residents: ArenaResidents) -> None:
    residents.arena.flat.fill_(float("nan"))
    zeros = residents.zeros((2, 2))
    assert residents.zeros((2, 2)) is zeros
    assert not residents.arena.group_pages(1)[zeros[1]].any()
    residents.check_integrity(())
    bring(residents, 1, (4, 4))
    residents.release_zeros()
    residents.release_zeros()
    assert residents.arena.free_pages() == (2, 2)
    residents.check_integrity({1})


@pytest.mark.vllm
def test_without_a_channel_no_adapter_takes_more_than_its_part(residents: ArenaResidents) -> None:
    """Over several machines the scheduler counts slots alone: what fits by count must fit by rank rows, too."""
    from types import SimpleNamespace
    from typing import Any

    from vllm_loraserve.adapters.errors import AdapterError
    from vllm_loraserve.engine.lora_manager import LoRAServeWorkerManager, adapters_beside
    from vllm_loraserve.engine.pending_copies import PendingCopies

    def config(nodes: int) -> Any:
        parallel = SimpleNamespace(nnodes=nodes, data_parallel_index=0)
        return SimpleNamespace(parallel_config=parallel, instance_id="x")

    assert adapters_beside(config(1), slots=2) == 0
    assert adapters_beside(config(2), slots=2) == 1

    manager: Any = object.__new__(LoRAServeWorkerManager)
    manager.device = torch.device("cpu")
    manager._adapter_manager = SimpleNamespace(residents=residents, copies=PendingCopies())
    manager._beside = adapters_beside(config(2), slots=2)
    assert manager._capacity_problem((3, 3)) is None
    assert "share" in manager._capacity_problem((4, 0))
    manager.peers = SimpleNamespace(bring=lambda request: SimpleNamespace(pages=(4, 0)))
    with pytest.raises(AdapterError, match="'big' does not fit: it takes 16 rank rows"):
        manager.prepare(SimpleNamespace(lora_name="big"))
