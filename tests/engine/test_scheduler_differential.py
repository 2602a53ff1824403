"""With no request of an adapter, every decision is vLLM's own, step by step, on random workloads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def run(scheduler: Any, seed: int, steps: int, adapters: int = 0, asynchronous: bool = False) -> list[dict[str, Any]]:
    """A workload drawn from `seed` alone: arrivals, shared prefixes, priorities, aborts; the decisions of each step."""
    from scheduler_harness import decisions, make_request, model_output
    from vllm.v1.request import RequestStatus

    rng = random.Random(seed)
    log: list[dict[str, Any]] = []
    pending: list[tuple[Any, Any]] = []
    names = 0
    for at in range(steps):
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
            )
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


def test_the_comparison_sees_a_difference(model_dir: Path) -> None:
    """Adapters with room for one at a time: there the schedules differ, so the comparison above can fail."""
    from scheduler_harness import make_scheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_loraserve.engine.scheduler import RankAwareScheduler

    shape: dict[str, Any] = {"max_loras": 1, "options": {"skip_window": 0, "max_skip_s": 0}}
    mine = run(make_scheduler(RankAwareScheduler, str(model_dir), **shape), 1, 150, adapters=4)
    theirs = run(make_scheduler(Scheduler, str(model_dir), **shape), 1, 150, adapters=4)
    assert mine != theirs
