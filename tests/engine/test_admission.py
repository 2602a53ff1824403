"""The waiting queue alone: what it keeps of requests that are gone."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.vllm


class OpenGate:
    """Everything is admitted."""

    queue: Any = None

    def open_lanes(self) -> Any:
        return self.queue.lanes.values()

    def admits(self, lane: Any, request: Any) -> bool:
        return True

    def share_time(self, lane: Any) -> float:
        return 0.0

    def taken(self, request: Any) -> None:
        pass

    returned = taken


@pytest.fixture
def queue() -> Any:
    from vllm.v1.core.sched.request_queue import SchedulingPolicy

    from vllm_loraserve.engine.admission import AdmissionQueue

    gate = OpenGate()
    gate.queue = AdmissionQueue(SchedulingPolicy.FCFS, gate)
    return gate.queue


@pytest.mark.parametrize("adapter", [0, 1], ids=["base", "adapter"])
def test_aborted_requests_behind_a_head_that_stays_are_not_kept(queue: Any, adapter: int) -> None:
    from scheduler_harness import make_request

    queue.add_request(make_request("head", adapter=adapter))
    lane = queue._base if not adapter else next(iter(queue.lanes.values()))
    for number in range(2000):
        request = make_request(f"r{number}", adapter=adapter)
        queue.add_request(request)
        if number % 100:
            queue.remove_requests((request,))
    assert len(queue) == 21
    assert len(lane.heap) < 100
    order = []
    while queue:
        order.append(queue.pop_request().request_id)
    assert order == ["head", *(f"r{number}" for number in range(0, 2000, 100))]


def test_a_request_that_is_put_back_again_and_again_is_there_once(queue: Any) -> None:
    from scheduler_harness import make_request

    for number in range(3):
        queue.add_request(make_request(f"r{number}", adapter=1))
    (lane,) = queue.lanes.values()
    for _ in range(500):
        queue.begin_step()
        skipped = [queue.pop_request(), queue.pop_request()]
        queue.prepend_requests(skipped)
    assert len(lane.heap) < 50
    queue.begin_step()
    assert [queue.pop_request().request_id for _ in range(3)] == ["r0", "r1", "r2"]
    assert not queue
