"""With no request of an adapter, every decision is vLLM's own, step by step, on random workloads."""

from __future__ import annotations

import random
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


class Grammar:
    """Of structured output: takes every token, and all drafts but the last."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens[:-1]

    def is_terminated(self) -> bool:
        return False


def run(
    scheduler: Any,
    seed: int,
    steps: int,
    adapters: int = 0,
    asynchronous: bool = False,
    drafts: int = 0,
    structured: bool = False,
) -> list[dict[str, Any]]:
    """A workload drawn from `seed` alone: arrivals, shared prefixes, priorities, aborts, grammars that take some steps
    to compile or can't be; the decisions of each step."""
    from scheduler_harness import decisions, draft, make_request, model_output
    from vllm.v1.request import RequestStatus

    rng = random.Random(seed)
    log: list[dict[str, Any]] = []
    pending: list[tuple[Any, Any]] = []
    compiling: list[tuple[int, Future[Any]]] = []
    names = 0
    for at in range(steps):
        for done_at, future in compiling:
            if done_at == at:
                future.set_result(Grammar()) if rng.random() < 0.9 else future.set_exception(ValueError("no grammar"))
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 5))):
            prefix = [rng.randrange(3)] * rng.randrange(0, 64)
            prompt = prefix + [rng.randrange(100) for _ in range(rng.randrange(1, 300))]
            request = make_request(
                f"r{names}",
                prompt,
                rng.randrange(1, 40),
                priority=rng.randrange(3),
                arrival=float(at),
                adapter=rng.randrange(0, adapters + 1) if adapters else 0,
                grammar=Future() if structured and rng.random() < 0.5 else None,
            )
            if request.structured_output_request is not None:
                compiling.append((at + rng.randrange(1, 12), request.structured_output_request._grammar))
            names += 1
            scheduler.add_request(request)
        if rng.random() < 0.1 and scheduler.requests:
            victim = rng.choice(sorted(scheduler.requests))
            scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
        if rng.random() < 0.01:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        output = scheduler.schedule()
        log.append(decisions(output) | {"waiting": len(scheduler.waiting), "running": len(scheduler.running)})
        pending.append((output, model_output(scheduler, output)))
        # Async scheduling: a step is scheduled before the output of the one before is known.
        if len(pending) > int(asynchronous):
            done, result = pending.pop(0)
            scheduler.update_from_output(done, result)
            # With async scheduling the worker keeps them, and the scheduler counts on as many.
            if drafts and not asynchronous:
                draft(scheduler, done, drafts)
    return log


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_loraserve.engine import channel

    monkeypatch.setattr(channel, "address_of", lambda *_: None)


SHAPES = [
    {"blocks": 1000},
    {"blocks": 60, "max_seqs": 32},  # preempts
    {"blocks": 200, "policy": "priority", "max_seqs": 24},
    {"blocks": 1000, "chunked": False, "max_tokens": 2048},
    {"blocks": 300, "caching": False, "max_tokens": 64},
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_same_schedule_without_adapters(model_dir: Path, shape: dict[str, Any], seed: int, asynchronous: bool) -> None:
    from scheduler_harness import make_scheduler
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_loraserve.engine.scheduler import RankAwareAsyncScheduler, RankAwareScheduler

    ours, stock = (RankAwareAsyncScheduler, AsyncScheduler) if asynchronous else (RankAwareScheduler, Scheduler)
    mine = run(make_scheduler(ours, str(model_dir), **shape), seed, 150, asynchronous=asynchronous)
    theirs = run(make_scheduler(stock, str(model_dir), **shape), seed, 150, asynchronous=asynchronous)
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a == b, f"step {number}"
    assert sum(sum(s["tokens"].values()) for s in theirs) > 1000


@pytest.mark.parametrize("shape", [{"blocks": 1000}, {"blocks": 60, "max_seqs": 32}], ids=["room", "preempts"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("drafts", "structured"), [(3, False), (0, True), (3, True)], ids=["drafts", "structured", "both"]
)
def test_same_schedule_with_drafts_and_structured_output(
    model_dir: Path, shape: dict[str, Any], asynchronous: bool, drafts: int, structured: bool
) -> None:
    """Without adapters: the same steps, with the same draft tokens in them and the same requests kept out of them while
    their grammar is compiled."""
    from scheduler_harness import make_scheduler
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_loraserve.engine.scheduler import RankAwareAsyncScheduler, RankAwareScheduler

    ours, stock = (RankAwareAsyncScheduler, AsyncScheduler) if asynchronous else (RankAwareScheduler, Scheduler)
    workload: dict[str, Any] = {"asynchronous": asynchronous, "drafts": drafts, "structured": structured}
    for seed in range(3):
        mine = run(make_scheduler(ours, str(model_dir), drafts=drafts, **shape), seed, 150, **workload)
        theirs = run(make_scheduler(stock, str(model_dir), drafts=drafts, **shape), seed, 150, **workload)
        for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert a == b, f"step {number}"
        assert sum(sum(step["tokens"].values()) for step in theirs) > 1000
        assert not drafts or sum(len(step["drafts"]) for step in theirs) > 100


def test_drafts_of_adapters_are_never_cut(build: Any) -> None:
    """A decode with its drafts is no prefill: the work budget leaves it whole."""
    from scheduler_harness import checker, draft, finished, make_request, model_output, settle

    scheduler, workers = build(
        ranks={1: 128}, drafts=3, options={"lora_cost_per_rank": 1.0, "lora_share": 0.01}, caching=False
    )
    workers.bring_in(1)
    settle(scheduler)
    for n in range(3):
        scheduler.add_request(make_request(f"r{n}", 20, 30, adapter=1))
    seen = 0
    done = finished(scheduler)
    for _ in range(500):
        if done():
            break
        output = scheduler.schedule()
        checker(scheduler)(output)
        for name, drafts in output.scheduled_spec_decode_tokens.items():
            assert output.num_scheduled_tokens[name] == 1 + len(drafts)
            seen += len(drafts) == 3
        scheduler.update_from_output(output, model_output(scheduler, output))
        draft(scheduler, output, 3)
    assert done()
    assert seen > 10


def test_the_comparison_sees_a_difference(model_dir: Path) -> None:
    """Adapters with room for one at a time: there the schedules differ, so the comparison above can fail."""
    from scheduler_harness import make_scheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_loraserve.engine.scheduler import RankAwareScheduler

    shape: dict[str, Any] = {"max_loras": 1, "options": {"skip_window": 0, "max_skip_s": 0}}
    mine = run(make_scheduler(RankAwareScheduler, str(model_dir), **shape), 1, 150, adapters=4)
    theirs = run(make_scheduler(Scheduler, str(model_dir), **shape), 1, 150, adapters=4)
    assert mine != theirs
