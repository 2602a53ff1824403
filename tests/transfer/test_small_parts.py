"""The parts that need no socket: rate limiter, lease table, handover, slab store."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.helpers import LAYOUT, PATIENCE_S, make_pages
from vllm_loraserve.transfer.flight import RateLimiter
from vllm_loraserve.transfer.handover import Handover
from vllm_loraserve.transfer.leases import LeaseTable
from vllm_loraserve.transfer.slab_store import SlabStore


@given(st.lists(st.integers(1, 5_000_000), min_size=1, max_size=60), st.floats(0.0, 0.5))
def test_no_window_of_the_limiter_exceeds_rate_and_burst(sizes, pause):
    now = [0.0]
    limiter = RateLimiter(10e6, burst=1 << 20, clock=lambda: now[0])
    history = []
    for size in sizes:
        now[0] += limiter.book(size)
        history.append((now[0], size))
        now[0] += pause
    for i in range(len(history)):
        for j in range(i, len(history)):
            moved = sum(size for _, size in history[i + 1 : j + 1])
            assert moved <= 10e6 * (history[j][0] - history[i][0]) + (1 << 20) + max(sizes) + 1


def test_no_limit_never_waits():
    assert RateLimiter(None).book(1 << 40) == 0.0
    assert RateLimiter(0.0).book(1 << 40) == 0.0


class CountingStore:
    def __init__(self) -> None:
        self.released: list[str] = []

    def release(self, pages) -> None:
        self.released.append(pages.name)


@pytest.fixture
def pages():
    with SlabStore(1 << 20) as store:
        yield store.put("a", make_pages(1, 2, 100), layout=LAYOUT)


def test_a_lease_ends_once_and_takes_its_registration_with_it_first(pages):
    table, store, order = LeaseTable(10.0), CountingStore(), []
    lease = table.open(1, store, 0, pages, now=0.0)
    lease.on_end = lambda: order.append(("deregistered", list(store.released)))
    table.end(lease)
    table.end(lease)
    assert not lease.end()
    assert order == [("deregistered", [])]
    assert store.released == ["a"]
    assert len(table) == 0


def test_leases_end_by_session_name_and_silence(pages):
    table, store = LeaseTable(10.0), CountingStore()
    for session in (1, 1, 2):
        table.open(session, store, 0, pages, now=0.0)
    assert table.end_session(1) == 2
    assert table.end_expired(9.9) == 0
    table.renew(2, 5.0)
    assert table.end_expired(14.9) == 0
    assert table.end_expired(15.1) == 1
    table.open(3, store, 0, pages, now=0.0)
    assert table.end_adapter("another") == 0
    assert table.end_adapter("a") == 1
    assert len(store.released) == 4


def test_revocation_waits_for_the_thread_that_is_sending(pages):
    table, store = LeaseTable(10.0), CountingStore()
    lease = table.open(1, store, 0, pages, now=0.0)
    assert lease.enter()
    ending = threading.Thread(target=lambda: table.end_adapter("a"))
    ending.start()
    while lease.enter():  # until the end has begun: then nobody new
        lease.leave()
    ending.join(0.1)
    assert ending.is_alive()
    assert store.released == []
    lease.leave()
    ending.join(PATIENCE_S)
    assert store.released == ["a"]


def test_revocation_interrupts_a_sender_that_can_be(pages):
    table, store = LeaseTable(10.0), CountingStore()
    lease = table.open(1, store, 0, pages, now=0.0)
    stopped = threading.Event()
    assert lease.enter(stopped.set)

    def send() -> None:
        assert stopped.wait(PATIENCE_S)
        lease.leave(stopped.set)

    sender = threading.Thread(target=send)
    sender.start()
    assert table.end_adapter("a") == 1
    sender.join()
    assert store.released == ["a"]


def test_giving_a_lease_back_lets_the_sender_finish(pages):
    """The reader may have every byte before the sender's thread has left: its connection must stay."""
    table, store = LeaseTable(10.0), CountingStore()
    lease = table.open(1, store, 0, pages, now=0.0)
    stopped = threading.Event()
    assert lease.enter(stopped.set)
    ending = threading.Thread(target=lambda: table.end(lease))
    ending.start()
    ending.join(0.1)
    assert not stopped.is_set()
    lease.leave(stopped.set)
    ending.join(PATIENCE_S)
    assert store.released == ["a"]


