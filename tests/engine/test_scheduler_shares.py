"""What a step may spend on adapters, and what each tenant gets of it: work budget, weighted shares, limits. Real
channel, made-up workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def test_high_rank_prefill_is_cut_while_others_decode(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, run_until, settled_step

    scheduler, _ = build(
        ranks={1: 128, 2: 8}, max_tokens=1024, caching=False, options={"lora_cost_per_rank": 1 / 256, "lora_share": 0.1}
    )
    scheduler.add_request(make_request("alone", 1000, 1, adapter=1))
    assert settled_step(scheduler)[0].num_scheduled_tokens == {}, "its load has only begun"
    assert settled_step(scheduler)[0].num_scheduled_tokens == {"alone": 1000}
    run_until(scheduler, finished(scheduler), checker(scheduler))

    scheduler.add_request(make_request("decoding", 10, 60, adapter=2))
    run_until(
        scheduler, lambda: len(scheduler.running) == 1 and not scheduler.running[0].is_prefill_chunk, lambda _: None
    )
    scheduler.add_request(make_request("burst", 1000, 1, adapter=1))
    chunks = []
    while "burst" in scheduler.requests:
        output, _ = settled_step(scheduler)
        assert output.num_scheduled_tokens.get("decoding") == 1
        chunks.append(output.num_scheduled_tokens.get("burst", 0))
    # 0.1 * 1024 base tokens less one decode of rank 8, at half a base token for a token of rank 128.
    assert sum(chunks) == 1000
    assert max(chunks) == int((0.1 * 1024 - 8 / 256) / 0.5)
    assert scheduler.counters.cut_chunks >= len(chunks) - 2


def test_work_budget_lets_prefill_progress_under_many_decodes(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    scheduler, _ = build(ranks={1: 256}, max_tokens=64, options={"lora_cost_per_rank": 1.0, "lora_share": 0.01})
    for i in range(6):
        scheduler.add_request(make_request(f"r{i}", 100, 10, adapter=1))
    assert len(reasons(run_until(scheduler, finished(scheduler), checker(scheduler)))) == 6


def test_weighted_shares(build: Any) -> None:
    """Two tenants with long queues: what is admitted first follows their weights."""
    from scheduler_harness import make_request, settle, settled_step

    scheduler, workers = build(max_seqs=4, options={"shares": {"gold": 3.0, "iron": 1.0}})
    for adapter in (1, 2):
        workers.bring_in(adapter)
    settle(scheduler)
    for i in range(80):
        scheduler.add_request(make_request(f"iron{i}", 16, 1, adapter=1, adapter_name="iron/a"))
    for i in range(80):
        scheduler.add_request(make_request(f"gold{i}", 16, 1, adapter=2, adapter_name="gold/a"))
    started: list[str] = []
    while len(started) < 80:
        output, _ = settled_step(scheduler)
        assert output.scheduled_new_reqs
        started += [r.req_id for r in output.scheduled_new_reqs]
    gold = sum(name.startswith("gold") for name in started[:80])
    assert 55 <= gold <= 65
    assert not workers.orders


def test_what_a_request_did_not_generate_goes_back_to_its_share(build: Any) -> None:
    """Clients that leave early, or ask for the most they may have, are charged with what they had."""
    from scheduler_harness import make_request, settle, settled_step
    from vllm.v1.request import RequestStatus

    scheduler, workers = build(max_seqs=2, options={"shares": {"*": 1.0}})
    workers.bring_in(1)
    settle(scheduler)
    settled_step(scheduler)
    scheduler.add_request(make_request("early", 16, 1000, adapter=1, adapter_name="a"))
    for _ in range(4):
        settled_step(scheduler)
    assert scheduler.shares.time("a") == 1016
    scheduler.finish_requests("early", RequestStatus.FINISHED_ABORTED)
    assert scheduler.shares.time("a") == 16 + 4
    scheduler.add_request(make_request("never", 16, 1000, adapter=1, adapter_name="a"))
    scheduler.finish_requests("never", RequestStatus.FINISHED_ABORTED)
    assert scheduler.shares.time("a") == 16 + 4, "it did not run"
    assert not scheduler._charged


def test_a_preempted_request_is_charged_once(build: Any) -> None:
    from scheduler_harness import checker, finished, make_request, run_until

    scheduler, _ = build(blocks=20, max_seqs=8, caching=False, options={"shares": {"*": 1.0}})
    charged: list[int] = []
    preempted: set[str] = set()

    class Noted:
        weights = scheduler.shares.weights

        def time(self, name: str) -> float:
            return 0.0

        def admit(self, name: str, tokens: int) -> None:
            charged.append(tokens)

        def refund(self, name: str, tokens: int) -> None:
            charged.append(-tokens)

    scheduler.shares = Noted()
    for i in range(10):
        scheduler.add_request(make_request(f"r{i}", 40, 40, adapter=1 + i % 2))

    def check(output: Any) -> None:
        checker(scheduler)(output)
        preempted.update(output.preempted_req_ids or ())

    run_until(scheduler, finished(scheduler), check)
    assert preempted
    assert sum(charged) == 10 * (40 + 40)
    assert not scheduler._charged


def test_over_its_limit_an_adapter_queues_then_gets_429(build: Any, clock: Any) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    from vllm_loraserve.engine.request_errors import parse

    scheduler, _ = build(options={"max_inflight_tokens": {"busy": 130}, "limit_wait_s": 3}, max_seqs=16)
    for i in range(3):
        scheduler.add_request(make_request(f"busy{i}", 20, 30, adapter=1, adapter_name="busy"))
    scheduler.add_request(make_request("other", 20, 30, adapter=2))
    most = 0

    def check(output: Any) -> None:
        nonlocal most
        checker(scheduler)(output)
        most = max(most, sum(r.lora_request.lora_name == "busy" for r in scheduler.running))

    outputs = run_until(scheduler, finished(scheduler), check)
    assert most == 2
    assert set(reasons(outputs).values()) == {"length"}

    scheduler.add_request(make_request("long", 20, 2000, adapter=1, adapter_name="busy"))
    scheduler.add_request(make_request("late", 20, 30, adapter=1, adapter_name="busy"))
    begin = clock.now
    outputs = run_until(scheduler, lambda: "late" not in scheduler.requests, checker(scheduler))
    assert 3 < clock.now - begin < 3.2
    error = parse(next(o.stop_reason for o in outputs if o.request_id == "late"))
    assert error is not None
    assert error[0] == 429
    assert "busy" in error[1]
    assert scheduler.counters.limited_requests == 1


def test_429_counts_from_when_the_limit_alone_keeps_a_request_waiting(build: Any, clock: Any) -> None:
    """It waited long for its adapter and for room before; that is nobody's going over a limit."""
    from scheduler_harness import checker, make_request, run_until, settle, settled_step

    scheduler, workers = build(
        max_loras=1, options={"max_inflight_tokens": {"acme": 100}, "limit_wait_s": 3, "max_skip_s": 1e6}
    )
    workers.bring_in(1)
    settle(scheduler)
    scheduler.add_request(make_request("other", 20, 400, adapter=1))
    settled_step(scheduler)
    workers.hold(2)
    for name in ("first", "second"):
        scheduler.add_request(make_request(name, 20, 60, adapter=2, adapter_name="acme/a"))
    for _ in range(5):
        settled_step(scheduler)
        clock.advance(2)
    workers.release(2)
    run_until(scheduler, lambda: "other" not in scheduler.requests, checker(scheduler))
    settled_step(scheduler)
    begin = clock.now
    assert [r.request_id for r in scheduler.running] == ["first"]
    for _ in range(20):
        settled_step(scheduler)
        assert "second" in scheduler.requests, "it waited for thirteen seconds, and none of them for the limit"
    clock.advance(3)
    run_until(scheduler, lambda: "second" not in scheduler.requests, checker(scheduler))
    assert 3 < clock.now - begin < 3.5


