"""The scheduler's waiting queue: in vLLM's order, but showing only requests that can be admitted now.

vLLM's `schedule()` asks its queue for the next request and decides what to do with it; so the order in which requests
of different adapters run is decided here, and `schedule()` stays vLLM's own. Requests lie in lanes, one for the base
model and one for each adapter content; a lane is open when the gate (the scheduler's view of loads, room, limits and
work) says so. Among the heads of open lanes the one with the smallest key is next: the order of arrival, or of
priority, or of weighted shares. With no adapter there is one lane, always open, and the order is exactly vLLM's.

Cost: a step looks at the lanes of adapters that are ready, not at others, and at none of the requests behind the heads.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.request import Request

_COMPACT_ABOVE = 16
"""Entries of a lane's heap, beyond twice its requests, before those that were taken out are dropped."""


class Lane:
    """Waiting requests of one adapter content (adapter 0: the base model), by key."""

    __slots__ = ("adapter", "blocked", "heap", "live", "name", "over_since", "path", "yielded")

    def __init__(self, adapter: int, name: str, path: str) -> None:
        self.adapter, self.name, self.path = adapter, name, path
        self.heap: list[tuple[Any, Request]] = []
        self.live = 0
        """Requests that wait here; the heap may still hold some that were taken out."""
        self.blocked: tuple[float, int] | None = None
        """(time, requests admitted by then) since when its head finds no room; None: it isn't held up by room."""
        self.over_since: float | None = None
        """Since when nothing but the limit of tokens in flight keeps its head waiting; None: something else does."""
        self.yielded = 0
        """Steps in which it could have joined the running ones, and let other prefill go first."""


class Gate(Protocol):
    """What the queue asks before it shows a request."""

    def open_lanes(self) -> Iterable[Lane]:
        """The lanes of adapters whose requests may be shown in this step at all; asked once per step."""
        ...

    def admits(self, lane: Lane, request: Request) -> bool:
        """Whether this request may be admitted now, after what was admitted before it in this step."""
        ...

    def share_time(self, lane: Lane) -> float:
        """Virtual time of the lane's label under weighted shares; 0 without shares."""
        ...

    def taken(self, request: Request) -> None:
        """The request was taken out to be admitted (or to be skipped: then `returned` follows)."""
        ...

    def returned(self, request: Request) -> None:
        """vLLM put the request back: it was not admitted after all."""
        ...


