"""Adapters that are brought in aside while requests wait: who is held up, and what follows when a load ends otherwise
than well. Real channel, made-up workers."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def test_a_load_blocks_nobody_else(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    scheduler, workers = build()
    workers.hold(1)
    scheduler.add_request(make_request("cold", adapter=1))
    scheduler.add_request(make_request("base"))
    scheduler.add_request(make_request("warm", adapter=2))
    outputs = run_until(scheduler, lambda: len(scheduler.requests) == 1, checker(scheduler))
    assert set(reasons(outputs)) == {"base", "warm"}
    assert scheduler.readiness.loading == 1
    workers.release(1)
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"cold": "length"}
    assert scheduler.readiness.counters.loads == 2
    assert scheduler.readiness.counters.stalls == 0


def test_with_tensor_parallel_every_rank_must_be_ready(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until, settled_step

    scheduler, workers = build(tp=2)
    workers.hold(1, rank=1)
    scheduler.add_request(make_request("r", adapter=1))
    for _ in range(20):
        assert settled_step(scheduler)[0].total_num_scheduled_tokens == 0
    workers.release(1, rank=1)
    assert reasons(run_until(scheduler, finished(scheduler), checker(scheduler))) == {"r": "length"}


def test_async_scheduling(build: Any) -> None:
    from scheduler_harness import checker, make_request, model_output, settle

    from vllm_loraserve.engine.scheduler import RankAwareAsyncScheduler

    scheduler, _ = build(cls=RankAwareAsyncScheduler, rank_rows=16)
    for i in range(12):
        scheduler.add_request(make_request(f"r{i}", adapter=1 + i % 4, max_tokens=5))
    pending: list[Any] = []
    check = checker(scheduler)
    for _ in range(1000):
        output = scheduler.schedule()
        settle(scheduler)
        check(output)
        pending.append((output, model_output(scheduler, output)))
        if len(pending) > 1:
            scheduler.update_from_output(*pending.pop(0))
        if not output.total_num_scheduled_tokens:
            while pending:
                scheduler.update_from_output(*pending.pop(0))
        if not scheduler.requests:
            break
    assert not scheduler.requests


def test_a_failed_load_ends_only_its_requests(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    from vllm_loraserve.engine.request_errors import parse

    scheduler, workers = build()
    workers.fails[1] = [("the file is truncated", False)]
    for i in range(3):
        scheduler.add_request(make_request(f"bad{i}", adapter=1))
        scheduler.add_request(make_request(f"good{i}", adapter=2))
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {f"bad{i}": "error" for i in range(3)} | {f"good{i}": "length" for i in range(3)}
    errors = {o.request_id: parse(o.stop_reason) for o in outputs if str(o.finish_reason) == "error"}
    assert all(error == (400, "the file is truncated") for error in errors.values())
    # The next request tries anew: the adapter may have been repaired.
    scheduler.add_request(make_request("again", adapter=1))
    assert reasons(run_until(scheduler, finished(scheduler), checker(scheduler))) == {"again": "length"}


def test_a_passing_failure_is_tried_again_with_back_off(build: Any, clock: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    scheduler, workers = build()
    workers.fails[1] = [("the share is away", True)] * 2
    scheduler.add_request(make_request("r", adapter=1))
    tries: list[float] = []

    def check(output: Any) -> None:
        checker(scheduler)(output)
        if len(workers.orders) > len(tries):
            tries.append(clock.now)

    outputs = run_until(scheduler, finished(scheduler), check)
    assert reasons(outputs) == {"r": "length"}
    assert scheduler.readiness.counters.retries == 2
    first, second, third = tries
    assert 0.5 <= second - first < 0.6
    assert 1.0 <= third - second < 1.1


def test_retries_end(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    scheduler, workers = build(options={"load_retries": 1})
    workers.fails[1] = [("the share is away", True)] * 5
    scheduler.add_request(make_request("r", adapter=1))
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"r": "error"}
    assert len(workers.orders) == 2


def test_a_hanging_load_ends_after_its_time(build: Any, clock: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    from vllm_loraserve.engine.request_errors import parse

    scheduler, workers = build(options={"load_timeout_s": 20, "load_retries": 0, "concurrent_loads": 1})
    workers.hold(1)
    scheduler.add_request(make_request("stuck", adapter=1))
    scheduler.add_request(make_request("behind", adapter=2))
    begin = clock.now
    outputs = run_until(scheduler, lambda: "stuck" not in scheduler.requests, checker(scheduler))
    assert 20 < clock.now - begin < 20.2
    outputs += run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"stuck": "error", "behind": "length"}
    error = parse(next(o.stop_reason for o in outputs if o.request_id == "stuck"))
    assert error is not None
    assert error[0] == 503
    assert "not loaded within 20 s" in error[1]


def test_an_adapter_that_goes_while_requests_wait_is_loaded_again(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until, settle

    scheduler, workers = build(max_loras=1)
    scheduler.add_request(make_request("running", adapter=2, max_tokens=100))
    run_until(scheduler, lambda: bool(scheduler.running), checker(scheduler))
    scheduler.add_request(make_request("waiting", adapter=1))
    run_until(scheduler, lambda: scheduler.readiness.is_ready(1, "/adapters/1"), checker(scheduler))
    workers.gone(1)
    settle(scheduler)
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"running": "length", "waiting": "length"}
    assert [order.adapter for order in workers.orders] == [2, 1, 1]


def test_a_replaced_adapter_waits_for_the_requests_on_its_old_content(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, run_until

    scheduler, workers = build()
    scheduler.add_request(make_request("old", adapter=1, path="/v1", max_tokens=20))
    run_until(scheduler, lambda: bool(scheduler.running), checker(scheduler))
    scheduler.add_request(make_request("new", adapter=1, path="/v2"))
    order: list[str] = ["old"]

    def check(output: Any) -> None:
        assert not {"old", "new"} <= set(output.num_scheduled_tokens)
        order.extend(output.num_scheduled_tokens)

    run_until(scheduler, finished(scheduler), check)
    assert order == ["old"] * 20 + ["new"] * 8
    assert len(workers.orders) == 2


def test_abort_storm_leaves_nothing_behind(build: Any) -> None:
    """Also while loads are under way."""
    from scheduler_harness import checker, finished, make_request, reasons, run_until, settled_step
    from vllm.v1.request import RequestStatus

    scheduler, workers = build(options={"concurrent_loads": 2})
    workers.hold(2)
    for round_ in range(5):
        names = [f"r{round_}-{i}" for i in range(100)]
        for i, name in enumerate(names):
            scheduler.add_request(make_request(name, adapter=1 + i % 60))
        settled_step(scheduler)
        assert scheduler.readiness.loading > 0
        scheduler.finish_requests(names[::2], RequestStatus.FINISHED_ABORTED)
        settled_step(scheduler)
        scheduler.finish_requests(names[1::2], RequestStatus.FINISHED_ABORTED)
        assert len(scheduler.waiting) == 0
        assert not scheduler.waiting.lanes
    assert not scheduler.requests
    workers.release(2)
    scheduler.add_request(make_request("after", adapter=2))
    assert reasons(run_until(scheduler, finished(scheduler), checker(scheduler))) == {"after": "length"}
    assert scheduler.readiness.loading == 0
    assert [order.adapter for order in workers.orders].count(2) == 1


def test_pause_and_resume_while_loading(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until, settled_step
    from vllm.v1.core.sched.interface import PauseState

    scheduler, _ = build()
    scheduler.add_request(make_request("r", adapter=1))
    settled_step(scheduler)
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(5):
        assert settled_step(scheduler)[0].total_num_scheduled_tokens == 0
    assert scheduler.readiness.is_ready(1, "/adapters/1")
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert reasons(run_until(scheduler, finished(scheduler), checker(scheduler))) == {"r": "length"}


def test_sleep_and_waking_while_an_adapter_loads(build: Any) -> None:
    """What the engine core does: it pauses, gives the running requests' KV blocks back, sleeps; nothing is scheduled in
    between, and a load that ends then is known after."""
    from scheduler_harness import checker, finished, make_request, reasons, run_until, settled_step
    from vllm.v1.core.sched.interface import PauseState

    scheduler, workers = build()
    workers.hold(2)
    scheduler.add_request(make_request("runs", max_tokens=50, adapter=1))
    run_until(scheduler, lambda: bool(scheduler.running), checker(scheduler))
    scheduler.add_request(make_request("waits", adapter=2))
    settled_step(scheduler)
    assert scheduler.readiness.loading == 1
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    settled_step(scheduler)
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not scheduler.running
    workers.release(2)
    for _ in range(3):
        assert settled_step(scheduler)[0].total_num_scheduled_tokens == 0
    scheduler.set_pause_state(PauseState.UNPAUSED)
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"runs": "length", "waits": "length"}
    assert [order.adapter for order in workers.orders] == [1, 2], "each was read once"


def test_without_workers_vllm_loads_in_the_step(build: Any, model_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from scheduler_harness import finished, make_request, make_scheduler, reasons, run_until

    from vllm_loraserve.engine import channel
    from vllm_loraserve.engine.scheduler import RankAwareScheduler

    monkeypatch.setattr(channel, "address_of", lambda *_: None)
    scheduler = make_scheduler(RankAwareScheduler, str(model_dir))
    for i in range(12):
        scheduler.add_request(make_request(f"r{i}", adapter=1 + i % 6))
    outputs = run_until(scheduler, finished(scheduler), lambda _: None)
    assert len(reasons(outputs)) == 12


def test_what_a_given_up_load_brings_late_makes_nothing_ready(build: Any, clock: Any) -> None:
    """The scheduler gave the first attempt up; its answer must not count for the second."""
    from scheduler_harness import checker, finished, make_request, reasons, run_until, settle, settled_step

    from vllm_loraserve.engine import channel

    scheduler, workers = build(options={"load_timeout_s": 5, "load_retries": 3})
    workers.hold(1)
    scheduler.add_request(make_request("r", adapter=1, path="/v2"))
    run_until(scheduler, lambda: len(workers.orders) == 1, checker(scheduler))
    clock.advance(6)
    run_until(scheduler, lambda: len(workers.orders) == 2, checker(scheduler))
    first, second = (order.attempt for order in workers.orders)
    workers._all(lambda rank: channel.Ready(rank, 1, first, 8, 0.001, "/v2"))
    settle(scheduler)
    for _ in range(5):
        assert settled_step(scheduler)[0].total_num_scheduled_tokens == 0
    assert not scheduler.readiness.is_ready(1, "/v2")
    workers._all(lambda rank: channel.Ready(rank, 1, second, 8, 0.001, "/v2"))
    settle(scheduler)
    assert reasons(run_until(scheduler, finished(scheduler), checker(scheduler))) == {"r": "length"}


def test_loads_that_hang_for_ever_stop_nobody_else(build: Any, clock: Any) -> None:
    """More adapters hang than may load at a time; others get their turn, and the hanging ones' requests end: within
    the time that `load_timeout_s` gives to two at a time."""
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    scheduler, workers = build(options={"load_timeout_s": 5, "load_retries": 1, "concurrent_loads": 2, "prefetch": 2})
    for adapter in range(1, 8):
        workers.hold(adapter)
        scheduler.add_request(make_request(f"stuck{adapter}", adapter=adapter))
    for adapter in range(10, 14):
        scheduler.add_request(make_request(f"good{adapter}", adapter=adapter))

    begin, good = clock.now, []

    def check(output: Any) -> None:
        checker(scheduler)(output)
        assert scheduler.readiness.loading <= 2
        if not good and not any(name.startswith("good") for name in scheduler.requests):
            good.append(clock.now - begin)
        if not output.total_num_scheduled_tokens:
            clock.advance(0.25)

    ends = reasons(run_until(scheduler, finished(scheduler), check))
    assert {end for name, end in ends.items() if name.startswith("good")} == {"length"}
    assert {end for name, end in ends.items() if name.startswith("stuck")} == {"error"}
    assert scheduler.readiness.counters.timeouts == 7 * 2, "each once, and once more"
    # Seven first tries, two at a time, before the good ones; seven second ones behind them. A step may pass meanwhile.
    assert 3 * 5 <= good[0] <= 4 * (5 + 1)
    assert 7 * 5 <= clock.now - begin <= 8 * (5 + 1)


def test_an_adapter_of_high_rank_joins_a_running_batch_alone_and_soon(build: Any) -> None:
    """Bringing pages in and reading them in the first prefill cost a step; they don't add up in one."""
    from scheduler_harness import checker, finished, make_request, run_until, settled_step

    from vllm_loraserve.engine.turns import JOIN_STEPS

    ranks = {1: 8, 2: 128, 3: 128, 4: 128, 5: 8, 6: 16}
    scheduler, workers = build(ranks=ranks, rank_rows=1024, max_loras=8)
    for adapter in ranks:
        workers.bring_in(adapter)
    scheduler.add_request(make_request("decoding", 10, 200, adapter=1))
    run_until(scheduler, lambda: any(not r.is_prefill_chunk for r in scheduler.running), checker(scheduler))
    for adapter in (2, 3, 4, 5, 6):
        scheduler.add_request(make_request(f"new{adapter}", 10, 50, adapter=adapter))
    scheduler.add_request(make_request("same", 10, 50, adapter=1))
    began = [{r.req_id for r in settled_step(scheduler)[0].scheduled_new_reqs} for _ in range(JOIN_STEPS + 2)]
    assert began[0] == {"same", "new5", "new6"}, "whose adapter runs needs no page, and low ranks need few"
    assert began[1] == {"new2"}
    assert set().union(*began) == {"same", *(f"new{n}" for n in range(2, 7))}, "nobody waits for longer than the bound"
    run_until(scheduler, finished(scheduler), checker(scheduler))