def test_who_was_preempted_gets_no_429(build: Any, clock: Any) -> None:
    """Its first tokens may have been streamed."""
    from scheduler_harness import checker, finished, make_request, reasons, run_until, settle, settled_step

    scheduler, workers = build(
        options={"max_inflight_tokens": {"acme": 200}, "limit_wait_s": 1}, blocks=7, max_seqs=4, caching=False
    )
    for adapter in (1, 2):
        workers.bring_in(adapter)
    settle(scheduler)
    for adapter in (1, 2):
        scheduler.add_request(make_request(f"r{adapter}", 20, 50, adapter=adapter, adapter_name=f"acme/{adapter}"))
    outputs: list[Any] = []
    while not any(request.num_preemptions for request in scheduler.requests.values()):
        outputs += settled_step(scheduler)[1]
    assert scheduler.requests["r2"].num_preemptions == 1
    scheduler.limits.most["acme"] = 100
    settled_step(scheduler)
    (lane,) = scheduler.waiting.lanes.values()
    assert lane.over_since is not None
    clock.advance(10)
    outputs += run_until(scheduler, finished(scheduler), checker(scheduler))
    assert reasons(outputs) == {"r1": "length", "r2": "length"}


def test_the_work_budget_takes_its_cost_from_a_file_of_operating_points(build: Any, tmp_path: Path) -> None:
    from scheduler_harness import make_request, run_until, settled_step

    from vllm_loraserve.cluster.operating_points import OperatingPoints, StepCost, save

    file = tmp_path / "points.json"
    step = StepCost(prefill_token=1e-5, prefill_token_rank=1e-7, decode_token_rank=1e-7)
    save(OperatingPoints(points={8: 1000.0}, step_cost=step, measured=True), file)
    scheduler, _ = build(
        ranks={1: 128},
        max_tokens=1024,
        caching=False,
        options={"operating_points": str(file), "lora_share": 0.1},
    )
    scheduler.add_request(make_request("decoding", 10, 60))
    run_until(scheduler, lambda: any(not r.is_prefill_chunk for r in scheduler.running), lambda _: None)
    scheduler.add_request(make_request("burst", 1000, 1, adapter=1))
    chunks = []
    while "burst" in scheduler.requests:
        output, _ = settled_step(scheduler)
        chunks.append(output.num_scheduled_tokens.get("burst", 0))
    assert max(chunks) == int(0.1 * 1024 / (128 * 0.01))


