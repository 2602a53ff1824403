"""A peer's slab is mapped as it fills, and never made larger by that."""

from __future__ import annotations

import os

import pytest

from transfer.helpers import PATIENCE_S
from vllm_loraserve.memory.slab import HostSlab
from vllm_loraserve.transfer.rungs.samehost import MAP_AHEAD, _Mapping

BLOCKS = 4


def mapped_bytes(address: int) -> int:
    """Of the mapping that begins at `address`: what has been mapped."""
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith(f"{address:x}-"):
                return next(int(after.split()[1]) for after in lines if after.startswith("Rss:")) << 10
    raise AssertionError("no such mapping")


def taken_bytes(slab: HostSlab) -> int:
    return os.fstat(slab.fd).st_blocks * 512


@pytest.fixture
def slab():
    with HostSlab(BLOCKS * MAP_AHEAD, huge=False, pinned=False) as slab:
        yield slab


@pytest.fixture
def mapping(slab):
    mapping = _Mapping(slab.fd, slab.size)
    yield mapping
    mapping.close()


def fill(slab: HostSlab, first: int, count: int) -> None:
    slab.view(first * MAP_AHEAD, count * MAP_AHEAD)[:] = bytes([7]) * (count * MAP_AHEAD)


def test_what_the_peer_has_filled_is_mapped_and_the_rest_takes_no_memory(slab, mapping):
    fill(slab, 0, 1)
    slab.view(2 * MAP_AHEAD, 4096)[:] = b"x" * 4096  # a block that is not full yet
    taken = taken_bytes(slab)
    assert mapped_bytes(mapping.address) == 0
    mapping.tend()
    mapping.settle(PATIENCE_S)
    assert mapped_bytes(mapping.address) == MAP_AHEAD
    fill(slab, 2, 2)
    mapping.tend()
    mapping.settle(PATIENCE_S)
    assert mapped_bytes(mapping.address) == 3 * MAP_AHEAD
    assert taken_bytes(slab) == 3 * MAP_AHEAD > taken, "the hole is still one"


def test_a_kernel_that_can_not_is_asked_once(slab, mapping, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "vllm_loraserve.transfer.rungs.samehost.populate", lambda *args, **kwargs: bool(asked.append(args))
    )
    fill(slab, 0, BLOCKS)
    for _ in range(2):
        mapping.tend()
        mapping.settle(PATIENCE_S)
    assert len(asked) == 1


def test_a_mapping_that_is_closed_is_left_alone(slab):
    mapping = _Mapping(slab.fd, slab.size)
    fill(slab, 0, BLOCKS)
    mapping.tend()
    mapping.close()
    mapping.settle(PATIENCE_S)
    mapping.tend()
    assert mapping._thread is None
