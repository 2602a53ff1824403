"""memory/arena.py: pages in every group, whole-page copies, and how big it is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_loraserve.adapters.layout import Layout, ModuleShape, build_layout
from vllm_loraserve.memory.arena import Arena, ArenaError, arena_rank_rows


@pytest.fixture
def layout() -> Layout:
    return build_layout(
        [ModuleShape("a", "a", 16, (16, 8)), ModuleShape("b", "b", 24, (16,))],
        model="tiny",
        dtype="float32",
        page_rows=4,
        tp_rank=0,
        tp_size=1,
    )


def test_pages_go_in_whole_and_stay_apart(layout: Layout) -> None:
    arena = Arena(layout, 24, torch.device("cpu"))
    assert (arena.rank_rows, arena.pages_per_group, arena.free_pages()) == (24, 6, (6, 6))
    assert arena.nbytes == 6 * layout.bytes_per_page_set
    held = {}
    for owner, counts in (("x", (2, 1)), ("y", (0, 3)), ("z", (3, 2))):
        pages = arena.allocate(counts, owner)
        assert pages is not None
        held[owner] = pages
    assert arena.allocate((2, 0), "w") is None
    assert arena.free_pages() == (1, 0)
    arena.free(held.pop("x"), "x")
    pages = arena.allocate((3, 1), "w")
    assert pages is not None
    held["w"] = pages
    sources = {
        owner: [
            torch.full((len(mine), layout.groups[g].page_elements), ord(owner) + g)
            + torch.arange(len(mine))[:, None] / 8
            if mine
            else None
            for g, mine in enumerate(pages)
        ]
        for owner, pages in held.items()
    }
    for owner, pages in held.items():
        arena.write(pages, sources[owner])
    for owner, pages in held.items():
        for g, mine in enumerate(pages):
            source = sources[owner][g]
            if source is not None:
                assert torch.equal(arena.group_pages(g)[mine], source)
    arena.zero(held["w"])
    assert not arena.group_pages(0)[held["w"][0]].any()
    assert torch.equal(arena.group_pages(1)[held["y"][1]], sources["y"][1])  # type: ignore[arg-type]
    arena.check_integrity()


def test_host_memory_is_taken_at_once(layout: Layout) -> None:
    """vLLM's CPU worker sizes the KV cache by what this process has resident."""
    arena = Arena(layout, 8192, torch.device("cpu"))
    assert arena.slab is not None
    maps = Path("/proc/self/smaps").read_text()
    inside = maps.split(f"\n{arena.slab.address:08x}-", 1)[1].split("\nVmFlags", 1)[0]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in inside.splitlines() if line.endswith(" kB")}
    resident = sizes["Rss"] + sizes.get("Private_Hugetlb", 0) + sizes.get("Shared_Hugetlb", 0)
    assert resident * 1024 >= arena.nbytes > 1 << 20


def test_groups_share_one_allocation(layout: Layout) -> None:
    arena = Arena(layout, 8, torch.device("cpu"))
    assert arena.slab is not None
    for group in range(2):
        start = arena.slab.address + arena.group_offset(group)
        assert arena.group_flat(group).data_ptr() == start
    end = arena.group_offset(1) + arena.group_flat(1).nbytes
    assert end == arena.nbytes


def test_sizes(layout: Layout) -> None:
    page_set = layout.bytes_per_page_set
    size = lambda **o: arena_rank_rows(  # noqa: E731
        layout, **{"gib": None, "rank_rows": None, "stock_bytes": 10 * page_set + 1, "max_rank_seen": 8} | o
    )
    assert size() == 40
    assert size(gib=3.5 * page_set / 2**30) == 12
    assert size(rank_rows=13) == 16
    assert size(rank_rows=40, most_bytes=6 * page_set) == 24
    assert size(rank_rows=40, most_bytes=60 * page_set) == 40
    assert size(rank_rows=40, most_bytes=0) == 8, "one adapter of --max-lora-rank"
    assert size(max_rank_seen=64) == 64, "one adapter of --max-lora-rank always fits by default"
    with pytest.raises(ArenaError, match="one size"):
        size(gib=1, rank_rows=8)
    with pytest.raises(ArenaError, match="arena_gib"):
        Arena(layout, 3, torch.device("cpu"))


def test_a_model_without_paged_modules_has_an_arena_of_no_bytes() -> None:
    empty = build_layout([], model="tiny", dtype="float32", page_rows=4, tp_rank=0, tp_size=1)
    asked = {"gib": None, "rank_rows": None, "stock_bytes": 0, "max_rank_seen": 6}
    rows = arena_rank_rows(empty, **asked)  # type: ignore[arg-type]
    arena = Arena(empty, rows, torch.device("cpu"))
    assert (arena.rank_rows, arena.nbytes, arena.free_pages()) == (8, 0, ())
    assert arena.allocate((), "x") == []
    arena.check_integrity()