def test_the_prefill_of_a_high_rank_that_runs_yields_to_low_ranks_too(build: Any) -> None:
    """Else a short step of a low rank would be as long as the high rank's prefill."""
    from scheduler_harness import checker, finished, make_request, run_until, settled_step

    scheduler, workers = build(ranks={1: 128, 2: 8}, rank_rows=1024, max_loras=8)
    for adapter in (1, 2):
        workers.bring_in(adapter)
    scheduler.add_request(make_request("decoding", 10, 200, adapter=1))
    run_until(scheduler, lambda: any(not r.is_prefill_chunk for r in scheduler.running), checker(scheduler))
    scheduler.add_request(make_request("high", 10, 50, adapter=1))
    scheduler.add_request(make_request("low", 10, 50, adapter=2))
    began = [{r.req_id for r in settled_step(scheduler)[0].scheduled_new_reqs} for _ in range(2)]
    assert began == [{"low"}, {"high"}]
    scheduler.add_request(make_request("alone", 10, 50, adapter=1))
    assert {r.req_id for r in settled_step(scheduler)[0].scheduled_new_reqs} == {"alone"}, "it yields to somebody"
    run_until(scheduler, finished(scheduler), checker(scheduler))


def hold_blocks(scheduler: Any, request: Any) -> None:
    """The request waits with KV blocks, as a streaming session between two inputs does."""
    scheduler.requests[request.request_id] = request
    request.num_computed_tokens = 16
    scheduler._enqueue_waiting_request(request)
    assert len(scheduler.kv_holding_waiting) == 1


