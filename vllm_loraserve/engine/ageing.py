"""Which request has waited too long for room in the arena, and which adapters make it.

A request that finds no room is overtaken by younger ones whose adapters are in use, until more than `skip_window`
requests were admitted since, or `max_skip_s` is over; then the cheapest set of adapters that makes room for it gets no
new requests until it runs. Since the requests that run end, it waits for a bounded time after that; several such
requests are served oldest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.request import Request

from vllm_loraserve.engine.admission import AdmissionQueue, Lane
from vllm_loraserve.engine.rank_budget import ArenaRoom
from vllm_loraserve.engine.readiness import Readiness
from vllm_loraserve.engine.trace import StepCounters


class Ageing:
    """Over the scheduler's own queue, room, readiness and counters."""

    def __init__(
        self,
        readiness: Readiness,
        room: ArenaRoom,
        waiting: AdmissionQueue,
        counters: StepCounters,
        *,
        max_skip_s: float,
        skip_window: int,
    ) -> None:
        self.readiness, self.room, self.waiting, self.counters = readiness, room, waiting, counters
        self.max_skip_s, self.skip_window = max_skip_s, skip_window
        self.draining: set[int] = set()
        """Adapters that get no new requests in this step."""
        self.drain_for: Lane | None = None
        """Whose head the room is made for; None: nobody's, or that of a request outside of the queue."""
        self.oldest_blocked: Any = None
        """Key of the oldest waiting request whose adapter finds no room; None: there is none."""
        self._held_up: dict[Request, tuple[float, int]] = {}
        """A request that holds KV blocks and whose adapter finds no room -> (time, requests admitted by then) since
        when."""

    @property
    def making_room(self) -> bool:
        """Whether this step makes room for somebody."""
        return self.drain_for is not None or bool(self.draining)

    def begin_step(self) -> None:
        """Nobody is known to have waited too long."""
        self.draining, self.drain_for = set(), None
        self.oldest_blocked = None

    def survey(self, ready_lanes: Iterable[Lane], holders: Sequence[Request], now: float) -> None:
        """Finds the oldest request that was overtaken long enough, and the adapters to drain for it.

        `ready_lanes`: lanes whose adapters the workers have; `holders`: waiting requests of adapters that hold KV
        blocks, which come before those of any lane.
        """
        aged: Lane | None = None
        for lane in ready_lanes:
            if self.room.fits(lane.adapter, self.readiness.rank_of(lane.adapter)):
                lane.blocked = None
                continue
            if lane.blocked is None:
                lane.blocked = (now, self.counters.admitted)
            key = self.waiting.head(lane)[0]
            if self.oldest_blocked is None or key < self.oldest_blocked:
                self.oldest_blocked = key
            if self._long_enough(lane.blocked, now) and (aged is None or key < self.waiting.head(aged)[0]):
                aged = lane
        if (held := self._aged_holder(holders, now)) is not None:
            self._drain(held.lora_request.lora_int_id)
        elif aged is not None:
            self.drain_for = aged
            self._drain(aged.adapter)

    def _drain(self, adapter: int) -> None:
        self.draining = self.room.to_drain(adapter, self.readiness.rank_of(adapter))
        self.counters.drains += 1

    def _long_enough(self, blocked: tuple[float, int], now: float) -> bool:
        since, admitted = blocked
        return now - since > self.max_skip_s or self.counters.admitted - admitted > self.skip_window

    def _aged_holder(self, holders: Sequence[Request], now: float) -> Request | None:
        """The first request with KV blocks that was held up by room for long enough."""
        held_up: dict[Request, tuple[float, int]] = {}
        for request in holders:
            lora = request.lora_request
            ready = self.readiness.is_ready(lora.lora_int_id, lora.lora_path)
            if ready and not self.room.fits(lora.lora_int_id, self.readiness.rank_of(lora.lora_int_id)):
                held_up[request] = self._held_up.get(request, (now, self.counters.admitted))
        self._held_up = held_up
        return next((request for request, blocked in held_up.items() if self._long_enough(blocked, now)), None)
