"""memory/prefault.py: memory is there before it is used, its contents stay, and allocators tell how far they are."""

from __future__ import annotations

import os

import pytest

from vllm_loraserve.adapters.layout import ModuleShape, build_layout
from vllm_loraserve.memory import prefault
from vllm_loraserve.memory.host_tier import HostTier
from vllm_loraserve.memory.prefault import Prefault, populate
from vllm_loraserve.memory.slab import HostSlab

MIB = 1 << 20


def given(slab: HostSlab) -> int:
    """Bytes of memory that the system has given to a slab."""
    return os.fstat(slab.fd).st_blocks * 512


@pytest.fixture
def slab():
    made = HostSlab(32 * MIB, huge=False, pinned=False)
    assert given(made) == 0
    yield made
    made.close()


@pytest.fixture(autouse=True)
def kernel(slab) -> None:
    """Linux before 5.14 can't; there memory comes with the first write, as it always did."""
    if not populate(slab.address, 1):
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")


def test_populate_gives_memory_and_keeps_contents(slab):
    slab.view(5000, 3)[:] = b"abc"
    assert populate(slab.address + 4096, 3 * MIB)
    assert 3 * MIB <= given(slab) <= 3 * MIB + 8192
    assert bytes(slab.view(5000, 3)) == b"abc"


def test_so_much_is_touched_ahead_and_no_more(slab):
    ahead = Prefault([(slab.address, slab.size)], [6 * MIB])
    assert ahead.settle(60)
    assert (ahead.touched(), given(slab)) == (6 * MIB, 6 * MIB)
    ahead.used(0, 2 * MIB)
    assert ahead.settle(60)
    ahead.used(0, MIB)  # less than before: nothing new
    assert ahead.settle(60)
    assert given(slab) == 8 * MIB
    ahead.used(0, 31 * MIB)
    assert ahead.settle(60)
    assert ahead.touched() == slab.size, "never past the end"


def test_a_kernel_that_can_not_is_left_alone(slab, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(prefault, "populate", lambda address, size: asked.append(size) is not None)
    ahead = Prefault([(slab.address, slab.size)], [8 * MIB])
    assert ahead.settle(60)
    ahead.used(0, MIB)
    assert ahead.settle(60)
    assert len(asked) == 1


def test_a_system_without_threads_still_allocates(slab, monkeypatch):
    def none_left(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(prefault.threading.Thread, "start", none_left)
        ahead = Prefault([(slab.address, slab.size)], [MIB])
        ahead.used(0, MIB)
    ahead.used(0, 2 * MIB)
    assert ahead.settle(60)
    assert ahead.touched() == 3 * MIB


def layout():
    return build_layout(
        [ModuleShape("a", "a", 4096, (4096,)), ModuleShape("b", "b", 4096, (8192,))],
        model="tiny",
        dtype="float32",
        page_rows=8,
        tp_rank=0,
        tp_size=1,
    )


def test_the_host_tier_has_room_ready_for_the_next_adapter(slab):
    tier = HostTier(layout(), slab.size, slab=slab)
    tier.warm(2 * MIB)
    assert tier._prefault.settle(60)
    entry = tier.create(1, "sha", (8, 8))
    assert tier._prefault.settle(60)
    assert entry.offset + entry.size + 2 * MIB <= given(slab) < entry.offset + entry.size + 3 * MIB
