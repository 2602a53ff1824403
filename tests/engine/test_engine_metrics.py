"""Totals cross from the scheduler's socket to prometheus text."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


async def test_totals_reach_the_metrics_page(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from vllm_loraserve.engine.channel import Family
    from vllm_loraserve.engine.metrics import Collector, Publisher, Totals, summed
    from vllm_loraserve.engine.readiness import LoadCounters
    from vllm_loraserve.engine.trace import StepCounters

    def count(source: str, n: float) -> tuple[str, dict[str, str], float]:
        return "loraserve:fetches_total", {"source": source, "result": "ok"}, n

    figures = [Family("loraserve:fetches", "Adapters.", "counter", [count("peer", 2.0), count("host", 1.0)])]
    address = f"ipc://{tmp_path}/stats"
    publisher, collector, registry = Publisher(address), Collector(), CollectorRegistry()
    registry.register(collector)
    assert generate_latest(registry) == b""
    steps = StepCounters(steps=5, overtakes=3, oldest_wait_s=1.5)
    loads = LoadCounters(loads=2, load_seconds=0.3, stalls=1)
    steps.observe(16, 0.03)
    steps.observe(64, 0.2)
    loads.load_histogram[3] = 2
    listening = asyncio.create_task(collector.listen(address))
    deadline, now = time.monotonic() + 120, 1000.0
    while collector.totals is None:
        assert time.monotonic() < deadline
        publisher.publish(Totals(steps, loads, 1, 7, 80, summed([figures, figures])), now)
        await asyncio.sleep(0.02)
    assert not publisher.due(now)
    assert publisher.due(now + 10)
    listening.cancel()
    publisher.close()
    text = generate_latest(registry).decode()
    for line in (
        "loraserve:steps_total 5.0",
        'loraserve:fetches_total{result="ok",source="peer"} 4.0',
        'loraserve:fetches_total{result="ok",source="host"} 2.0',
        "loraserve:skips_total 3.0",
        "loraserve:load_stalls_total 1.0",
        "loraserve:oldest_wait_seconds 1.5",
        "loraserve:waiting_adapters 7.0",
        "loraserve:rank_rows_in_use 80.0",
        'loraserve:rank_rows_per_step_bucket{le="16.0"} 1.0',
        'loraserve:rank_rows_per_step_bucket{le="+Inf"} 2.0',
        'loraserve:load_seconds_bucket{le="0.05"} 2.0',
        "loraserve:load_seconds_sum 0.3",
        "loraserve:load_seconds_count 2.0",
        "loraserve:rank_rows_per_step_sum 80.0",
        "loraserve:rank_rows_per_step_count 2.0",
        "loraserve:lora_cost_share_sum 0.23",
        "loraserve:lora_cost_share_count 2.0",
    ):
        assert line in text.splitlines(), text


def test_the_last_totals_say_that_nothing_is_left(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step follows the last request's end, so that a gauge would stay as it was while requests ran."""
    from scheduler_harness import checker, finished, make_request, run_until, settled_step
    from vllm.v1.request import RequestStatus

    from vllm_loraserve.engine.metrics import Publisher

    published: list[Any] = []
    publish = Publisher.publish

    def noted(self: Any, totals: Any, now: float) -> None:
        published.append((totals.rows_in_use, totals.waiting_adapters, totals.loading, totals.steps.oldest_wait_s))
        publish(self, totals, now)

    monkeypatch.setattr(Publisher, "publish", noted)
    scheduler, workers = build()
    workers.hold(2)
    scheduler.add_request(make_request("runs", max_tokens=300, adapter=1))
    scheduler.add_request(make_request("waits", adapter=2))
    run_until(scheduler, lambda: "runs" not in scheduler.requests, checker(scheduler))
    rows, waiting, loading, oldest = published[-1]
    assert (rows, waiting, loading) == (8, 1, 1)
    assert oldest > 0.5
    scheduler.finish_requests("waits", RequestStatus.FINISHED_ABORTED)
    assert scheduler.has_requests(), "one more step, for the workers to hear of the end"
    settled_step(scheduler)
    assert published[-1] == (0, 0, 0, 0.0)
    count = len(published)
    scheduler.add_request(make_request("short", max_tokens=2, adapter=1))
    run_until(scheduler, finished(scheduler), checker(scheduler))
    settled_step(scheduler)
    assert len(published) == count + 1, "within the second"
    settled_step(scheduler)
    assert len(published) == count + 1
