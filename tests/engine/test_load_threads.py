"""Threads that load: places, order, loads that hang, results that nobody wants any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

pytestmark = pytest.mark.vllm

LONG = 600.0


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Jobs:
    """Loads that end when they are told to."""

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.began: list[str] = []
        self.ended: list[str] = []
        self.dropped: list[str] = []
        self.refused: list[str] = []

    def start(self, threads: object, name: str, adapter: int, path: str = "/a", queued: bool = False) -> None:
        from vllm_loraserve.engine.load_threads import SupersededError, ensure_wanted

        gate = self.gates[name] = threading.Event()

        def run() -> None:
            self.began.append(name)
            gate.wait(120)
            try:
                ensure_wanted()
                self.ended.append(name)
            except SupersededError:
                self.dropped.append(name)

        threads.start(adapter, path, run, lambda _: self.refused.append(name), queued=queued)  # type: ignore[attr-defined]


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    for gate in jobs.gates.values():
        gate.set()


def test_queued_loads_wait_for_a_place_in_order_and_ordered_ones_do_not(jobs: Jobs) -> None:
    from vllm_loraserve.engine.load_threads import LoadThreads

    threads = LoadThreads(2, LONG)
    for number in range(4):
        jobs.start(threads, f"q{number}", number, queued=True)
    until(lambda: len(jobs.began) == 2)
    jobs.start(threads, "ordered", 9)
    until(lambda: "ordered" in jobs.began)
    assert set(jobs.began) == {"q0", "q1", "ordered"}
    jobs.gates["ordered"].set()
    jobs.gates["q1"].set()
    until(lambda: "q2" in jobs.began)
    assert "q3" not in jobs.began
    for gate in jobs.gates.values():
        gate.set()
    until(lambda: len(jobs.ended) == 5)
    jobs.start(threads, "later", 1, queued=True)
    until(lambda: "later" in jobs.began)


def test_a_load_nobody_waits_for_begins_when_no_ordered_one_runs(jobs: Jobs) -> None:
    from vllm_loraserve.engine.load_threads import LoadThreads

    threads = LoadThreads(2, LONG)
    jobs.start(threads, "first", 1)
    jobs.start(threads, "ahead", 2, queued=True)
    jobs.start(threads, "second", 3)
    until(lambda: len(jobs.began) == 2)
    jobs.gates["first"].set()
    until(lambda: jobs.ended == ["first"])
    with threads._changed:  # the queue's thread has looked since: it decides under this lock
        assert threads._until_place() > 0
    assert "ahead" not in jobs.began
    jobs.gates["second"].set()
    until(lambda: "ahead" in jobs.began)
    assert jobs.ended == ["first", "second"]


def test_an_ordered_load_that_hangs_holds_up_no_prefetch(jobs: Jobs) -> None:
    from vllm_loraserve.engine.load_threads import LoadThreads

    threads = LoadThreads(1, 0.05)
    jobs.start(threads, "hangs", 1)
    jobs.start(threads, "ahead", 2, queued=True)
    until(lambda: "ahead" in jobs.began)
    assert "hangs" not in jobs.ended


def test_loads_that_hang_give_their_places_back(jobs: Jobs) -> None:
    from vllm_loraserve.engine.load_threads import LoadThreads

    threads = LoadThreads(1, 0.05)
    for number in range(5):
        jobs.start(threads, f"q{number}", number, queued=True)
    until(lambda: len(jobs.began) == 5)
    assert threads.hung >= 4
    for gate in jobs.gates.values():
        gate.set()
    until(lambda: threads.hung == 0)
    assert len(jobs.ended) == 5, "late, and nobody has asked for anything else"


def test_of_one_adapter_few_loads_hang_and_others_go_on(jobs: Jobs) -> None:
    from vllm_loraserve.engine.load_threads import HUNG_EACH, LoadThreads

    threads = LoadThreads(1, 0.02)
    for number in range(HUNG_EACH):
        jobs.start(threads, f"r{number}", 1)
        until(lambda number=number: threads.hung == number + 1)
    jobs.start(threads, "more", 1)
    assert jobs.refused == ["more"]
    assert not threads.pending(1, "/a")
    jobs.start(threads, "other", 2)
    until(lambda: "other" in jobs.began)
    for gate in jobs.gates.values():
        gate.set()
    until(lambda: threads.hung == 0)
    jobs.start(threads, "again", 1)
    until(lambda: "again" in jobs.began)


def test_the_number_of_hanging_threads_is_bounded(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_loraserve.engine import load_threads

    monkeypatch.setattr(load_threads, "HUNG_MOST", 3)
    threads = load_threads.LoadThreads(1, 0.02)
    for number in range(3):
        jobs.start(threads, f"h{number}", number)
    until(lambda: threads.hung == 3)
    jobs.start(threads, "ordered", 7)
    jobs.start(threads, "queued", 8, queued=True)
    until(lambda: len(jobs.refused) == 2)
    jobs.gates["h0"].set()
    until(lambda: threads.hung == 2)
    jobs.start(threads, "now", 7)
    until(lambda: "now" in jobs.began)


def test_what_an_earlier_load_brings_late_is_dropped(jobs: Jobs) -> None:
    from vllm_loraserve.engine.load_threads import LoadThreads

    threads = LoadThreads(1, LONG)
    jobs.start(threads, "old", 1, "/old")
    jobs.start(threads, "new", 1, "/new")
    until(lambda: len(jobs.began) == 2)
    assert threads.pending(1, "/new")
    assert not threads.pending(1, "/old")
    jobs.gates["new"].set()
    until(lambda: jobs.ended == ["new"])
    jobs.gates["old"].set()
    until(lambda: jobs.dropped == ["old"])
    jobs.start(threads, "removed", 1, "/new")
    until(lambda: "removed" in jobs.began)
    threads.supersede(1)
    jobs.gates["removed"].set()
    until(lambda: jobs.dropped == ["old", "removed"])


def test_a_queued_load_that_was_replaced_does_not_run(jobs: Jobs) -> None:
    from vllm_loraserve.engine.load_threads import LoadThreads

    threads = LoadThreads(1, LONG)
    jobs.start(threads, "first", 1, queued=True)
    jobs.start(threads, "waits", 2, queued=True)
    until(lambda: jobs.began == ["first"])
    jobs.start(threads, "ordered", 2)
    jobs.gates["first"].set()
    until(lambda: jobs.refused == ["waits"])
    assert "waits" not in jobs.began


def test_a_system_without_threads_refuses_and_the_next_load_runs(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_loraserve.engine.load_threads import LoadThreads

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads = LoadThreads(1, LONG)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError):
            jobs.start(threads, "queued", 1, queued=True)
        assert not threads.pending(1, "/a")
        jobs.start(threads, "ordered", 2)
        assert jobs.refused == ["ordered"]
    jobs.start(threads, "again", 1, queued=True)
    until(lambda: jobs.began == ["again"])
