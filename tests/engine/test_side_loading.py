"""The worker side with a made-up manager: orders, answers, what `add_adapter` does in a step and outside."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_loraserve.memory.host_tier import HostTierFullError

pytestmark = pytest.mark.vllm


class Manager:
    """A worker LoRA manager with `prepare`, over dictionaries."""

    def __init__(self, vllm_config: Any) -> None:
        self.held: set[int] = set()
        self.active: set[int] = set()
        self.kept: set[int] = set()
        """What the scheduler holds."""
        self.prepared: list[int] = []
        self.error: Exception | None = None
        self._adapter_manager = SimpleNamespace()

    def create_lora_manager(self, *_: Any) -> str:
        return "model"

    def prepare(self, request: Any) -> int:
        self.prepared.append(request.lora_int_id)
        if self.error is not None:
            raise self.error
        self.held.add(request.lora_int_id)
        return 16

    def is_prepared(self, adapter: int) -> bool:
        return adapter in self.held

    def hold(self, adapter: int, held: bool = True) -> None:
        (self.kept.add if held else self.kept.discard)(adapter)

    def set_active_adapters(self, requests: Any) -> None:
        for request in requests:
            self.add_adapter(request)

    def add_adapter(self, request: Any) -> bool:
        if request.lora_int_id not in self.held:
            self.prepare(request)
        self.active.add(request.lora_int_id)
        return True

    def remove_adapter(self, adapter: int) -> bool:
        self.held.discard(adapter)
        return True

    def pin_adapter(self, adapter: int) -> bool:
        return adapter in self.held

    unpin_adapter = pin_adapter

    def list_adapters(self) -> set[int]:
        return set(self.active)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm_loraserve.engine import channel
    from vllm_loraserve.engine.side_loading import side_loading

    monkeypatch.setattr(channel, "address_of", lambda *_: f"ipc://{tmp_path}/loads")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(rank=0),
        lora_config=SimpleNamespace(max_loras=2, max_cpu_loras=5),
        additional_config={"loraserve": {}},
    )
    end = channel.SchedulerEnd(f"ipc://{tmp_path}/loads")
    manager = side_loading(Manager)(config)
    assert manager.create_lora_manager("model", config) == "model"
    (hello,) = end.wait_for_workers(1, 120)
    assert (hello.rank, hello.rank_rows, hello.prepared) == (0, None, 3)
    yield end, manager
    manager._channel.close()
    end.close()


def next_reports(end: Any, count: int) -> list[Any]:
    deadline = time.monotonic() + 120
    reports: list[Any] = []
    while len(reports) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)
        reports += end.reports()
    return reports


def next_report(end: Any) -> Any:
    (report,) = next_reports(end, 1)
    return report


def order(end: Any, adapter: int, attempt: int = 1) -> None:
    import msgspec
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.engine import channel

    request = LoRARequest(f"a{adapter}", adapter, f"/adapters/{adapter}")
    end.send(channel.Prepare(adapter, attempt, msgspec.msgpack.encode(request)))


def test_an_order_is_carried_out_and_activated_without_reading(pair: Any) -> None:
    from vllm.lora.request import LoRARequest

    end, manager = pair
    order(end, 1)
    ready = next_report(end)
    assert (ready.adapter, ready.attempt, ready.lora_rank, ready.path) == (1, 1, 16, "/adapters/1")
    manager.set_active_adapters({LoRARequest("a1", 1, "/adapters/1")})
    assert manager.active == {1}
    assert manager.prepared == [1]
    time.sleep(0.02)
    assert end.reports() == []


def test_what_a_step_must_read_is_reported_as_a_stall(pair: Any) -> None:
    from vllm.lora.request import LoRARequest

    end, manager = pair
    manager.set_active_adapters({LoRARequest("a7", 7, "/adapters/7")})
    report = next_report(end)
    assert type(report).__name__ == "Stalled"
    assert report.adapter == 7


def test_what_is_there_without_a_load_is_no_stall(pair: Any) -> None:
    """vLLM's warm-up adapters: the counter of stalls must not begin with them."""
    from vllm.lora.request import LoRARequest

    end, manager = pair
    manager.held.add(1)
    manager.set_active_adapters([LoRARequest("a1", 1, "/adapters/1")])
    assert manager.active == {1}
    assert manager.prepared == []
    manager.pin_adapter(1)
    assert type(next_report(end)).__name__ == "Pinned", "the first that is said"


