"""`loraserve+`: placement for rank-aware kernels, where a token costs its own rank and neighbours cost only
memory.

Without max-rank interference there is no reason to separate ranks; what a server pays for an adapter beyond
its tokens is (a) the rank rows read in every step that runs it and (b) room in the arena and the host tier.
So: pack the adapters that are busy onto as few servers as balance allows (fewer distinct adapters per
step), weigh a copy by its standing cost, give the hot ones a second holder, and keep warm standby copies of
the rest where memory is free, so that the router can step around a burst before the next period. Live load
corrects the fractions: what a server showed beyond its prediction counts against it.
"""

from __future__ import annotations

import heapq
import math

from vllm_loraserve.cluster.placement import (
    AdapterSpec,
    Capacity,
    Placement,
    PlacementInput,
    normalise,
    register,
)
from vllm_loraserve.cluster.relabel import relabel
from vllm_loraserve.cluster.routing_plus import Choice
from vllm_loraserve.cluster.stability import Ledger, repair, settle

SPLIT_ABOVE = 0.5
"""An adapter that asks for more than this share of a server's fair load gets a second holder."""
LEVEL = 1.05
"""A fresh placement leaves no server above this multiple of the fair load, where memory allows."""
STANDBY_COPIES = 1
"""Warm copies without phi that each busy adapter gets where host memory is free."""
STANDBY_MEMORY = 0.8
"""Host memory is filled with standby copies only up to this share."""


def _water_fill(servers: list[tuple[float, float]], weight: float) -> list[float]:
    """How much of `weight` each (load, speed), least loaded first, gets so that those that get any end
    equally loaded; nobody gets less than a twentieth of an equal share (a copy for a sliver is not worth
    its memory)."""
    n = len(servers)
    while n > 0:
        speed = math.fsum(v for _, v in servers[:n])
        level = (weight + math.fsum(load * v for load, v in servers[:n])) / speed
        load, v = servers[n - 1]
        if n == 1 or (level - load) * v >= 0.05 * weight / n:
            return [(level - load) * v for load, v in servers[:n]] + [0.0] * (len(servers) - n)
        n -= 1
    return []


class LoRAServePlus:
    """Joint demand-and-memory placement; see the module's text."""

    name = "loraserve+"
    additive = True
    choice: Choice | None = "finish-time"

    def place(self, inp: PlacementInput) -> Placement:
        """See `PlacementPolicy.place`."""
        inp.validate()
        fresh = relabel(inp, self._pack(inp))
        chosen = settle(inp, fresh, additive=True)
        return self._standby(inp, self._correct(inp, chosen))

    def _pack(self, inp: PlacementInput) -> Placement:
        """Heaviest first onto the least loaded server with room in the host tier, preferring those whose
        arena still has room for the adapter's rows beside the other busy ones."""
        cap = Capacity(inp.servers)
        out = Placement()
        weight = {a.name: inp.weight(a) for a in inp.adapters}
        speeds = math.fsum(s.speed for s in inp.servers)
        target = math.fsum(weight.values()) / speeds
        heap = [(0.0, s.name) for s in sorted(inp.servers, key=lambda s: s.name)]
        heapq.heapify(heap)
        for a in sorted(inp.adapters, key=lambda a: (-weight[a.name], a.name)):
            pieces = 1
            if inp.demand.get(a.name):
                pieces = max(1, min(len(heap), round(weight[a.name] / (SPLIT_ABOVE * target))))
            share = self._spread(a, weight[a.name], pieces, cap, heap)
            if share:
                out.phi[a.name] = normalise(share)
            else:
                out.unplaced[a.name] = cap.why_not(a)
        # What was put whole on the last server may still be split: level what is left above the target.
        ledger = Ledger(inp, out)
        repair(inp, ledger, LEVEL * target)
        level = ledger.placement()
        level.unplaced = out.unplaced
        return level

    @staticmethod
    def _spread(
        a: AdapterSpec, weight: float, pieces: int, cap: Capacity, heap: list[tuple[float, str]]
    ) -> dict[str, float]:
        """`a` over the `pieces` least loaded servers that have room; a full arena costs a detour."""
        chosen: list[tuple[float, str]] = []
        second: list[tuple[float, str]] = []
        aside: list[tuple[float, str]] = []
        while heap and len(chosen) < pieces and len(aside) + len(second) < 64:
            load, s = heapq.heappop(heap)
            if not cap.fits(a, s):
                aside.append((load, s))
            elif cap.rows[s] + a.rank_rows > cap.servers[s].capacity_rank_rows:
                second.append((load, s))
            else:
                chosen.append((load, s))
        while second and len(chosen) < pieces:
            chosen.append(second.pop(0))
        while heap and not chosen:  # beyond the first 64: whatever has room
            load, s = heapq.heappop(heap)
            (chosen if cap.fits(a, s) else aside).append((load, s))
        amounts = _water_fill([(load, cap.servers[s].speed) for load, s in chosen], weight)
        share = {}
        for (load, s), amount in zip(chosen, amounts, strict=True):
            if amount > 0.0:
                cap.add(a, s)
                share[s] = amount
            heapq.heappush(heap, (load + amount / cap.servers[s].speed, s))
        for item in (*aside, *second):
            heapq.heappush(heap, item)
        return share

    def _correct(self, inp: PlacementInput, placement: Placement) -> Placement:
        """Shifts fractions between the holders of an adapter towards those whose live load is below the
        others'."""
        if not inp.observed_load:
            return placement
        for routes in placement.phi.values():
            if len(routes) < 2:
                continue
            live = {s: max(inp.observed_load.get(s, 1.0), 0.2) for s in routes}
            mean = sum(live.values()) / len(live)
            scaled = {s: v * min(max(mean / live[s], 0.7), 1.4) for s, v in routes.items()}
            total = sum(scaled.values())
            routes.update({s: v / total for s, v in scaled.items()})
        return placement

    def _standby(self, inp: PlacementInput, placement: Placement) -> Placement:
        """A warm copy of every adapter that has demand and one holder, where the host tier has room; the
        previous standby server first, so that nothing moves without need."""
        cap = Capacity(inp.servers)
        specs = {a.name: a for a in inp.adapters}
        for name, routes in placement.phi.items():
            for s in routes:
                cap.add(specs[name], s)
        heap = [(cap.bytes[s.name] / max(s.host_bytes, 1), s.name) for s in inp.servers if s.host_bytes]
        heapq.heapify(heap)
        before = inp.previous.standby if inp.previous is not None else {}
        single = [a for a in inp.adapters if len(placement.phi.get(a.name, ())) == 1]
        for a in sorted(single, key=lambda a: (-inp.weight(a), a.name)):
            if not inp.demand.get(a.name) or not heap:
                continue
            own = next(iter(placement.phi[a.name]))
            kept = [s for s in before.get(a.name, ()) if s in cap.servers and s != own and cap.fits(a, s)]
            if kept:
                cap.add(a, kept[0])
                placement.standby[a.name] = kept[:STANDBY_COPIES]
                continue
            aside: list[tuple[float, str]] = []
            while heap and len(aside) < 8:
                fill, s = heapq.heappop(heap)
                server = cap.servers[s]
                if s != own and cap.fits(a, s) and cap.bytes[s] + a.bytes <= STANDBY_MEMORY * server.host_bytes:
                    cap.add(a, s)
                    placement.standby[a.name] = [s]
                    aside.append((cap.bytes[s] / server.host_bytes, s))
                    break
                aside.append((fill, s))
            for item in aside:
                heapq.heappush(heap, item)
        return placement


register(LoRAServePlus, LoRAServePlus.name)