def test_a_failing_deregistration_still_unpins(pages):
    table, store = LeaseTable(10.0), CountingStore()
    lease = table.open(1, store, 0, pages, now=0.0)

    def fails() -> None:
        raise RuntimeError("no")

    lease.on_end = fails
    for _ in range(2):
        table.open(1, store, 0, pages, now=0.0)
    assert table.end_expired(11.0) == 3, "and keeps no other lease from ending"
    assert store.released == ["a"] * 3


def test_what_is_to_run_at_the_end_runs_where_the_lease_ended_meanwhile(pages):
    table, store, ran = LeaseTable(10.0), CountingStore(), []
    lease = table.open(1, store, 0, pages, now=0.0)
    assert lease.guard(lambda: ran.append("kept"))
    assert ran == []
    table.end(lease)
    assert ran == ["kept"]
    assert not lease.guard(lambda: ran.append("late"))
    assert ran == ["kept", "late"]


def test_handover_keeps_the_last_copy():
    handover = Handover()
    assert not handover.may_go("a", "sha")
    assert handover.may_go("a", "sha", checkpoint_readable=True)
    handover.located("a", "sha", ["two"])  # a copy that was not made from ours may itself rely on ours
    assert not handover.may_go("a", "sha")
    handover.landed("a", "sha", "two")
    assert handover.may_go("a", "sha")
    handover.located("a", "sha", ["three"])  # two has lost it since
    assert not handover.may_go("a", "sha")
    handover.located("a", "sha", ["two", "three"])
    assert handover.may_go("a", "sha")
    handover.forget("a")
    handover.located("a", "sha", ["two"])
    assert not handover.may_go("a", "sha")


def test_a_copy_of_other_content_under_the_name_confirms_nothing():
    """A peer's confirmation of the old content may come after the new has landed here."""
    handover = Handover()
    handover.located("a", "new", ["two"])
    handover.landed("a", "old", "two")
    assert not handover.may_go("a", "new")
    handover.landed("a", "new", "two")
    assert handover.may_go("a", "new")
    handover.located("a", "newer", ["two"])
    assert not handover.may_go("a", "new")


@given(st.lists(st.tuples(st.sampled_from(["copy", "table", "evict"]), st.integers(0, 3), st.integers(0, 3))))
def test_whatever_instances_hear_and_when_one_copy_stays(events):
    """Instances that copy from each other, hear of tables that may be old, and evict whatever they may."""
    names = ["zero", "one", "two", "three"]
    handovers = [Handover() for _ in names]
    holds = [True, False, False, False]
    tables = [list(holds)]
    for what, i, j in events:
        if what == "copy" and holds[i] and not holds[j]:
            holds[j] = True
            handovers[i].landed("a", "sha", names[j])
        elif what == "table":
            tables.append(list(holds))
            for k, handover in enumerate(handovers):
                held = tables[-1 - (j % len(tables))]
                handover.located("a", "sha", [name for n, name in enumerate(names) if held[n] and n != k])
        elif what == "evict" and holds[i] and handovers[i].may_go("a", "sha"):
            holds[i] = False
            handovers[i].forget("a")
        assert any(holds)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 6), st.integers(1, 9000)), max_size=25))
def test_the_slab_store_never_loses_or_overlaps_memory(steps):
    with SlabStore(1 << 16, max_range=7000) as store:
        held: dict[str, list[bytes]] = {}
        for name, count, size in steps:
            pages = [bytes([len(held) + i]) * size for i in range(count)]
            try:
                store.put(name, pages, layout=LAYOUT)
                held[name] = pages
            except MemoryError:
                if store.drop(name):
                    del held[name]
            for other, content in held.items():
                assert store.bytes_of(other) == b"".join(content)
            used = sum(p.size for p in store.catalogue())
            assert store.free_bytes == store.slab.size - used
        for name in held:
            store.drop(name)
        assert len(store._free) == 1