@pytest.mark.parametrize(
    ("error", "status", "transient"),
    [
        (FileNotFoundError("nothing there"), 404, False),
        (ValueError("of the wrong shape"), 400, False),
        (TimeoutError("the share is slow"), 503, True),
        (HostTierFullError("no room now"), 503, True),
    ],
)
def test_failures_carry_status_and_reason(pair: Any, error: Exception, status: int, transient: bool) -> None:
    end, manager = pair
    manager.error = error
    order(end, 1)
    failed = next_report(end)
    assert (failed.status, failed.transient) == (status, transient)
    assert "'a1'" in failed.reason
    assert str(error) in failed.reason


def test_what_was_pushed_out_is_reported(pair: Any) -> None:
    end, manager = pair
    order(end, 1)
    next_report(end)
    manager.held.discard(1)
    order(end, 2)
    reports = next_reports(end, 2)
    assert sorted((type(r).__name__, r.adapter) for r in reports) == [("Gone", 1), ("Ready", 2)]


def test_add_lora_looks_and_loads_aside(pair: Any, tmp_path: Path) -> None:
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.lora.request import LoRARequest

    end, manager = pair
    with pytest.raises(LoRAAdapterNotFoundError):
        manager.add_adapter(LoRARequest("none", 3, str(tmp_path / "none")))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "adapter_config.json").write_text("{}")
    assert manager.add_adapter(LoRARequest("there", 4, str(tmp_path / "there")))
    assert next_report(end).adapter == 4
    assert manager.active == set()


def test_what_was_ordered_stays_until_it_is_activated(pair: Any) -> None:
    from vllm.lora.request import LoRARequest

    end, manager = pair
    order(end, 1)
    assert type(next_report(end)).__name__ == "Ready"
    assert manager.kept == {1}
    manager.set_active_adapters({LoRARequest("a1", 1, "/adapters/1")})
    assert manager.kept == set()
    assert manager._held_for == {}


def test_what_is_released_removed_or_failed_is_not_held(pair: Any) -> None:
    from vllm_loraserve.engine import channel

    end, manager = pair
    for adapter in (1, 2, 3):
        order(end, adapter, attempt=adapter)
        next_report(end)
    end.send(channel.Release(1))
    end.send(channel.Hold(4))
    manager.error = ValueError("truncated")
    order(end, 5, attempt=5)  # orders are heard one after the other
    assert type(next_report(end)).__name__ == "Failed"
    assert manager.kept == {2, 3, 4}
    manager.remove_adapter(2)
    next_report(end)
    assert manager.kept == {3, 4}
    end.send(channel.Release(4))
    end.send(channel.Release(3))
    order(end, 6, attempt=6)
    next_report(end)
    assert manager.kept == set()
    assert manager._held_for == {}


