"""While all that waits waits for adapters, the scheduler waits for its workers and does not run empty steps."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from scheduler_harness import make_request, settled_step, step  # noqa: E402


def test_the_step_waits_only_where_nothing_else_can_be_done(build, monkeypatch) -> None:
    scheduler, workers = build()
    waits: list[float] = []
    monkeypatch.setattr(scheduler._end, "wait", waits.append)
    workers.hold(1)
    scheduler.add_request(make_request("a", adapter=1, max_tokens=3))
    settled_step(scheduler)
    assert waits == [], "the first step finds out"
    for count in range(1, 4):
        output, _ = settled_step(scheduler)
        assert not output.num_scheduled_tokens
        assert len(waits) == count

    scheduler.add_request(make_request("b", max_tokens=3))
    output, _ = settled_step(scheduler)
    assert list(output.num_scheduled_tokens) == ["b"], "what can run runs in the next step"
    before = len(waits)
    settled_step(scheduler)
    assert len(waits) == before, "something runs"

    workers.release(1)
    while scheduler.requests:
        settled_step(scheduler)
    step(scheduler)
    before = len(waits)
    step(scheduler)
    assert len(waits) == before, "nothing is being loaded"
