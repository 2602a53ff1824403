"""The scheduler with adapters: readiness, room, work, ageing, fairness, faults; real channel, made-up workers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture
def build(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """build(ranks=..., rank_rows=..., tp=..., **make_scheduler's) -> (scheduler, workers)."""
    from fake_workers import FakeWorkers
    from scheduler_harness import make_scheduler

    from vllm_loraserve.engine import channel
    from vllm_loraserve.engine.scheduler import RankAwareScheduler

    made: list[Any] = []

    def make(
        *,
        ranks: dict[int, int] | None = None,
        rank_rows: int | None = None,
        tp: int = 1,
        prepared: int | None = None,
        cls: type = RankAwareScheduler,
        **options: Any,
    ) -> tuple[Any, Any]:
        address = f"ipc://{tmp_path}/channel{len(made)}"
        monkeypatch.setattr(channel, "address_of", lambda _, purpose="loads": f"{address}-{purpose}")
        workers = FakeWorkers(f"{address}-loads", tp, rank_rows=rank_rows, prepared=prepared)
        workers.ranks.update(ranks or {})
        scheduler = make_scheduler(cls, str(model_dir), world_size=tp, **options)
        assert scheduler.readiness.world_size == tp
        made.append((scheduler, workers))
        return scheduler, workers

    yield make
    for scheduler, workers in made:
        scheduler._end.close()
        workers.close()


def checker(scheduler: Any) -> Callable[[Any], None]:
    """Invariants of every step: room is never overdrawn, nothing runs that isn't ready."""

    def check(output: Any) -> None:
        adapters = {r.lora_request.lora_int_id: r.lora_request for r in scheduler.running if r.lora_request}
        assert len(adapters) <= scheduler.room.slots
        rows = sum(scheduler.room.rows_of(scheduler.readiness.rank_of(a)) for a in adapters)
        assert scheduler.room.rank_rows is None or rows <= scheduler.room.rank_rows
        for name in output.num_scheduled_tokens:
            if name in scheduler.requests and (lora := scheduler.requests[name].lora_request) is not None:
                assert scheduler.readiness.rank_of(lora.lora_int_id) > 0

    return check


def finished(scheduler: Any) -> Callable[[], bool]:
    return lambda: not scheduler.requests


def reasons(outputs: list[Any]) -> dict[str, str]:
    return {o.request_id: str(o.finish_reason) for o in outputs if o.finish_reason is not None}


def test_a_load_blocks_nobody_else(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    scheduler, workers = build()
    workers.delays[(1, 0)] = 0.5
    scheduler.add_request(make_request("cold", adapter=1))
    scheduler.add_request(make_request("base"))
    scheduler.add_request(make_request("warm", adapter=2))
    begin = time.monotonic()
    outputs = run_until(scheduler, lambda: len(scheduler.requests) == 1, checker(scheduler))
    assert time.monotonic() - begin < 0.5
    assert set(reasons(outputs)) == {"base", "warm"}
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"cold": "length"}
    assert scheduler.readiness.counters.loads == 2
    assert scheduler.readiness.counters.stalls == 0


def test_with_tensor_parallel_every_rank_must_be_ready(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request, step

    scheduler, workers = build(tp=2)
    workers.delays[(1, 1)] = 0.3
    scheduler.add_request(make_request("r", adapter=1))
    begin = time.monotonic()
    while time.monotonic() - begin < 0.2:
        assert step(scheduler)[0].total_num_scheduled_tokens == 0
        time.sleep(0.01)
    run_until(scheduler, finished(scheduler), checker(scheduler))
    assert time.monotonic() - begin >= 0.3


def test_async_scheduling(build: Any) -> None:
    from scheduler_harness import make_request, model_output

    from vllm_loraserve.engine.scheduler import RankAwareAsyncScheduler

    scheduler, _ = build(cls=RankAwareAsyncScheduler, rank_rows=16)
    for i in range(12):
        scheduler.add_request(make_request(f"r{i}", adapter=1 + i % 4, max_tokens=5))
    pending: list[Any] = []
    deadline = time.monotonic() + 10
    check = checker(scheduler)
    while scheduler.requests:
        assert time.monotonic() < deadline
        output = scheduler.schedule()
        check(output)
        pending.append((output, model_output(scheduler, output)))
        if len(pending) > 1:
            scheduler.update_from_output(*pending.pop(0))
        if not output.total_num_scheduled_tokens:
            while pending:
                scheduler.update_from_output(*pending.pop(0))
            time.sleep(0.001)


def test_a_failed_load_ends_only_its_requests(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

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


def test_a_passing_failure_is_tried_again_with_back_off(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    scheduler, workers = build()
    workers.fails[1] = [("the share is away", True)]
    scheduler.add_request(make_request("r", adapter=1))
    begin = time.monotonic()
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"r": "length"}
    assert time.monotonic() - begin >= 0.5
    assert scheduler.readiness.counters.retries == 1


def test_retries_end(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    scheduler, workers = build(options={"load_retries": 1})
    workers.fails[1] = [("the share is away", True)] * 5
    scheduler.add_request(make_request("r", adapter=1))
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"r": "error"}
    assert len(workers.orders) == 2


def test_a_hanging_load_ends_after_its_time(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    from vllm_loraserve.engine.request_errors import parse

    scheduler, workers = build(options={"load_timeout_s": 0.2, "load_retries": 0, "concurrent_loads": 1})
    workers.hangs.add(1)
    scheduler.add_request(make_request("stuck", adapter=1))
    scheduler.add_request(make_request("behind", adapter=2))
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"stuck": "error", "behind": "length"}
    error = parse(next(o.stop_reason for o in outputs if o.request_id == "stuck"))
    assert error is not None
    assert error[0] == 503
    assert "not loaded within 0.2 s" in error[1]


def test_an_adapter_too_large_for_the_arena_is_refused(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    scheduler, _ = build(ranks={1: 128}, rank_rows=64)
    scheduler.add_request(make_request("big", adapter=1))
    scheduler.add_request(make_request("small", adapter=2))
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"big": "error", "small": "length"}
    reason = next(o.stop_reason for o in outputs if o.request_id == "big")
    assert "of rank 128 does not fit the arena, which holds 64 rank rows" in reason


def test_an_adapter_that_goes_while_requests_wait_is_loaded_again(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request, step

    scheduler, workers = build(max_loras=1)
    scheduler.add_request(make_request("running", adapter=2, max_tokens=1500))
    run_until(scheduler, lambda: bool(scheduler.running), checker(scheduler))
    scheduler.add_request(make_request("waiting", adapter=1))
    run_until(scheduler, lambda: scheduler.readiness.is_ready(1, "/adapters/1"), checker(scheduler))
    workers.gone(1)
    time.sleep(0.05)
    step(scheduler)
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"running": "length", "waiting": "length"}
    assert [order.adapter for order in workers.orders] == [2, 1, 1]


def test_a_replaced_adapter_waits_for_the_requests_on_its_old_content(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    scheduler, workers = build()
    scheduler.add_request(make_request("old", adapter=1, path="/v1", max_tokens=20))
    run_until(scheduler, lambda: bool(scheduler.running), checker(scheduler))
    scheduler.add_request(make_request("new", adapter=1, path="/v2"))
    order: list[str] = []

    def check(output: Any) -> None:
        assert not {"old", "new"} <= set(output.num_scheduled_tokens)
        order.extend(output.num_scheduled_tokens)

    run_until(scheduler, finished(scheduler), check)
    assert order.index("new") == len([name for name in order if name == "old"])
    assert len(workers.orders) == 2


def test_abort_storm_leaves_nothing_behind(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request, step
    from vllm.v1.request import RequestStatus

    scheduler, workers = build()
    workers.hangs.update(range(50, 60))
    for round_ in range(5):
        names = [f"r{round_}-{i}" for i in range(100)]
        for i, name in enumerate(names):
            scheduler.add_request(make_request(name, adapter=1 + i % 60))
        step(scheduler)
        scheduler.finish_requests(names[::2], RequestStatus.FINISHED_ABORTED)
        step(scheduler)
        scheduler.finish_requests(names[1::2], RequestStatus.FINISHED_ABORTED)
        assert len(scheduler.waiting) == 0
        assert not scheduler.waiting.lanes
    assert not scheduler.requests
    scheduler.add_request(make_request("after", adapter=3))
    assert reasons(run_until(scheduler, finished(scheduler), checker(scheduler))) == {"after": "length"}


@pytest.mark.slow
def test_many_requests_for_many_adapters_with_little_room(build: Any) -> None:
    """1,000 requests, 500 adapters, room for 8: all finish, in order within the ageing bound, memory flat."""
    from fake_workers import run_until
    from scheduler_harness import make_request

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

    outputs = run_until(scheduler, finished(scheduler), check, seconds=100)
    assert len(reasons(outputs)) == 1000
    assert set(reasons(outputs).values()) == {"length"}
    # r0 to r499 are the first of each adapter: none is overtaken by more of them than the window and the slots allow.
    first = [number for number in started if number < 500]
    overtaken = [sum(other > number for other in first[:position]) for position, number in enumerate(first)]
    assert max(overtaken) <= 16 + 8
    assert started.index(500) < started.index(100), "a request whose adapter is in use does not wait for its turn"
    assert not scheduler.waiting._where
    assert not scheduler.room.users or not scheduler.running


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_stream_of_hot_adapters_starves_nobody(build: Any, policy: str) -> None:
    """Two hot adapters fill the slots, with new requests for them in every step; a third gets its turn."""
    from scheduler_harness import make_request, step

    scheduler, _ = build(max_loras=2, max_seqs=8, policy=policy, options={"skip_window": 20, "max_skip_s": 60})
    check = checker(scheduler)
    names = iter(range(10**6))
    admitted_before: int | None = None
    cold_at = None
    for at in range(400):
        for adapter in (1, 2):
            scheduler.add_request(make_request(f"hot{next(names)}", 10, 5, adapter=adapter, arrival=at))
        if at == 30:
            scheduler.add_request(make_request("cold", 10, 5, adapter=3, arrival=at))
        if at >= 30 and not scheduler.readiness.is_ready(3, "/adapters/3"):
            # How many steps the load takes depends on the machine.
            admitted_before = scheduler.counters.admitted
        output, _ = step(scheduler)
        check(output)
        if not output.total_num_scheduled_tokens:
            time.sleep(0.005)
        if "cold" in output.num_scheduled_tokens:
            cold_at = scheduler.counters.admitted
            break
    assert cold_at is not None, "the cold request never ran"
    assert admitted_before is not None
    # The window, plus what the other adapter admits while one of them drains (at most its share of five steps).
    assert cold_at - admitted_before <= 20 + 8 * 8
    assert scheduler.counters.drains > 0 or policy == "priority"
    assert 0 < scheduler.counters.overtakes <= cold_at - admitted_before


def test_room_is_counted_in_rank_rows(build: Any) -> None:
    """Eight slots, but rows for one adapter of rank 64 or eight of rank 8."""
    from fake_workers import run_until
    from scheduler_harness import make_request

    scheduler, _ = build(ranks={1: 64, 2: 60}, rank_rows=64, max_loras=8)
    together: list[set[int]] = []

    def check(output: Any) -> None:
        checker(scheduler)(output)
        together.append({r.lora_request.lora_int_id for r in scheduler.running})

    for i in range(1, 9):
        # The small ones run long enough to meet, however far apart a busy machine loads them.
        scheduler.add_request(make_request(f"r{i}", max_tokens=100 if i < 3 else 1000, adapter=i))
    run_until(scheduler, finished(scheduler), check)
    assert not any({1, 2} <= running for running in together)
    assert any(len(running) == 6 for running in together), "the small ones fit together"


def test_a_pinned_adapter_keeps_its_rows_while_others_run(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    scheduler, workers = build(ranks={1: 32, 2: 24, 3: 16, 4: 64}, rank_rows=64, max_loras=8)
    scheduler.add_request(make_request("first", max_tokens=4, adapter=1))
    run_until(scheduler, finished(scheduler), checker(scheduler))
    workers.pin(1)
    run_until(scheduler, lambda: 1 in scheduler.readiness.pinned, checker(scheduler))
    together: list[set[int]] = []

    def check(output: Any) -> None:
        checker(scheduler)(output)
        together.append({r.lora_request.lora_int_id for r in scheduler.running})

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


def test_who_comes_back_with_kv_blocks_takes_room_in_the_same_step(build: Any) -> None:
    """vLLM admits such requests before the waiting queue and past it."""
    from fake_workers import run_until
    from scheduler_harness import make_request

    scheduler, _ = build(max_loras=1)
    for adapter in (1, 2):
        scheduler.add_request(make_request(f"first{adapter}", adapter=adapter))
    run_until(scheduler, finished(scheduler), checker(scheduler))
    scheduler._survey(time.monotonic())
    scheduler.work.spend(100, 8)
    spent = scheduler.work.spent
    assert scheduler._handle_blocked_waiting_request(make_request("back", adapter=1))
    assert not scheduler.room.fits(2, 8)
    assert scheduler.work.spent == spent > 0, "the step's budget goes on"


def test_high_rank_prefill_is_cut_while_others_decode(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request, step

    scheduler, _ = build(
        ranks={1: 128, 2: 8}, max_tokens=1024, caching=False, options={"lora_cost_per_rank": 1 / 256, "lora_share": 0.1}
    )
    scheduler.add_request(make_request("alone", 1000, 1, adapter=1))
    run_until(scheduler, lambda: scheduler.readiness.is_ready(1, "/adapters/1"), lambda _: None)
    assert step(scheduler)[0].num_scheduled_tokens in ({"alone": 1000}, {})
    run_until(scheduler, finished(scheduler), checker(scheduler))

    scheduler.add_request(make_request("decoding", 10, 60, adapter=2))
    run_until(
        scheduler, lambda: len(scheduler.running) == 1 and not scheduler.running[0].is_prefill_chunk, lambda _: None
    )
    scheduler.add_request(make_request("burst", 1000, 1, adapter=1))
    chunks = []
    while "burst" in scheduler.requests:
        output, _ = step(scheduler)
        assert output.num_scheduled_tokens.get("decoding") == 1
        chunks.append(output.num_scheduled_tokens.get("burst", 0))
    # 0.1 * 1024 base tokens less one decode of rank 8, at half a base token for a token of rank 128.
    assert sum(chunks) == 1000
    assert max(chunks) == int((0.1 * 1024 - 8 / 256) / 0.5)
    assert scheduler.counters.cut_chunks >= len(chunks) - 2


def test_work_budget_lets_prefill_progress_under_many_decodes(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    scheduler, _ = build(ranks={1: 256}, max_tokens=64, options={"lora_cost_per_rank": 1.0, "lora_share": 0.01})
    for i in range(6):
        scheduler.add_request(make_request(f"r{i}", 100, 10, adapter=1))
    assert len(reasons(run_until(scheduler, finished(scheduler), checker(scheduler)))) == 6


def test_weighted_shares(build: Any) -> None:
    """Two tenants with long queues: what is admitted first follows their weights."""
    from scheduler_harness import make_request, step

    scheduler, _ = build(max_seqs=4, options={"shares": {"gold": 3.0, "iron": 1.0}})
    for i in range(80):
        scheduler.add_request(make_request(f"iron{i}", 16, 1, adapter=1, adapter_name="iron/a"))
    for i in range(80):
        scheduler.add_request(make_request(f"gold{i}", 16, 1, adapter=2, adapter_name="gold/a"))
    for adapter in (1, 2):
        while not scheduler.readiness.is_ready(adapter, f"/adapters/{adapter}"):
            scheduler._survey(time.monotonic())
            for report in scheduler._end.reports():
                scheduler.readiness.on_report(report, time.monotonic())
            time.sleep(0.001)
    started: list[str] = []
    while len(started) < 80:
        output, _ = step(scheduler)
        started += [r.req_id for r in output.scheduled_new_reqs]
    gold = sum(name.startswith("gold") for name in started[:80])
    assert 55 <= gold <= 65


def test_over_its_limit_an_adapter_queues_then_gets_429(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    from vllm_loraserve.engine.request_errors import parse

    scheduler, _ = build(options={"max_inflight_tokens": {"busy": 130}, "limit_wait_s": 0.3}, max_seqs=16)
    for i in range(3):
        scheduler.add_request(make_request(f"busy{i}", 20, 30, adapter=1, adapter_name="busy"))
    scheduler.add_request(make_request("other", 20, 30, adapter=2))
    most = 0

    def check(_: Any) -> None:
        nonlocal most
        most = max(most, sum(r.lora_request.lora_name == "busy" for r in scheduler.running))

    outputs = run_until(scheduler, finished(scheduler), check)
    assert most == 2
    assert set(reasons(outputs).values()) == {"length"}

    scheduler.add_request(make_request("long", 20, 2000, adapter=1, adapter_name="busy"))
    scheduler.add_request(make_request("late", 20, 30, adapter=1, adapter_name="busy"))
    outputs = run_until(scheduler, lambda: "late" not in scheduler.requests, lambda _: time.sleep(0.002))
    error = parse(next(o.stop_reason for o in outputs if o.request_id == "late"))
    assert error is not None
    assert error[0] == 429
    assert "busy" in error[1]
    assert scheduler.counters.limited_requests == 1


def test_pause_and_resume_while_loading(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request, step
    from vllm.v1.core.sched.interface import PauseState

    scheduler, _ = build()
    scheduler.add_request(make_request("r", adapter=1))
    step(scheduler)
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    time.sleep(0.05)
    for _ in range(5):
        assert step(scheduler)[0].total_num_scheduled_tokens == 0
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert reasons(run_until(scheduler, finished(scheduler), checker(scheduler))) == {"r": "length"}


def test_preemption_with_adapters(build: Any) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    scheduler, _ = build(blocks=20, max_seqs=8, rank_rows=16, caching=False)
    for i in range(20):
        scheduler.add_request(make_request(f"r{i}", 40, 40, adapter=i % 4))
    outputs = run_until(scheduler, finished(scheduler), checker(scheduler), seconds=30)
    assert set(reasons(outputs).values()) == {"length"}
    assert len(reasons(outputs)) == 20


def test_without_workers_vllm_loads_in_the_step(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request, make_scheduler

    from vllm_loraserve.engine import channel
    from vllm_loraserve.engine.scheduler import RankAwareScheduler

    monkeypatch.setattr(channel, "address_of", lambda *_: None)
    scheduler = make_scheduler(RankAwareScheduler, str(model_dir))
    for i in range(12):
        scheduler.add_request(make_request(f"r{i}", adapter=1 + i % 6))
    outputs = run_until(scheduler, finished(scheduler), lambda _: None)
    assert len(reasons(outputs)) == 12


def test_trace_has_a_line_for_each_step(build: Any, tmp_path: Path) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    file = tmp_path / "deep" / "trace.jsonl"
    scheduler, _ = build(ranks={1: 16}, options={"trace_schedule": str(file)})
    scheduler.add_request(make_request("r", 20, 4, adapter=1))
    scheduler.add_request(make_request("b", 20, 4))
    run_until(scheduler, finished(scheduler), checker(scheduler))
    scheduler.trace.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(line["tokens"] for line in lines) == 2 * (20 + 3)
    assert sum(line["lora_tokens"].get("1", 0) for line in lines) == 20 + 3
    assert {line["rank_rows"] for line in lines} >= {16}
    assert all(line["schedule_us"] > 0 for line in lines)


def test_trace_that_cannot_be_written_costs_no_step(build: Any, tmp_path: Path) -> None:
    from fake_workers import run_until
    from scheduler_harness import make_request

    (tmp_path / "file").write_text("")
    scheduler, _ = build(options={"trace_schedule": str(tmp_path / "file" / "x")})
    scheduler.add_request(make_request("r", adapter=1))
    assert reasons(run_until(scheduler, finished(scheduler), checker(scheduler))) == {"r": "length"}
