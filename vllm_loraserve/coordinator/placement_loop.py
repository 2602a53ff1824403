"""The placement loop: what demand to expect, when to look again, what to change, and why.

`PlacementLoop` holds the placement in force and the history that decisions rest on. It looks at its period, and early
when an adapter asks for much more than was expected of it (a burst). It never acts: `Controller` turns its placement
into commands and routes.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Iterable

import msgspec

from vllm_loraserve.cluster.demand import DemandHistory
from vllm_loraserve.cluster.operating_points import OperatingPoints
from vllm_loraserve.cluster.placement import (
    AdapterSpec,
    Placement,
    PlacementError,
    PlacementInput,
    PlacementPolicy,
    ServerSpec,
)
from vllm_loraserve.coordinator.arrivals import Arrivals
from vllm_loraserve.coordinator.footprint import page_bytes, rank_rows
from vllm_loraserve.coordinator.learning import SpeedLearner, work_of
from vllm_loraserve.coordinator.membership import Member, Membership
from vllm_loraserve.coordinator.messages import AdapterRecord, Heartbeat
from vllm_loraserve.coordinator.rebalance import Move, moves, only_fractions, repair, with_standby, worth_adopting

logger = logging.getLogger(__name__)

BURST_PAUSE_S = 5.0
"""Bursts do not lead to another look earlier than this after the last one."""


class Proposal(msgspec.Struct):
    """What a policy would do now."""

    placement: Placement
    adopt: bool
    why: str
    moves: list[Move]


class PlacementLoop:
    """Placement in force, demand, learned speeds; times are monotonic seconds passed in."""

    def __init__(self, policy: PlacementPolicy, op: OperatingPoints, period_s: float, now: float) -> None:
        self.policy = policy
        self.op = op
        self.period_s = period_s
        self.placement = Placement()
        self.history = DemandHistory(window_s=period_s)
        self.speeds = SpeedLearner()
        self.arrivals = Arrivals()
        self.decisions: collections.deque[tuple[float, str]] = collections.deque(maxlen=200)
        self._expected: dict[str, float] = {}
        self._looked_at = now

    # ---- what is seen ----

    def observe(self, member: Member, beat: Heartbeat, ranks: dict[str, int], now: float) -> None:
        """Takes an instance's report."""
        asked = self.arrivals.observe(member.name, beat, now)
        self.history.add_report({name: tokens for name, tokens in asked.items() if tokens}, now)
        capacity = member.hello.capacity
        work = work_of(member.demand, ranks, self.op)
        self.speeds.observe(member.name, f"{capacity.device}/{capacity.tensor_parallel}", work, beat.load, now)

    def demand(self, now: float) -> dict[str, float]:
        """Tokens/s to plan for: the forecast, or what is asked for already where that is more."""
        out = self.history.forecast(now)
        for name, rate in self.arrivals.rates().items():
            out[name] = max(out.get(name, 0.0), rate)
        return out

    def input(self, members: Membership, records: Iterable[AdapterRecord], now: float) -> PlacementInput:
        """What a policy gets to see."""
        live = members.serving()
        load = self.speeds.live_load()
        # One figure for each adapter: where instances differ, what it takes at most.
        kinds = {(c.page_rows, c.page_groups): c for c in (m.hello.capacity for m in live)}.values()
        return PlacementInput(
            adapters=[
                AdapterSpec(
                    r.name,
                    r.rank,
                    max((rank_rows(r, kind) for kind in kinds), default=r.rank),
                    max((page_bytes(r, kind) for kind in kinds), default=r.size_bytes),
                )
                for r in records
                if r.state == "active"
            ],
            servers=[
                ServerSpec(
                    m.name,
                    m.hello.capacity.rank_rows,
                    m.hello.capacity.host_bytes,
                    slots=m.hello.capacity.adapters(),
                    speed=max(self.speeds.speed(m.name), 1e-6),
                    max_rank=m.hello.capacity.max_rank,
                )
                for m in live
            ],
            demand=self.demand(now),
            op=self.op,
            previous=self.placement,
            observed_load={m.name: load[m.name] for m in live if m.name in load},
        )

    # ---- what is decided ----

    def soon(self, now: float) -> None:
        """An instance joined: look within a second, when those that join with it are there too."""
        self._looked_at = min(self._looked_at, now - self.period_s + 1.0)

    def due(self, now: float) -> str:
        """Why it is time to look at the placement, or empty."""
        if now - self._looked_at >= self.period_s:
            return "period"
        if now - self._looked_at >= min(BURST_PAUSE_S, self.period_s):
            bursting = self.history.bursts(now, self._expected)
            if bursting:
                return "burst of " + ", ".join(f"'{name}'" for name in sorted(bursting)[:5])
        return ""

    def repair(self, inp: PlacementInput) -> None:
        """After a change of members or adapters: a place for everybody, with as few changes as possible."""
        self.placement = repair(inp, self.placement)

    def propose(self, inp: PlacementInput, policy: PlacementPolicy | None = None) -> Proposal:
        """What `policy` (default: the one in force) would do; raises PlacementError when it can't."""
        policy = policy or self.policy
        proposed = repair(inp, policy.place(inp))
        changes = moves(inp, self.placement, proposed)
        fetched = [m for m in changes if m.action == "prefetch"]
        cost = f"{len(fetched)} copies of {sum(m.bytes for m in fetched)} bytes to fetch"
        if only_fractions(self.placement, proposed):
            return Proposal(proposed, True, "adopted: other fractions of the same copies", changes)
        adopt, why = worth_adopting(inp, self.placement, proposed, policy.additive)
        return Proposal(proposed, adopt, f"{why}; {cost}", changes)

    def look(self, inp: PlacementInput, reason: str, now: float) -> bool:
        """Asks the policy and takes its answer if it is worth it; True if the placement changed."""
        self._looked_at = now
        self._expected = dict(inp.demand)
        if not inp.servers or not inp.adapters:
            return False
        try:
            proposal = self.propose(inp)
        except PlacementError as error:
            self._decide(f"({reason}) kept: policy {self.policy.name} found none: {error}")
            return False
        before = self.placement
        self.placement = proposal.placement if proposal.adopt else with_standby(before, proposal.placement)
        changed = bool(moves(inp, before, self.placement))
        if proposal.adopt and changed:
            self._decide(f"({reason}) {proposal.why}")
        return changed or proposal.adopt

    def _decide(self, text: str) -> None:
        self.decisions.append((time.time(), text))
        logger.info("Placement %s", text)