@pytest.mark.parametrize("fails", [False, True], ids=["gone", "failed"])
def test_who_waits_with_kv_blocks_has_its_adapter_loaded_too(build: Any, fails: bool) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until, settle, settled_step

    scheduler, workers = build()
    scheduler.add_request(make_request("first", adapter=1))
    run_until(scheduler, finished(scheduler), checker(scheduler))
    workers.gone(1)
    settle(scheduler)
    workers.fails[1] = [("it is truncated", False)] if fails else []
    hold_blocks(scheduler, make_request("held", 40, 8, adapter=1))
    if fails:
        outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
        assert reasons(outputs) == {"held": "error"}
        return
    for _ in range(5):
        output, _ = settled_step(scheduler)
        if "held" in output.num_scheduled_tokens:
            break
    assert "held" in output.num_scheduled_tokens
    assert len(workers.orders) == 2


def test_who_waits_with_kv_blocks_for_room_gets_it(build: Any) -> None:
    """A hot adapter with new requests in every step fills the only slot."""
    from scheduler_harness import make_request, settle, settled_step

    scheduler, workers = build(max_loras=1, options={"skip_window": 5, "max_skip_s": 60})
    for adapter in (1, 2):
        workers.bring_in(adapter)
    settle(scheduler)
    scheduler.add_request(make_request("hot", 10, 5, adapter=1))
    settled_step(scheduler)
    hold_blocks(scheduler, make_request("held", 40, 8, adapter=2))
    for number in range(40):
        scheduler.add_request(make_request(f"hot{number}", 10, 5, adapter=1))
        output, _ = settled_step(scheduler)
        if "held" in output.num_scheduled_tokens:
            return
    raise AssertionError("it never ran")


