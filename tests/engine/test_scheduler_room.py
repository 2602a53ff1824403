"""The room of the arena: which adapters run together, who overtakes whom, and for how long. Real channel, made-up
workers."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def test_room_is_counted_in_rank_rows(build: Any) -> None:
    """Eight slots, but rows for one adapter of rank 64 or eight of rank 8."""
    from scheduler_harness import checker, finished, make_request, run_until, running_adapters

    scheduler, _ = build(ranks={1: 64, 2: 60}, rank_rows=64, max_loras=8)
    together: list[set[int]] = []

    def check(output: Any) -> None:
        checker(scheduler)(output)
        together.append(running_adapters(scheduler))

    for i in range(1, 9):
        scheduler.add_request(make_request(f"r{i}", max_tokens=100, adapter=i))
    run_until(scheduler, finished(scheduler), check)
    assert not any({1, 2} <= running for running in together)
    assert {1} in together
    assert {2} in together
    assert {3, 4, 5, 6, 7, 8} in together, "the small ones fit together"


def test_a_pinned_adapter_keeps_its_rows_while_others_run(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, run_until, running_adapters

    scheduler, workers = build(ranks={1: 32, 2: 24, 3: 16, 4: 64}, rank_rows=64, max_loras=8)
    scheduler.add_request(make_request("first", max_tokens=4, adapter=1))
    run_until(scheduler, finished(scheduler), checker(scheduler))
    workers.pin(1)
    run_until(scheduler, lambda: 1 in scheduler.readiness.pinned, checker(scheduler))
    together: list[set[int]] = []

    def check(output: Any) -> None:
        checker(scheduler)(output)
        together.append(running_adapters(scheduler))

    for adapter in (2, 3):
        scheduler.add_request(make_request(f"r{adapter}", max_tokens=100, adapter=adapter))
    run_until(scheduler, finished(scheduler), check)
    assert {2, 3} not in together, "24 + 16 rows beside the 32 pinned ones are more than 64"
    assert {2} in together
    assert {3} in together
    scheduler.add_request(make_request("all", adapter=4))
    run_until(scheduler, finished(scheduler), check)
    assert {4} in together, "one that fits the arena alone is served in spite of pins"
    workers.gone(1)
    run_until(scheduler, lambda: not scheduler.readiness.pinned, checker(scheduler))


def test_an_adapter_too_large_for_the_arena_is_refused(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    scheduler, _ = build(ranks={1: 128}, rank_rows=64)
    scheduler.add_request(make_request("big", adapter=1))
    scheduler.add_request(make_request("small", adapter=2))
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"big": "error", "small": "length"}
    reason = next(o.stop_reason for o in outputs if o.request_id == "big")
    assert "of rank 128 does not fit the arena, which holds 64 rank rows" in reason


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_stream_of_hot_adapters_starves_nobody(build: Any, policy: str) -> None:
    """Two hot adapters fill the slots, with new requests for them in every step; a third gets its turn."""
    from scheduler_harness import checker, make_request, settled_step

    scheduler, _ = build(max_loras=2, max_seqs=8, policy=policy, options={"skip_window": 20, "max_skip_s": 60})
    check = checker(scheduler)
    names = iter(range(10**6))

    def hot_step(at: int) -> Any:
        for adapter in (1, 2):
            scheduler.add_request(make_request(f"hot{next(names)}", 10, 5, adapter=adapter, arrival=at))
        output, _ = settled_step(scheduler)
        check(output)
        return output

    for at in range(30):
        hot_step(at)
    scheduler.add_request(make_request("cold", 10, 5, adapter=3, arrival=30))
    output = hot_step(30)
    assert "cold" not in output.num_scheduled_tokens, "its load has only begun"
    admitted_before = scheduler.counters.admitted
    for at in range(31, 131):
        output = hot_step(at)
        if "cold" in output.num_scheduled_tokens:
            break
    assert "cold" in output.num_scheduled_tokens, "the cold request never ran"
    overtook = scheduler.counters.admitted - admitted_before
    # The window, plus what the other adapter admits while one of them drains (at most its share of five steps).
    assert overtook <= 20 + 8 * 8
    assert scheduler.counters.drains > 0 or policy == "priority"
    assert 0 < scheduler.counters.overtakes <= overtook


@pytest.mark.slow
def test_many_requests_for_many_adapters_with_little_room(build: Any) -> None:
    """1,000 requests, 500 adapters, room for 8: all finish, in order within the ageing bound, memory flat."""
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    scheduler, _ = build(
        max_loras=8, rank_rows=64, max_seqs=64, max_tokens=2048, options={"skip_window": 16, "max_skip_s": 0.5}
    )
    for i in range(1000):
        scheduler.add_request(make_request(f"r{i}", 10, 3, adapter=1 + (i * 7) % 500))
    started: list[int] = []

    def check(output: Any) -> None:
        checker(scheduler)(output)
        started.extend(int(r.req_id[1:]) for r in output.scheduled_new_reqs)
        assert scheduler.readiness.loading <= 2
        assert len(scheduler.waiting._taken) <= 64

    outputs = run_until(scheduler, finished(scheduler), check)
    assert len(reasons(outputs)) == 1000
    assert set(reasons(outputs).values()) == {"length"}
    # r0 to r499 are the first of each adapter: none is overtaken by more of them than the window and the slots allow.
    first = [number for number in started if number < 500]
    overtaken = [sum(other > number for other in first[:position]) for position, number in enumerate(first)]
    assert max(overtaken) <= 16 + 8
    assert started.index(500) < started.index(100), "a request whose adapter is in use does not wait for its turn"
    assert not scheduler.waiting._where
    assert not scheduler.room.users or not scheduler.running


@pytest.mark.slow
def test_memory_is_flat_over_many_adapters_and_requests(build: Any) -> None:
    """1,000 requests for 500 adapters with room for 8, three times: what was kept of one round is not kept twice."""
    import gc

    from scheduler_harness import checker, finished, make_request, reasons, run_until

    scheduler, workers = build(
        max_loras=8, rank_rows=64, host_rows=128, prepared=8, max_seqs=64, max_tokens=2048,
        options={"skip_window": 16, "max_skip_s": 0.5},
    )  # fmt: skip
    workers.in_use = lambda: set(scheduler.room.users)
    objects, lanes = [], []

    def check(output: Any) -> None:
        checker(scheduler)(output)
        lanes.append(sum(len(lane.heap) for lane in scheduler.waiting.lanes.values()))
        workers.orders.clear()

    for round_ in range(3):
        for i in range(1000):
            scheduler.add_request(make_request(f"r{round_}-{i}", 10, 3, adapter=1 + 500 * round_ + (i * 7) % 500))
        outputs = run_until(scheduler, finished(scheduler), check)
        assert set(reasons(outputs).values()) == {"length"}
        assert len(reasons(outputs)) == 1000
        assert len(scheduler.readiness._adapters) < 500
        del outputs
        lanes_most = max(lanes)
        lanes.clear()
        gc.collect()
        objects.append(len(gc.get_objects()))
    assert lanes_most <= 2 * 1000 + 500 * 16
    assert objects[2] - objects[1] < 3000, "less than an object for an adapter and request of a round"
    assert not workers.held[0]


def test_who_comes_back_with_kv_blocks_takes_room_in_the_same_step(build: Any, clock: Any) -> None:
    """vLLM admits such requests before the waiting queue and past it."""
    from scheduler_harness import checker, finished, make_request, run_until

    scheduler, _ = build(max_loras=1)
    for adapter in (1, 2):
        scheduler.add_request(make_request(f"first{adapter}", adapter=adapter))
    run_until(scheduler, finished(scheduler), checker(scheduler))
    scheduler._survey(clock.monotonic())
    scheduler.work.spend(100, 8)
    spent = scheduler.work.spent
    assert scheduler._handle_blocked_waiting_request(make_request("back", adapter=1))
    assert not scheduler.room.fits(2, 8)
    assert scheduler.work.spent == spent > 0, "the step's budget goes on"


def test_preemption_with_adapters(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    scheduler, _ = build(blocks=20, max_seqs=8, rank_rows=16, caching=False)
    for i in range(20):
        scheduler.add_request(make_request(f"r{i}", 40, 40, adapter=i % 4))
    preempted: set[str] = set()

    def check(output: Any) -> None:
        checker(scheduler)(output)
        preempted.update(output.preempted_req_ids or ())

    outputs = run_until(scheduler, finished(scheduler), check)
    assert set(reasons(outputs).values()) == {"length"}
    assert len(reasons(outputs)) == 20
    assert preempted, "twenty blocks are too few for what runs together"