class AdmissionQueue(RequestQueue):
    """Drop-in for vLLM's FCFS and priority queues."""

    def __init__(self, policy: SchedulingPolicy, gate: Gate) -> None:
        self._by_priority = policy == SchedulingPolicy.PRIORITY
        self._gate = gate
        self._base = Lane(0, "", "")
        self.lanes: dict[tuple[int, str], Lane] = {}
        """Lanes of adapters with waiting requests."""
        self._where: dict[Request, tuple[Any, Lane, float]] = {}
        """Request -> (key, lane, time it was queued)."""
        self._taken: dict[Request, tuple[Any, float]] = {}
        """What was taken out in this step, with the key and time it had: put back, it is where it was."""
        self._back = 0
        self._front = 0
        self._heads: list[tuple[Any, int, Lane]] | None = None
        """Heap of (order, lane's number, lane) over open lanes; None: to be built."""
        self._next: tuple[Lane, Request] | None = None
        self.lanes_changed = True
        """A lane appeared, vanished or got another head; whoever derives something from lanes clears it."""

    # ---- vLLM's interface ----

    def add_request(self, request: Request) -> None:
        """At the end (FCFS), or by priority."""
        self._back += 1
        self._insert(request, self._back, time.monotonic())

    def prepend_request(self, request: Request) -> None:
        """At the front (FCFS), or by priority: a preempted request."""
        self._front -= 1
        self._insert(request, self._front, time.monotonic())

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Requests that were skipped in this step return to where they were."""
        for request in requests:
            if request in self._taken:
                key, queued = self._taken.pop(request)
                self._gate.returned(request)
                self._insert(request, key, queued)
            else:
                self.prepend_request(request)

    def __bool__(self) -> bool:
        """Whether there is a request that can be admitted now. (`len` counts all.)"""
        return self._choose() is not None

    def peek_request(self) -> Request:
        """The next request that can be admitted; IndexError when there is none."""
        chosen = self._choose()
        if chosen is None:
            raise IndexError("peek from a queue with no request that can be admitted")
        return chosen[1]

    def pop_request(self) -> Request:
        """Takes out what `peek_request` shows."""
        chosen = self._choose()
        if chosen is None:
            raise IndexError("pop from a queue with no request that can be admitted")
        lane, request = chosen
        key, _, queued = self._where[request]
        self._remove(request)
        self._taken[request] = (key, queued)
        self._gate.taken(request)
        self._next = None
        assert self._heads is not None
        if lane.live:
            heapq.heapreplace(self._heads, self._head_of(lane))
        else:
            heapq.heappop(self._heads)
        return request

    def remove_request(self, request: Request) -> None:
        """ValueError when it isn't here, as vLLM's queues."""
        if request not in self._where:
            raise ValueError(f"request {request.request_id} is not in the queue")
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Those that are here."""
        for request in requests:
            if request in self._where:
                self._remove(request)
        self._heads = self._next = None

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._where, key=lambda request: self._where[request][0]))

    def __contains__(self, request: object) -> bool:
        return request in self._where

    # ---- for the scheduler ----

    def begin_step(self) -> None:
        """A step starts: lanes are looked at anew."""
        self._heads = self._next = None
        self._taken.clear()

    def head(self, lane: Lane) -> tuple[Any, Request]:
        """(key, request) of a lane that is not empty."""
        while (entry := self._where.get(lane.heap[0][1])) is None or entry[0] != lane.heap[0][0]:
            heapq.heappop(lane.heap)
        return lane.heap[0]

    def first_lanes(self, count: int) -> list[Lane]:
        """At most `count` lanes of adapters, the one whose head comes first in front."""
        return heapq.nsmallest(count, self.lanes.values(), key=lambda lane: self.head(lane)[0])

    def live_in(self, lane: Lane) -> list[Request]:
        """All requests of a lane, in any order."""
        return [entry[1] for entry in lane.heap if self._is_live(entry)]

    @property
    def base_lanes(self) -> tuple[Lane, ...]:
        """The base model's lane, if requests of it wait."""
        return (self._base,) if self._base.live else ()

    def taken_key(self, request: Request) -> Any:
        """The key that a request had which was taken out in this step."""
        return self._taken[request][0]

    def queued_at(self, request: Request) -> float:
        """When it was queued (time.monotonic)."""
        return self._where[request][2]

    # ---- inside ----

    def _is_live(self, entry: tuple[Any, Request]) -> bool:
        where = self._where.get(entry[1])
        return where is not None and where[0] == entry[0]

    def _insert(self, request: Request, key: Any, queued: float) -> None:
        if self._by_priority:
            key = (request.priority, request.arrival_time, request.request_id)
        lora = request.lora_request
        if lora is None:
            lane = self._base
        else:
            name = (lora.lora_int_id, lora.lora_path)
            found = self.lanes.get(name)
            if found is None:
                found = self.lanes[name] = Lane(lora.lora_int_id, lora.lora_name, lora.lora_path)
            lane = found
            self.lanes_changed = True
        self._where[request] = (key, lane, queued)
        heapq.heappush(lane.heap, (key, request))
        lane.live += 1
        self._heads = self._next = None

    def _remove(self, request: Request) -> None:
        _, lane, _ = self._where.pop(request)
        lane.live -= 1
        if len(lane.heap) > _COMPACT_ABOVE + 2 * lane.live:
            # Behind a head that stays, requests that were aborted would be kept for ever.
            # A request that was put back where it was may be there twice.
            lane.heap = list({entry[1]: entry for entry in lane.heap if self._is_live(entry)}.values())
            heapq.heapify(lane.heap)
        if lane is not self._base:
            self.lanes_changed = True
            if not lane.live:
                del self.lanes[lane.adapter, lane.path]
        if not lane.live:
            lane.heap.clear()

    def _head_of(self, lane: Lane) -> tuple[Any, int, Lane]:
        key = self.head(lane)[0]
        share = self._gate.share_time(lane)
        return ((key[0], share, key) if self._by_priority else (share, key)), lane.adapter, lane

    def _choose(self) -> tuple[Lane, Request] | None:
        if self._next is not None:
            return self._next
        if self._heads is None:
            lanes = self._gate.open_lanes() if self.lanes else ()
            self._heads = [self._head_of(lane) for lane in (*lanes, *self.base_lanes)]
            heapq.heapify(self._heads)
        while self._heads:
            lane = self._heads[0][2]
            request = self.head(lane)[1]
            if lane is self._base or self._gate.admits(lane, request):
                self._next = (lane, request)
                return self._next
            # What doesn't fit now won't fit later in this step either.
            heapq.heappop(self._heads)
        return None
