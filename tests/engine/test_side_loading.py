"""The worker side with a made-up manager: orders, answers, what `add_adapter` does in a step and outside."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from worker_side import Manager, next_report, next_reports, order

from vllm_loraserve.memory.host_tier import HostTierFullError

pytestmark = pytest.mark.vllm


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
