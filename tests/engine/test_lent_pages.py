"""engine/lent_pages.py: slots read host pages until the arena has them, and never pages that are given up."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

from vllm_loraserve.adapters.layout import ALIGN_BYTES, ModuleShape, build_layout
from vllm_loraserve.engine import lent_pages
from vllm_loraserve.engine.lent_pages import LentPages
from vllm_loraserve.engine.paged_layers import SlotTables
from vllm_loraserve.kernels import cpu_native, cpu_paged
from vllm_loraserve.kernels.grouping import group_by_slot
from vllm_loraserve.kernels.paged import PagedLinear, reference_linear
from vllm_loraserve.memory.arena import Arena
from vllm_loraserve.memory.host_tier import HostTier

PATIENCE_S = 60.0
CPU = torch.device("cpu")


class Kernels:
    """Idle when the test says so; counts how often it was asked."""

    def __init__(self) -> None:
        self.idle_now = True
        self.asked = 0

    @property
    def idle(self) -> bool:
        self.asked += 1
        return self.idle_now


class Bench:
    """Two slots, an arena of six pages of four rank rows, a host tier."""

    def __init__(self) -> None:
        self.layout = build_layout(
            [ModuleShape("a", "a", 16, (16,))], model="tiny", dtype="float32", page_rows=4, tp_rank=0, tp_size=1
        )
        self.host = HostTier(self.layout, 1 << 20)
        self.arena = Arena(self.layout, 24, CPU, finely=True)
        self.arena.flat.fill_(float("nan"))
        self.tables = SlotTables(self.layout, 2, 24, CPU)
        self.kernels = Kernels()
        self.lent = LentPages(self.arena, self.tables, self.kernels)

    def prepare(self, lora_id: int, pages: int) -> None:
        entry = self.host.create(lora_id, "", [4 * pages])
        (target,) = self.host.targets(entry)
        assert target is not None
        target.copy_(torch.randn(target.shape, generator=torch.Generator().manual_seed(lora_id)))
        self.host.commit(entry)

    def lend(self, lora_id: int, slot: int) -> list[list[int]]:
        """As activation does it; the adapter's pages in the arena."""
        with ExitStack() as reading:
            entry = reading.enter_context(self.host.reading(lora_id))
            assert entry is not None
            numbers = self.lent.numbers(self.host, entry)
            assert numbers is not None
            pages = self.arena.allocate(entry.pages, lora_id)
            assert pages is not None
            self.tables.set(slot, numbers, entry.ranks)
            self.lent.lend(lora_id, slot, pages, self.host.targets(entry), reading.pop_all())
        return pages

    def users(self, lora_id: int) -> int:
        entry = self.host.get(lora_id)
        assert entry is not None
        return entry.users

    def linear(self) -> PagedLinear:
        group = self.layout.groups[0]
        (place,) = group.places
        return PagedLinear(
            arena=self.arena.group_flat(0),
            page_table=self.tables.page_tables[0],
            ranks=self.tables.ranks,
            page_stride=self.arena.stride(0),
            page_elements=group.page_elements,
            page_rows=4,
            a_offsets=(place.a_offset,),
            b_offsets=(place.b_offset,),
            in_size=place.in_size,
            out_sizes=(place.out_size,),
        )

    def in_arena(self, slot: int, pages: list[list[int]]) -> bool:
        count = len(pages[0])
        return self.tables.page_tables[0][slot, :count].tolist() == self.arena.numbers(pages)[0]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(lent_pages, "COPY_AFTER_S", 0.0)
    return Bench()


def run(bench: Bench, x: torch.Tensor, slots: list[int]) -> list[torch.Tensor]:
    """y of every kernel there is, for these slots."""
    groups, linear, found = group_by_slot(np.array(slots, np.int32)), bench.linear(), []
    y = torch.zeros(len(slots), 16)
    cpu_paged.linear(y, x, linear, groups)
    found.append(y)
    library = cpu_native.load()
    if library is not None:
        y = torch.zeros(len(slots), 16)
        assert library.linear(y, x, cpu_native.NativeLayer(linear), cpu_native.NativeBatch(groups))
        found.append(y)
    return found