def test_who_waits_with_kv_blocks_is_in_flight(build: Any) -> None:
    from scheduler_harness import make_request, settle, settled_step

    scheduler, workers = build(options={"max_inflight_tokens": {"busy": 80}})
    workers.bring_in(1)
    settle(scheduler)
    workers.hold(2)
    hold_blocks(scheduler, make_request("held", 40, 8, adapter=2, adapter_name="busy"))
    scheduler.add_request(make_request("next", 40, 8, adapter=1, adapter_name="busy"))
    for _ in range(5):
        assert not settled_step(scheduler)[0].num_scheduled_tokens
    workers.release(2)


def test_an_adapter_that_one_rank_loses_while_another_loads_is_ordered_again_at_once(build: Any, clock: Any) -> None:
    from scheduler_harness import checker, finished, make_request, run_until, settle, settled_step

    from vllm_loraserve.engine import channel

    scheduler, workers = build(tp=2)
    workers.hold(1, rank=1)
    scheduler.add_request(make_request("r", adapter=1))
    for _ in range(5):
        settled_step(scheduler)
    with workers._lock:
        workers._report(channel.Gone(0, 1))
    settle(scheduler)
    settled_step(scheduler)
    workers.release(1, rank=1)
    begin = clock.now
    run_until(scheduler, finished(scheduler), checker(scheduler))
    assert clock.now - begin < 1
    assert len(workers.orders) == 2