def test_a_pooling_request_whose_adapter_cannot_be_had_ends_as_pooling_requests_do(build: Any) -> None:
    """vLLM's front end takes an output without pooling data for that of a generating request, and dies of it."""
    from scheduler_harness import checker, finished, make_request, run_until

    scheduler, workers = build()
    workers.fails[1] = [("it is truncated", False)]
    scheduler.add_request(make_request("pool", adapter=1, pooling=True))
    (output,) = run_until(scheduler, finished(scheduler), checker(scheduler))
    assert str(output.finish_reason) == "error"
    assert output.pooling_output is not None
    assert output.pooling_output.numel() == 0


def test_short_prefill_of_high_rank_takes_two_steps_and_lets_low_ranks_go_between(build: Any) -> None:
    """So what arrives while it runs waits for half of it; for JOIN_STEPS steps at most, or it would never end."""
    from scheduler_harness import make_request, run_until, settled_step
    from vllm.v1.request import RequestStatus

    from vllm_loraserve.engine.turns import JOIN_STEPS

    scheduler, _ = build(ranks={1: 128, 2: 8}, max_tokens=1024, caching=False)
    scheduler.add_request(make_request("decoding", 10, 60, adapter=2))
    scheduler.add_request(make_request("warms", 4, 1, adapter=1))
    run_until(
        scheduler,
        lambda: len(scheduler.requests) == 1 and not scheduler.running[0].is_prefill_chunk,
        lambda _: None,
    )
    scheduler.add_request(make_request("high", 64, 8, adapter=1))
    while not (chunk := settled_step(scheduler)[0].num_scheduled_tokens).get("high"):
        assert chunk == {"decoding": 1}
    assert chunk == {"decoding": 1, "high": 32}
    for number in range(JOIN_STEPS):
        scheduler.add_request(make_request(f"low{number}", 64, 1, adapter=2))
        assert settled_step(scheduler)[0].num_scheduled_tokens == {"decoding": 1, f"low{number}": 64}
    scheduler.add_request(make_request("late", 64, 1, adapter=2))
    assert settled_step(scheduler)[0].num_scheduled_tokens == {"decoding": 1, "high": 32, "late": 64}
    assert scheduler.turns._stood_back
    scheduler.finish_requests("high", RequestStatus.FINISHED_ABORTED)
    assert not scheduler.turns._stood_back
