"""Loads that another one overtakes: what was given up, ordered again, or begun by add_lora."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from worker_side import next_report, next_reports, order

pytestmark = pytest.mark.vllm


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
