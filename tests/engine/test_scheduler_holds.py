"""What is loaded for requests stays in the workers' host memory until it runs or nobody waits for it. Real channel,
made-up workers."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def with_one_running(build: Any, **options: Any) -> tuple[Any, Any]:
    """A scheduler with one slot, taken by adapter 1 for long."""
    from scheduler_harness import checker, make_request, run_until

    scheduler, workers = build(max_loras=1, **options)
    scheduler.add_request(make_request("runs", max_tokens=1000, adapter=1))
    run_until(scheduler, lambda: bool(scheduler.running), checker(scheduler))
    return scheduler, workers


def nothing_is_held(scheduler: Any, workers: Any) -> bool:
    readiness = scheduler.readiness
    return not (workers.held[0] or readiness._held or readiness._owed or readiness._give_way)


def test_what_is_ready_is_held_until_it_runs(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, run_until, settled_step
    from vllm.v1.request import RequestStatus

    scheduler, workers = with_one_running(build, tp=2)
    assert workers.held == [set(), set()], "it was activated"
    scheduler.add_request(make_request("waits", adapter=2))
    run_until(scheduler, lambda: scheduler.readiness.is_ready(2, "/adapters/2"), checker(scheduler))
    for _ in range(5):
        settled_step(scheduler)
    assert workers.held == [{2}, {2}]
    scheduler.finish_requests("runs", RequestStatus.FINISHED_ABORTED)
    run_until(scheduler, finished(scheduler), checker(scheduler))
    settled_step(scheduler)
    assert nothing_is_held(scheduler, workers)
    assert [order.adapter for order in workers.orders] == [1, 2]


@pytest.mark.parametrize("loading", [False, True], ids=["ready", "loading"])
def test_an_aborted_request_lets_its_adapter_go(build: Any, loading: bool) -> None:
    from scheduler_harness import make_request, settled_step
    from vllm.v1.request import RequestStatus

    scheduler, workers = with_one_running(build)
    if loading:
        workers.hold(2)
    scheduler.add_request(make_request("waits", adapter=2))
    for _ in range(3):
        settled_step(scheduler)
    assert workers.held == [{2}]
    scheduler.finish_requests("waits", RequestStatus.FINISHED_ABORTED)
    settled_step(scheduler)
    workers.release(2)
    settled_step(scheduler)
    assert workers.held == [set()]
    assert 2 not in scheduler.readiness._held | scheduler.readiness._owed


def test_what_was_there_before_is_held_when_requests_wait_for_it(build: Any) -> None:
    from scheduler_harness import make_request, settle, settled_step

    scheduler, workers = with_one_running(build)
    workers.bring_in(2)
    settle(scheduler)
    settled_step(scheduler)
    assert workers.held == [set()]
    scheduler.add_request(make_request("waits", adapter=2))
    settled_step(scheduler)
    assert workers.held == [{2}]
    assert [order.adapter for order in workers.orders] == [1]


def test_what_is_held_is_bounded_and_gives_way_to_older_requests(build: Any) -> None:
    """Of adapters that were there before no more is held than may be loaded ahead."""
    from scheduler_harness import make_request, settle, settled_step

    scheduler, workers = with_one_running(
        build, ranks=dict.fromkeys(range(1, 9), 16), host_rows=3 * 16, prepared=8, policy="priority"
    )
    for adapter in range(2, 8):
        workers.bring_in(adapter)
    workers.in_use = lambda: set(range(1, 8))  # whatever the host tier pushes out, none is gone
    settle(scheduler)
    for adapter in range(2, 8):
        scheduler.add_request(make_request(f"r{adapter}", adapter=adapter, priority=5))
    settled_step(scheduler)
    assert len(workers.held[0]) == 3
    scheduler.add_request(make_request("first", adapter=8, priority=1))
    settled_step(scheduler)
    settled_step(scheduler)
    assert 8 in workers.held[0]
    assert len(workers.held[0]) == 3
    assert workers.held[0] == scheduler.readiness._held


def test_no_room_beside_what_is_held_is_no_failure(build: Any, clock: Any) -> None:
    """The host tier has room again when what is held runs; until then a load uses up no retries."""
    from scheduler_harness import checker, finished, make_request, reasons, run_until, settled_step
    from vllm.v1.request import RequestStatus

    scheduler, workers = with_one_running(build, options={"load_retries": 1})
    scheduler.add_request(make_request("waits", adapter=2))
    for _ in range(3):
        settled_step(scheduler)
    workers.full.add(3)
    scheduler.add_request(make_request("later", adapter=3))
    for _ in range(12):
        settled_step(scheduler)
        clock.advance(1)
    assert [order.adapter for order in workers.orders].count(3) > 3
    assert workers.held == [{2}]
    scheduler.finish_requests("runs", RequestStatus.FINISHED_ABORTED)
    run_until(scheduler, lambda: "waits" not in scheduler.requests, checker(scheduler))
    workers.full.clear()
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"later": "length"}


def test_a_host_tier_that_is_full_of_other_things_ends_the_request(build: Any, clock: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    scheduler, workers = build(options={"load_retries": 1})
    workers.full.add(3)
    scheduler.add_request(make_request("r", adapter=3))
    assert reasons(run_until(scheduler, finished(scheduler), checker(scheduler))) == {"r": "error"}
    assert len(workers.orders) == 2


def test_nothing_is_remembered_of_adapters_that_nobody_needs(build: Any) -> None:
    """Three thousand adapters come and go: by running, by abort while they wait, by a load that fails."""
    from scheduler_harness import make_request, settled_step
    from vllm.v1.request import RequestStatus

    scheduler, workers = build(max_loras=4, host_rows=64, prepared=8, options={"load_retries": 8})
    workers.in_use = lambda: set(scheduler.room.users)
    sizes = []
    for adapter in range(1, 3001):
        if adapter % 3 == 0:
            workers.fails[adapter] = [("the share is away", True)] * 20
        scheduler.add_request(make_request(f"r{adapter}", 4, 1, adapter=adapter))
        settled_step(scheduler)
        if adapter % 2 == 0:
            scheduler.finish_requests([f"r{adapter}", f"r{adapter - 1}"], RequestStatus.FINISHED_ABORTED)
        sizes.append(len(scheduler.readiness._adapters))
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    settled_step(scheduler)
    assert max(sizes) < 500, max(sizes)
    assert len(scheduler.readiness._retrying) < 500
    assert nothing_is_held(scheduler, workers)


def test_what_gives_way_is_not_held_and_released_in_one_step() -> None:
    """Workers carry orders out one after the other: a release behind a hold would undo it."""
    from vllm_loraserve.engine import channel
    from vllm_loraserve.engine.readiness import Readiness

    readiness = Readiness(1, prefetch=1, concurrent_loads=2, load_timeout_s=60, load_retries=0)
    readiness.on_report(channel.Ready(0, 1, 0, 8, 0.1, "/1"), 0.0)
    assert readiness.hold(1)
    assert readiness.next_loads([(2, "/2")], set(), 0.0) == [(2, 1)]
    readiness.on_report(channel.Failed(0, 2, 1, "gone", False), 0.0)
    assert not readiness.hold(1), "its release is on its way"
    assert readiness.releases(lambda adapter, path: True) == [1]
    assert readiness.hold(1)

    assert readiness.next_loads([(3, "/3"), (1, "/other")], set(), 0.0) == [(3, 2)]
    assert readiness.next_loads([(1, "/other")], set(), 0.0) == [(1, 3)]
    assert readiness.releases(lambda adapter, path: True) == []
    assert readiness.is_held(1)
