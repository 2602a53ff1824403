"""How prefill of high and of low ranks takes turns while others decode, at the cost of neither for long.

Every wait here is counted in steps and bounded by JOIN_STEPS.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from vllm.v1.request import Request, RequestStatus

from vllm_loraserve.engine.admission import AdmissionQueue, Lane
from vllm_loraserve.engine.rank_budget import MIN_CHUNK, ArenaRoom
from vllm_loraserve.engine.readiness import Readiness

JOIN_STEPS = 2
"""Steps that an adapter nobody runs, or one of high rank, may wait for one in which little else begins."""
JOIN_ROWS = 64
"""Rank rows of adapters nobody runs that may join others in one step; an adapter of more is one of high rank."""


class Turns:
    """Over the scheduler's own queue, room and readiness."""

    def __init__(self, readiness: Readiness, room: ArenaRoom, waiting: AdmissionQueue) -> None:
        self.readiness, self.room, self.waiting = readiness, room, waiting
        self._stood_back: dict[Request, int] = {}
        """Half-done prefill of high rank -> steps in which it let other prefill go first."""

    def ready_lanes(self) -> Iterable[Lane]:
        """Lanes whose adapters every worker has; all where loads stay in the step."""
        lanes = self.waiting.lanes
        if not self.readiness.world_size:
            return lanes.values()
        return (lane for name in self.readiness.ready() if (lane := lanes.get(name)) is not None)

    def few_join(self, lanes: list[Lane]) -> list[Lane]:
        """While others decode, adapters join them (their pages are brought in, their prefill has those to read) by at
        most JOIN_ROWS rank rows in a step, low ranks first; a larger one, be it among them already, yields to other
        prefill for JOIN_STEPS steps. So those costs don't add up in one step, at the cost of low ranks."""
        rank_of, users = self.readiness.rank_of, self.room.users
        joining = [
            lane
            for lane in lanes
            if lane.yielded < JOIN_STEPS and (lane.adapter not in users or rank_of(lane.adapter) > JOIN_ROWS)
        ]
        joining.sort(key=lambda lane: (rank_of(lane.adapter), self.waiting.head(lane)[0]))
        rows = 0
        while joining and (rows := rows + self.room.rows_of(rank_of(joining[0].adapter))) <= JOIN_ROWS:
            del joining[0]
        if joining and len(joining) == len(lanes) and not self.waiting.base_lanes:
            joining.remove(min(joining, key=lambda lane: self.waiting.head(lane)[0]))
        for lane in joining:
            lane.yielded += 1
        left_out = set(map(id, joining))
        return [lane for lane in lanes if id(lane) not in left_out]

    def in_halves(self, request: Request, rank: int, done: int, tokens: int, others_may_begin: bool) -> int:
        """How many of `tokens` prefill tokens to run: prefill of high rank takes two steps at least, and between them
        lets prefill of low rank go first: what arrives during it waits for half of it, not for all.

        `done`: tokens computed so far; `others_may_begin`: no waiting request is kept out for another reason.
        """
        if rank <= JOIN_ROWS:
            return tokens
        if request.status != RequestStatus.RUNNING:
            whole = request.num_tokens - done
            return -(-whole // 2) if tokens == whole >= 2 * MIN_CHUNK else tokens
        stood_back = self._stood_back.get(request, 0)
        if stood_back >= JOIN_STEPS or not others_may_begin or not self._low_rank_waits(request.priority):
            return tokens
        self._stood_back[request] = stood_back + 1
        return 0

    def forget(self, request: Request) -> None:
        """It has ended."""
        self._stood_back.pop(request, None)

    def _low_rank_waits(self, priority: int) -> bool:
        """Prefill of low rank, or of the base model, of this priority or a better one can begin in this step."""
        rank_of = self.readiness.rank_of
        lanes = (
            lane
            for lane in self.ready_lanes()
            if (rank := rank_of(lane.adapter)) <= JOIN_ROWS and self.room.fits(lane.adapter, rank)
        )
        return any(self.waiting.head(lane)[1].priority <= priority for lane in chain(self.waiting.base_lanes, lanes))