def test_kernels_give_the_same_from_either_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent_pages, "COPY_AFTER_S", PATIENCE_S)
    x = torch.randn(4, 16)
    bench.prepare(7, 2)
    bench.prepare(8, 3)
    pages = {7: bench.lend(7, 0), 8: bench.lend(8, 1)}
    before = run(bench, x, [0, 1, 1, 0])
    assert not bench.in_arena(0, pages[7])
    monkeypatch.setattr(lent_pages, "COPY_AFTER_S", 0.0)
    with bench.lent._changed:
        bench.lent._changed.notify_all()
    assert bench.lent.settle(PATIENCE_S)
    assert bench.in_arena(0, pages[7])
    assert bench.in_arena(1, pages[8])
    after = run(bench, x, [0, 1, 1, 0])
    linear = bench.linear()
    assert linear.page_stride * 4 == ALIGN_BYTES
    expected = reference_linear(torch.zeros(4, 16), x, linear, torch.tensor([0, 1, 1, 0]))
    for one in (*before, *after):
        torch.testing.assert_close(one.double(), expected, rtol=1e-4, atol=1e-4)
    assert (bench.users(7), bench.users(8)) == (0, 0)


def test_host_pages_stay_while_a_kernel_may_still_read_them(bench: Bench) -> None:
    bench.prepare(7, 2)
    bench.kernels.idle_now = False
    pages = bench.lend(7, 0)
    while bench.kernels.asked < 3:
        threading.Event().wait(1e-3)
    assert bench.in_arena(0, pages), "the tables name the arena's pages by now"
    assert bench.users(7) == 1
    bench.kernels.idle_now = True
    assert bench.lent.settle(PATIENCE_S)
    assert bench.users(7) == 0
    (target,) = bench.host.targets(bench.host.get(7))  # type: ignore[arg-type]
    assert torch.equal(bench.arena.group_pages(0)[pages[0]], target)


def test_a_slot_that_is_given_up_is_not_written_to(bench: Bench) -> None:
    bench.prepare(7, 2)
    began, go = threading.Event(), threading.Event()
    write = bench.arena.write

    def slow(*args: Any) -> None:
        began.set()
        assert go.wait(PATIENCE_S)
        write(*args)

    bench.arena.write = slow  # type: ignore[method-assign]
    pages = bench.lend(7, 0)
    assert began.wait(PATIENCE_S)
    ended: list[int] = []

    def end() -> None:
        bench.lent.end(7)
        ended.append(bench.users(7))

    thread = threading.Thread(target=end)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), "its arena pages are being written to"
    bench.tables.page_tables[0][0] = -1
    go.set()
    thread.join(PATIENCE_S)
    assert ended == [0]
    assert bench.tables.page_tables[0][0].unique().tolist() == [-1]
    assert len(pages[0]) == 2


def test_what_ends_before_its_copy_is_not_copied(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent_pages, "COPY_AFTER_S", PATIENCE_S)
    bench.prepare(7, 2)
    pages = bench.lend(7, 0)
    bench.lent.end(7)
    bench.lent.end(7)
    assert bench.lent.settle(PATIENCE_S)
    assert bench.users(7) == 0
    assert bench.arena.group_pages(0)[pages[0]].isnan().all()


def test_an_adapter_that_comes_back_is_lent_anew(bench: Bench) -> None:
    bench.prepare(7, 2)
    for _ in range(20):
        pages = bench.lend(7, 1)
        bench.lent.end(7)
        bench.arena.free(pages, 7)
    pages = bench.lend(7, 1)
    assert bench.lent.settle(PATIENCE_S)
    assert bench.in_arena(1, pages)
    bench.arena.check_integrity()


def test_pages_that_tables_can_not_name_are_copied_first() -> None:
    bench = Bench()
    assert bench.arena.numbers_at(bench.arena.flat.data_ptr() + 8, (1,)) is None
    assert bench.arena.numbers_at(bench.arena.flat.data_ptr() + 2**50, (1,)) is None
    coarse = Arena(bench.layout, 24, CPU)
    assert coarse.numbers_at(coarse.flat.data_ptr(), (1,)) is None
    assert coarse.numbers([[2, 5]]) == [[2, 5]]
    assert bench.arena.numbers_at(bench.arena.flat.data_ptr(), (2,)) == bench.arena.numbers([[0, 1]])


@pytest.mark.skipif(cpu_native.load() is None, reason="the native library is not built")
def test_the_library_knows_whether_it_reads() -> None:
    library = cpu_native.load()
    assert library is not None
    assert library.idle
    with library.reading():
        assert not library.idle
    assert library.idle
