"""memory/allocator.py: no page is lost or held twice under any sequence of operations."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_loraserve.memory.allocator import ExtentAllocator, PageAllocator


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 20), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_pages_have_one_owner(n_pages: int, steps: list[tuple[bool, int]]) -> None:
    allocator = PageAllocator(n_pages)
    held: dict[int, list[int]] = {}
    for owner, (take, count) in enumerate(steps):
        if take or not held:
            free = allocator.free_pages
            pages = allocator.allocate(count, owner)
            assert (pages is None) == (count > free), "n free pages serve any request for n"
            if pages is not None:
                assert len(pages) == count
                held[owner] = pages
        else:
            who = list(held)[count % len(held)]
            assert allocator.owned_by(who) == sorted(held[who])
            allocator.free(held.pop(who), who)
        allocator.check_integrity()
        taken = [page for pages in held.values() for page in pages]
        assert len(set(taken)) == len(taken) == n_pages - allocator.free_pages


def test_only_the_owner_frees_and_only_once() -> None:
    allocator = PageAllocator(4)
    pages = allocator.allocate(2, "a")
    assert pages is not None
    for wrong, owner in ((pages, "b"), ([pages[0], pages[0]], "a"), ([3 if 3 not in pages else 0], "a")):
        with pytest.raises(ValueError, match="not owned"):
            allocator.free(wrong, owner)
        allocator.check_integrity()
    allocator.free(pages, "a")
    with pytest.raises(ValueError, match="not owned"):
        allocator.free(pages, "a")
    assert allocator.free_pages == 4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 900)), max_size=60))
def test_extents_never_overlap_and_join_again(steps: list[tuple[bool, int]]) -> None:
    allocator = ExtentAllocator(4096, align=64)
    held: dict[int, int] = {}
    for take, size in steps:
        if take or not held:
            offset = allocator.allocate(size)
            if offset is not None:
                end = offset + allocator.rounded(size)
                assert end <= 4096
                for other, length in held.items():
                    assert end <= other or other + allocator.rounded(length) <= offset
                held[offset] = size
        else:
            offset = sorted(held)[size % len(held)]
            allocator.free(offset, held.pop(offset))
        allocator.check_integrity()
    for offset, size in held.items():
        allocator.free(offset, size)
    assert allocator.allocate(4096) == 0, "everything was given back and joined"


def test_an_extent_is_freed_once() -> None:
    allocator = ExtentAllocator(4096, align=64)
    offset = allocator.allocate(100)
    assert offset is not None
    allocator.free(offset, 100)
    with pytest.raises(ValueError, match="free already"):
        allocator.free(offset, 100)
