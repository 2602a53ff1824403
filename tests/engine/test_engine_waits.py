"""How an engine's processes wait: for loads in the engine core, for each other's messages on a CPU."""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import zmq  # noqa: E402
from fake_workers import Clock  # noqa: E402
from scheduler_harness import make_request, settled_step, step  # noqa: E402
from vllm.distributed.device_communicators import shm_broadcast  # noqa: E402

from vllm_loraserve import plugin  # noqa: E402
from vllm_loraserve.config import LoRAServeConfig  # noqa: E402
from vllm_loraserve.engine import engine_waits, scheduler  # noqa: E402

LONG_S = 60.0
"""Used up by a defect only: what waits so long is woken."""
SOON_S = LONG_S / 2


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a scheduler sets the process's seconds of polling."""
    monkeypatch.setattr(engine_waits, "_poll_s", None)


def later(act: Callable[[], Any]) -> threading.Timer:
    """Acts when whoever waits has most likely begun to; the tests hold where that is not so, too."""
    timer = threading.Timer(0.05, act)
    timer.start()
    return timer


# ---- the doorbell ----


def rings(bell: engine_waits.Doorbell) -> bool:
    poller = zmq.Poller()
    poller.register(bell.fd, zmq.POLLIN)
    return bool(poller.poll(0))


def test_the_doorbell_rings_until_it_is_answered() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    bell = engine_waits.Doorbell(requests)
    assert not rings(bell)
    bell.answer()
    requests.put_nowait("a")
    assert rings(bell)
    requests.put_nowait("b")
    bell.answer()
    assert not rings(bell), "one answer for all that came"
    assert [requests.get_nowait(), requests.get_nowait()] == ["a", "b"]
    requests.put_nowait("c")
    assert rings(bell)


def test_the_doorbell_rings_when_the_item_is_there() -> None:
    """The other way round an answer could come between the two, and the item would wait unheard."""
    seen: list[bool] = []

    class Watched(queue.Queue):  # type: ignore[type-arg]
        def put_nowait(self, item: Any) -> None:
            seen.append(rings(bell))
            super().put_nowait(item)

    bell = engine_waits.Doorbell(requests := Watched())
    requests.put_nowait("a")
    assert seen == [False]
    assert rings(bell)


# ---- the scheduler's wait ----


@pytest.fixture
def waiting(build: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any, queue.Queue[Any], list[float]]]:
    """(scheduler, workers, the engine core's queue, seconds of each wait); its only request waits for adapter 1, and
    the next look at loads is due after `LONG_S`."""
    monkeypatch.setattr(scheduler, "LOADS_EVERY_S", LONG_S)
    made, workers = build()
    requests: queue.Queue[Any] = queue.Queue()
    waits = spy(made, monkeypatch)
    made.wait_for_loads(requests)
    workers.hold(1)
    made.add_request(make_request("a", adapter=1, max_tokens=3))
    settled_step(made)
    assert waits == []
    yield made, workers, requests, waits
    workers.release(1)