def test_a_load_that_was_given_up_does_not_release_what_was_ordered_again(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    end, manager = pair
    prepare, gate, began = manager.prepare, threading.Event(), threading.Event()

    def slow_once(request: Any) -> int:
        if not began.is_set():
            began.set()
            gate.wait(60)
        return prepare(request)

    monkeypatch.setattr(manager, "prepare", slow_once)
    order(end, 1, attempt=1)
    assert began.wait(60)
    order(end, 1, attempt=2)
    assert next_report(end).attempt == 2
    gate.set()
    late = next_report(end)
    assert (type(late).__name__, late.attempt) == ("Failed", 1)
    assert manager.kept == {1}


def test_what_a_step_pushes_out_is_reported_at_once(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that only the arena had gives its place to another one: the next request must have it loaded."""
    from vllm.lora.request import LoRARequest

    end, manager = pair
    requests = {adapter: LoRARequest(f"a{adapter}", adapter, f"/adapters/{adapter}") for adapter in (1, 2)}
    for adapter in requests:
        order(end, adapter)
        next_report(end)
    manager.set_active_adapters({requests[1]})
    add = Manager.add_adapter

    def activate(self: Any, request: Any) -> bool:
        self.held.clear()
        self.held.add(request.lora_int_id)
        return add(self, request)

    monkeypatch.setattr(Manager, "add_adapter", activate)
    manager.set_active_adapters({requests[2]})
    assert (type(gone := next_report(end)).__name__, gone.adapter) == ("Gone", 1)


@pytest.mark.parametrize("ended", [False, True], ids=["running", "ended"])
def test_an_order_takes_over_the_load_of_add_lora(pair: Any, tmp_path: Path, ended: bool) -> None:
    """The load endpoint, and a request right behind it: the adapter is read once."""
    import threading

    import msgspec
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.engine import channel

    end, manager = pair
    (tmp_path / "adapter_config.json").write_text("{}")
    request = LoRARequest("a1", 1, str(tmp_path))
    gate, began, prepare = threading.Event(), threading.Event(), manager.prepare

    def held(request: Any) -> Any:
        began.set()
        gate.wait(60)
        return prepare(request)

    manager.prepare = held
    assert manager.add_adapter(request)
    assert began.wait(60)
    if ended:
        gate.set()
        assert next_report(end).attempt == 0
    end.send(channel.Prepare(1, 7, msgspec.msgpack.encode(request)))
    end.send(channel.Hold(9))
    while 9 not in manager.kept:
        time.sleep(0.002)
    gate.set()
    ready = next_report(end)
    assert (type(ready).__name__, ready.attempt, ready.lora_rank) == ("Ready", 7, 16)
    assert manager.prepared == [1]
    assert 1 in manager.kept


def test_the_order_that_took_a_load_over_hears_of_its_failure(pair: Any, tmp_path: Path) -> None:
    import threading

    import msgspec
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.engine import channel

    end, manager = pair
    (tmp_path / "adapter_config.json").write_text("{}")
    request = LoRARequest("a1", 1, str(tmp_path))
    gate, began = threading.Event(), threading.Event()

    def fails(request: Any) -> Any:
        began.set()
        gate.wait(60)
        raise ValueError("it is truncated")

    manager.prepare = fails
    assert manager.add_adapter(request)
    assert began.wait(60)
    end.send(channel.Prepare(1, 7, msgspec.msgpack.encode(request)))
    while 1 not in manager.kept:
        time.sleep(0.002)
    gate.set()
    failed = next_report(end)
    assert (type(failed).__name__, failed.attempt) == ("Failed", 7)
    assert "it is truncated" in failed.reason
    assert manager.kept == set()


def test_vllms_own_manager_keeps_what_is_held() -> None:
    from vllm_loraserve.engine.side_loading import PrepareStockMixin

    class Stock:
        lora_config = SimpleNamespace(max_cpu_loras=2)

        def _load_adapter(self, request: Any) -> Any:
            return SimpleNamespace(rank=8)

    class Preparing(PrepareStockMixin, Stock):
        """As `side_loading` makes it."""

    manager = Preparing()

    def prepare(adapter: int) -> None:
        manager.prepare(SimpleNamespace(lora_int_id=adapter, lora_path="/a"))  # type: ignore[arg-type]

    manager.hold(1)
    for adapter in (1, 2, 3, 4):
        prepare(adapter)
    assert set(manager._prepared) == {1, 4}
    manager.hold(4)
    prepare(5)
    assert set(manager._prepared) == {1, 4, 5}, "what is held is bounded elsewhere"
    manager.hold(1, False)
    manager.hold(4, False)
    prepare(6)
    assert set(manager._prepared) == {5, 6}


def test_pins_are_reported_for_they_take_room_with_nobody_running(pair: Any) -> None:
    end, manager = pair
    order(end, 1)
    next_report(end)
    assert manager.pin_adapter(1)
    assert manager.unpin_adapter(1)
    pinned, unpinned = next_reports(end, 2)
    assert (pinned.adapter, pinned.pinned, unpinned.adapter, unpinned.pinned) == (1, True, 1, False)


def test_an_order_that_breaks_does_not_end_the_channel(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    end, manager = pair
    start, broken = manager._start_load, []

    def breaks_once(*args: Any) -> None:
        if not broken:
            broken.append(args)
            raise RuntimeError("can't start new thread")
        start(*args)

    monkeypatch.setattr(manager, "_start_load", breaks_once)
    order(end, 1)
    order(end, 2)
    assert next_report(end).adapter == 2


def test_what_an_earlier_load_brings_late_is_not_kept(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapter was replaced meanwhile: the scheduler hears of it, and the path stays the newer one's."""
    import threading

    from vllm.lora.request import LoRARequest

    end, manager = pair
    prepare, gates, began = manager.prepare, [threading.Event()], threading.Event()

    def slow_once(request: Any) -> int:
        if gates:
            gate = gates.pop()
            began.set()
            gate.wait(60)
        return prepare(request)

    first = gates[0]
    monkeypatch.setattr(manager, "prepare", slow_once)
    manager._start_load(LoRARequest("a1", 1, "/old"), attempt=1)
    assert began.wait(60)
    manager._start_load(LoRARequest("a1", 1, "/new"), attempt=2)
    ready = next_report(end)
    assert (ready.attempt, ready.path) == (2, "/new")
    first.set()
    late = next_report(end)
    assert (type(late).__name__, late.attempt, late.transient) == ("Failed", 1, True)
    assert manager._paths == {1: "/new"}
    assert manager.load_errors == {}


def test_loads_of_add_lora_that_hang_give_their_places_back(pair: Any, tmp_path: Path) -> None:
    import threading

    from vllm.lora.request import LoRARequest

    end, manager = pair
    manager.loads.timeout_s = 0.05
    gate, prepare = threading.Event(), manager.prepare
    manager.prepare = lambda request: prepare(request) if request.lora_int_id >= 10 or gate.wait(60) else 0
    try:
        for adapter in [*range(manager.loads.places + 2), 10]:
            folder = tmp_path / str(adapter)
            folder.mkdir()
            (folder / "adapter_config.json").write_text("{}")
            assert manager.add_adapter(LoRARequest(f"a{adapter}", adapter + 1 if adapter < 10 else 10, str(folder)))
        assert next_report(end).adapter == 10
        assert manager.loads.hung >= manager.loads.places
    finally:
        gate.set()


def test_a_queued_load_that_the_scheduler_overtakes_fails_for_nobody(pair: Any, tmp_path: Path) -> None:
    """`add_lora` waits for its turn; a request comes, the scheduler orders the load, and only that one is told of."""
    import threading

    from vllm.lora.request import LoRARequest

    end, manager = pair
    gate, prepare = threading.Event(), manager.prepare
    manager.prepare = lambda request: prepare(request) if request.lora_int_id <= 10 or gate.wait(60) else 0
    for adapter in [*range(11, 11 + manager.loads.places), 1]:
        folder = tmp_path / str(adapter)
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        assert manager.add_adapter(LoRARequest(f"a{adapter}", adapter, str(folder)))
    order(end, 1, attempt=5)
    ready = next_report(end)
    assert (type(ready).__name__, ready.adapter, ready.attempt) == ("Ready", 1, 5)
    gate.set()
    others = next_reports(end, manager.loads.places)
    assert {type(report).__name__ for report in others} == {"Ready"}
    assert {report.adapter for report in others} == set(range(11, 11 + manager.loads.places))
    deadline = time.monotonic() + 60
    while manager.loads._pump is not None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert end.reports() == []
    assert manager.load_errors == {}


def test_a_dummy_batch_runs_with_whatever_has_its_number(pair: Any) -> None:
    """Engines of a data-parallel group run one when another has requests; it has vLLM's path of no adapter."""
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.engine.side_loading import WARM_UP_PATH

    end, manager = pair
    order(end, 1)
    assert next_report(end).adapter == 1
    manager.set_active_adapters([LoRARequest("warmup_1", 1, WARM_UP_PATH)])
    assert manager.active == {1}
    manager.set_active_adapters([LoRARequest("a1", 1, "/adapters/1")])
    assert manager.prepared == [1], "read once, and nothing from vLLM's path"
    assert end.reports() == [], "nor did a step wait for it"


def test_the_path_of_dummy_batches_is_vllms() -> None:
    import inspect

    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from vllm_loraserve.engine.side_loading import WARM_UP_PATH

    assert inspect.getsource(LoRAModelRunnerMixin).count(f'lora_path="{WARM_UP_PATH}"') == 2


def test_what_a_worker_holds_and_has_on_its_way_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.engine import channel
    from vllm_loraserve.engine.side_loading import side_loading

    family = channel.Family("loraserve:fetch_progress_bytes", "", "gauge", [("n", {"adapter": "a"}, 7.0)])

    held = channel.Family("loraserve:resident_adapters", "", "gauge", [("n", {"tier": "host"}, 2.0)])

    class WithPeers(Manager):
        peers = SimpleNamespace(metrics=lambda: [family], on_progress=None)
        memory = SimpleNamespace(metrics=lambda: [held])

    monkeypatch.setattr(channel, "address_of", lambda *_: f"ipc://{tmp_path}/loads")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(rank=3),
        lora_config=SimpleNamespace(max_loras=2, max_cpu_loras=5),
        additional_config={"loraserve": {}},
    )
    end = channel.SchedulerEnd(f"ipc://{tmp_path}/loads")
    manager = side_loading(WithPeers)(config)
    manager.create_lora_manager("model", config)
    end.wait_for_workers(1, 120)

    def told() -> list[Any]:
        """What comes up to the next figures, these last."""
        reports: list[Any] = []
        while not any(isinstance(report, channel.Figures) for report in reports):
            end.wait(120)
            reports += end.reports()
        return reports

    assert told() == [channel.Figures(3, [held, family])], "what there is at the start"
    manager.peers.on_progress()
    assert told() == [channel.Figures(3, [held, family])]
    # And after a load inside a step, which is on its way no more.
    manager.set_active_adapters([LoRARequest("a", 1, "/a")])
    assert told()[-1] == channel.Figures(3, [held, family])
    # And when what was in host memory begins to run.
    manager.set_active_adapters([])
    manager.set_active_adapters([LoRARequest("a", 1, "/a")])
    assert told() == [channel.Figures(3, [held, family])]
    manager._channel.close()
    end.close()