def test_adapters_in_back_off_count_for_nobody(build: Any, clock: Any) -> None:
    """As many as may be ahead fail again and again; a first try does not wait for their back-offs."""
    from scheduler_harness import checker, make_request, run_until

    scheduler, workers = build(options={"prefetch": 2, "concurrent_loads": 2, "load_retries": 8})
    for adapter in (1, 2):
        workers.fails[adapter] = [("the share is away", True)] * 9
        scheduler.add_request(make_request(f"away{adapter}", adapter=adapter))
    scheduler.add_request(make_request("good", adapter=3))
    begin = clock.now
    run_until(scheduler, lambda: "good" not in scheduler.requests, checker(scheduler))
    assert clock.now - begin < 0.4, "before the first back-off is over"


def test_the_oldest_wait_goes_back_to_nothing(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, run_until, settled_step

    scheduler, workers = build()
    workers.hold(1)
    scheduler.add_request(make_request("r", adapter=1))
    for _ in range(100):
        settled_step(scheduler)
    assert scheduler.counters.oldest_wait_s > 0.5
    workers.release(1)
    run_until(scheduler, finished(scheduler), checker(scheduler))
    scheduler.add_request(make_request("base", max_tokens=3))
    settled_step(scheduler)
    assert scheduler.counters.oldest_wait_s == 0


def test_no_more_is_loaded_ahead_than_the_host_tier_holds(build: Any) -> None:
    """Else what is loaded pushes out what was loaded and has not run, which is loaded again, without end."""
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    adapters = range(1, 31)
    ranks = dict.fromkeys(adapters, 128)
    scheduler, workers = build(ranks=ranks, rank_rows=128, host_rows=4 * 128, max_loras=8, prepared=8)
    workers.in_use = lambda: set(scheduler.room.users)
    for adapter in adapters:
        scheduler.add_request(make_request(f"r{adapter}", adapter=adapter))
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert set(reasons(outputs).values()) == {"length"}
    assert [order.adapter for order in workers.orders] == list(adapters)