def spy(made: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each wait that the scheduler begins from now on."""
    waits: list[float] = []
    wait = made._end.wait

    def watched(timeout_s: float, descriptor: int | None = None) -> None:
        waits.append(timeout_s)
        wait(timeout_s, descriptor)

    monkeypatch.setattr(made._end, "wait", watched)
    return waits


def test_no_wait_where_no_load_is_waited_for(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = build()
    requests: queue.Queue[Any] = queue.Queue()
    waits = spy(made, monkeypatch)
    made.add_request(make_request("a", max_tokens=3))
    while made.requests:
        made.wait_for_loads(requests)
        step(made)
    made.wait_for_loads(requests)
    assert waits == []


def test_no_wait_without_workers_to_wait_for(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines over several machines load in the step."""
    made, _ = build()
    requests: queue.Queue[Any] = queue.Queue()
    with monkeypatch.context() as alone:
        alone.setattr(made, "_end", None)
        made.wait_for_loads(requests)
    assert made._doorbell is None


def test_a_report_ends_the_wait(waiting: Any) -> None:
    made, workers, requests, waits = waiting
    begin = time.monotonic()
    release = later(lambda: workers.release(1))
    made.wait_for_loads(requests)
    output, _ = step(made)
    release.join()
    assert list(output.num_scheduled_tokens) == ["a"], "the report was there when the wait ended"
    assert time.monotonic() - begin < SOON_S
    assert waits == [LONG_S], "the step does not wait once more"
    made.wait_for_loads(requests)
    assert waits == [LONG_S], "something runs"


def test_a_request_ends_the_wait(waiting: Any) -> None:
    made, _, requests, waits = waiting
    begin = time.monotonic()
    put = later(lambda: requests.put_nowait("b"))
    made.wait_for_loads(requests)
    put.join()
    assert requests.qsize() == 1
    assert time.monotonic() - begin < SOON_S
    assert waits == [LONG_S]
    made.wait_for_loads(requests)
    step(made)
    assert waits == [LONG_S], "a request that nobody has taken yet is not waited over, nor by the step"


def test_what_was_taken_no_longer_rings(waiting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, requests, _ = waiting
    requests.put_nowait("b")
    requests.get_nowait()
    monkeypatch.setattr(scheduler, "LOADS_EVERY_S", 0.05)
    begin = time.monotonic()
    made.wait_for_loads(requests)
    assert time.monotonic() - begin >= 0.04


def test_loads_are_looked_at_when_nothing_comes(waiting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, requests, waits = waiting
    monkeypatch.setattr(scheduler, "LOADS_EVERY_S", 0.05)
    begin = time.monotonic()
    made.wait_for_loads(requests)
    assert 0.04 <= time.monotonic() - begin < SOON_S
    assert waits == [0.05]


def test_what_nobody_reports_is_looked_at_often(waiting: Any) -> None:
    made, _, requests, waits = waiting
    made.add_request(make_request("b", grammar=Future()))
    made.wait_for_loads(requests)
    assert waits == [scheduler.LOADS_POLL_S]


def test_a_step_that_was_not_waited_for_waits_itself(waiting: Any) -> None:
    """As with batches in flight, of which async scheduling always has one: the doorbell is there, nobody hears it."""
    made, _, requests, waits = waiting
    assert made._doorbell is not None
    for _ in range(2):
        step(made)
    assert waits == [scheduler.LOADS_POLL_S] * 2
    requests.put_nowait("b")
    made.wait_for_loads(requests)
    step(made)
    assert len(waits) == 2
    step(made)
    assert waits == [scheduler.LOADS_POLL_S] * 3, "one wait for one step"


# ---- where the engine core lets it wait ----


def engine_core(events: list[Any], **changed: Any) -> Any:
    has: dict[str, Any] = {
        "scheduler": SimpleNamespace(wait_for_loads=events.append),
        "input_queue": "the queue",
        "engines_running": False,
        "batch_queue": None,
        "is_running": lambda: True,
    }
    return SimpleNamespace(**{**has, **changed})


@pytest.mark.parametrize(
    ("changed", "waits"),
    [
        ({}, True),
        ({"batch_queue": []}, True),
        ({"batch_queue": ["in flight"]}, False),
        ({"engines_running": True}, False),
        ({"is_running": lambda: False}, False),
        ({"scheduler": SimpleNamespace()}, False),
    ],
    ids=["alone", "nothing in flight", "in flight", "in step with others", "ending", "vLLM's scheduler"],
)
def test_the_engine_core_lets_only_ours_wait(changed: dict[str, Any], waits: bool) -> None:
    events: list[Any] = []
    process = engine_waits.wrap_process_input_queue(lambda core: events.append(core))
    core = engine_core(events, **changed)
    process(core)
    assert events == (["the queue", core] if waits else [core])


# ---- messages between processes ----


class Watched:
    """A poller that notes for how long it is asked, and what it answered."""

    def __init__(self, poller: zmq.Poller) -> None:
        self.poller = poller
        self.asked: list[int | None] = []
        self.answered: list[Any] = []
        self.begun = threading.Event()

    def poll(self, timeout: int | None = None) -> Any:
        self.asked.append(timeout)
        self.begun.set()
        self.answered.append(self.poller.poll(timeout))
        return self.answered[-1]


class Pair:
    """vLLM's own reader and writer, connected, and `wait` of the reader as our hook has it. `at`: moves the reader's
    time to so many seconds after its last read."""

    def __init__(self, address: str, clock: Clock) -> None:
        self._context = zmq.Context()
        self._clock = clock
        self.writer = shm_broadcast.SpinCondition(False, self._context, address)
        self.reader = shm_broadcast.SpinCondition(True, self._context, address)
        deadline = time.monotonic() + LONG_S
        # What is published before the subscription has arrived is lost.
        while not self.reader.local_notify_socket.poll(10):
            assert time.monotonic() < deadline
            self.writer.notify()
        while self.reader.local_notify_socket.poll(100):
            self.reader.local_notify_socket.recv()
        self.reader.poller = self.poller = Watched(self.reader.poller)
        self._wait = engine_waits.wrap_spin_wait(inspect.unwrap(shm_broadcast.SpinCondition.wait))

    def at(self, seconds: float) -> None:
        self._clock.now = self.reader.last_read + seconds

    def wait(self, timeout_ms: int | None = None) -> None:
        self._wait(self.reader, timeout_ms)

    def close(self) -> None:
        self._context.destroy(linger=0)
        # Made by the reader in its context, and closed with it.
        self.reader.poller = None


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    clock = Clock()
    monkeypatch.setattr(shm_broadcast, "time", clock)
    monkeypatch.setattr(engine_waits, "time", clock)
    made = Pair(f"ipc://{tmp_path}/notify", clock)
    yield made
    made.close()


def test_a_reader_polls_right_after_a_message(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_waits, "_poll_s", 0.003)
    for _ in range(2):
        pair.reader.record_read()
        for seconds in (0.0, 0.001, 0.0029):
            pair.at(seconds)
            pair.wait(int(LONG_S * 1000))
    assert pair.poller.asked == []
    pair.at(0.0031)
    pair.wait(1)
    assert pair.poller.asked == [1]


def test_a_reader_that_sleeps_is_woken(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_waits, "_poll_s", 0.003)
    monkeypatch.setattr(engine_waits, "RECHECK_S", LONG_S)
    pair.at(0.5)

    def notify() -> None:
        pair.poller.begun.wait(LONG_S)
        pair.writer.notify()

    notifier = threading.Thread(target=notify)
    notifier.start()
    pair.wait()
    notifier.join()
    assert pair.poller.asked == [LONG_S * 1000]
    assert pair.poller.answered == [[(pair.reader.local_notify_socket, zmq.POLLIN)]]


def test_within_the_second_a_reader_looks_again_soon(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notification that is lost costs so much; without the hook it could not be missed, as the reader polled."""
    monkeypatch.setattr(engine_waits, "_poll_s", 0.003)
    soon = int(engine_waits.RECHECK_S * 1000)
    for seconds in (0.004, 0.5, 0.99):
        pair.at(seconds)
        for timeout_ms in (None, 5000, 5):
            pair.wait(timeout_ms)
    assert pair.poller.asked == [soon, soon, 5] * 3
    assert pair.poller.answered == [[]] * 9


def test_after_the_second_a_reader_sleeps_as_vllm_says(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_waits, "_poll_s", 0.003)
    pair.at(0.5)
    pair.wait(1)
    pair.at(1.01)
    pair.wait(33)
    pair.writer.notify()
    pair.wait(None)
    assert pair.poller.asked == [1, 33, None]
    pair.reader.record_read()
    pair.wait(33)
    assert len(pair.poller.asked) == 3, "it polls anew after the next message"


def test_a_second_of_polling_is_vllms_own(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_waits, "_poll_s", 1.0)
    pair.at(0.99)
    pair.wait(None)
    assert pair.poller.asked == []
    pair.at(1.01)
    pair.wait(33)
    assert pair.poller.asked == [33]


def test_a_reader_never_polls_for_longer_than_vllm_has_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_waits, "_poll_s", 0.5)
    pair.reader.busy_loop_s = 0.1
    pair.at(0.2)
    pair.wait(33)
    assert pair.poller.asked == [33]


def test_elsewhere_the_wait_is_vllms_own() -> None:
    asked: list[Any] = []
    wait = engine_waits.wrap_spin_wait(lambda condition, timeout_ms: asked.append((condition, timeout_ms)))
    condition = SimpleNamespace(busy_loop_s=1, last_read=time.monotonic())
    before = dict(vars(condition))
    wait(condition)
    wait(condition, timeout_ms=5000)
    assert asked == [(condition, None), (condition, 5000)]
    assert vars(condition) == before


# ---- which processes ----


@pytest.mark.parametrize(("cpu", "poll_s"), [(True, 0.5), (False, None)])
def test_only_on_a_cpu_readers_sleep_early(cpu: bool, poll_s: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    monkeypatch.setattr(plugin, "install_engine_hooks", lambda: None)
    engine_waits.install(LoRAServeConfig(cpu_poll_s=0.5))
    assert engine_waits._poll_s == poll_s


def test_hooks_that_do_not_fit_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "install_engine_hooks", lambda: "vllm-loraserve doesn't fit this vLLM")
    with pytest.raises(RuntimeError, match="doesn't fit this vLLM"):
        engine_waits.install(LoRAServeConfig())
    assert engine_waits._poll_s is None
