"""Damping: change as little of a placement as the new demand allows.

`settle` decides between keeping the previous placement, repairing it (moving only what overloads a server)
and adopting a freshly computed one. Keeping wins inside a dead band, so that noise in the forecast moves
nothing; leaving the band once moves enough to come back well inside it, so that the decision does not flap.
"""

from __future__ import annotations

import heapq

from vllm_loraserve.cluster.placement import (
    AdapterSpec,
    Capacity,
    Placement,
    PlacementInput,
    normalise,
)

TOLERANCE = 0.10
"""Dead band: the previous placement stays while its worst server is within this factor of the fresh one's."""
BATCH = 16
"""Requests that share a step, for the expected largest rank."""
IDLE_LOAD = 0.5
"""A server below this predicted load is never a reason to move anything."""


def carry_over(inp: PlacementInput) -> Placement:
    """The previous placement on the servers and adapters there are now; what has no holder left is not in
    it."""
    out = Placement()
    if inp.previous is None:
        return out
    cap = Capacity(inp.servers)
    for a in inp.adapters:
        phi = {s: v for s, v in inp.previous.phi.get(a.name, {}).items() if s in cap.servers and cap.fits(a, s)}
        if phi:
            for s in phi:
                cap.add(a, s)
            out.phi[a.name] = normalise(phi)
        else:
            # A warm standby copy becomes the copy.
            for s in inp.previous.standby.get(a.name, ()):
                if s in cap.servers and cap.fits(a, s):
                    cap.add(a, s)
                    out.phi[a.name] = {s: 1.0}
                    break
    return out


def interference_loads(inp: PlacementInput, placement: Placement, additive: bool) -> dict[str, float]:
    """Predicted load per server. `additive`: every token costs its own rank (rank-aware kernels); else
    tokens cost the expected largest rank of their batch (padded and max-in-batch kernels)."""
    work: dict[str, dict[int, float]] = {s.name: {} for s in inp.servers}
    for a in inp.adapters:
        tokens = inp.weight(a) * inp.op.at(a.rank)
        for s, phi in placement.phi.get(a.name, {}).items():
            if s in work:
                work[s][a.rank] = work[s].get(a.rank, 0.0) + phi * tokens
    out = {}
    for server in inp.servers:
        by_rank = work[server.name]
        if additive or not by_rank:
            load = sum(t / inp.op.at(r) for r, t in by_rank.items())
        else:
            load = _max_rank_work(inp, by_rank)
        out[server.name] = load / server.speed
    return out


def _max_rank_work(inp: PlacementInput, by_rank: dict[int, float]) -> float:
    """Instances' worth of tokens when each costs the largest rank among BATCH requests drawn from
    `by_rank`: the expected 1/OP[max]. Smooth in the shares, so that a rank which comes and goes does not
    make the decision flap."""
    total = sum(by_rank.values())
    cost = below = 0.0
    share = 0.0
    for rank in sorted(by_rank):
        share += by_rank[rank] / total
        up_to = min(share, 1.0) ** BATCH
        cost += (up_to - below) / inp.op.at(rank)
        below = up_to
    return total * cost


class Ledger:
    """A placement under repair: fractions, copies and loads kept consistent while weight is shifted.

    `additive` as in `interference_loads`; when false, a server's tokens all cost its largest rank.
    """

    def __init__(self, inp: PlacementInput, start: Placement, additive: bool = True) -> None:
        self.inp = inp
        self.additive = additive
        self.cap = Capacity(inp.servers)
        self.speed = {s.name: s.speed for s in inp.servers}
        self.load = dict.fromkeys(self.speed, 0.0)
        self.max_rank = dict.fromkeys(self.speed, 0)
        self.specs = {a.name: a for a in inp.adapters}
        self.weight = {a.name: inp.weight(a) for a in inp.adapters}
        self.op = {r: inp.op.at(r) for r in {a.rank for a in inp.adapters}}
        self.phi: dict[str, dict[str, float]] = {}
        self.on: dict[str, set[str]] = {s: set() for s in self.speed}
        placed = sorted(start.phi.items())
        if not additive:
            for a, routes in placed:
                for s in routes:
                    self.max_rank[s] = max(self.max_rank[s], self.specs[a].rank)
        for a, routes in placed:
            for s, v in routes.items():
                self.give(self.specs[a], s, v)

    def cost(self, a: AdapterSpec, server: str) -> float:
        """Load that the whole demand of `a` would put on `server`."""
        load = self.weight[a.name] / self.speed[server]
        if self.additive or not self.max_rank[server]:
            return load
        return load * self.op[a.rank] / self.op[max(self.max_rank[server], a.rank)]

    def give(self, a: AdapterSpec, server: str, fraction: float) -> None:
        """Adds `fraction` of `a` to `server`."""
        routes = self.phi.setdefault(a.name, {})
        routes[server] = routes.get(server, 0.0) + fraction
        self.cap.add(a, server)
        self.on[server].add(a.name)
        self.load[server] += fraction * self.cost(a, server)

    def take(self, a: AdapterSpec, server: str, fraction: float) -> None:
        """Removes `fraction` of `a` from `server`; the copy goes with the last of it."""
        routes = self.phi[a.name]
        routes[server] -= fraction
        self.load[server] -= fraction * self.cost(a, server)
        if routes[server] <= 1e-9:
            del routes[server]
            self.on[server].discard(a.name)
            self.cap.remove(a, server)

    def placement(self) -> Placement:
        """The fractions as they stand."""
        return Placement(phi={a: normalise(routes) for a, routes in self.phi.items() if routes})


def place_missing(inp: PlacementInput, ledger: Ledger) -> dict[str, str]:
    """Puts adapters without a copy on the least loaded server with room; returns those that fit nowhere and
    why."""
    unplaced: dict[str, str] = {}
    missing = [a for a in inp.adapters if not ledger.phi.get(a.name)]
    if not missing:
        return unplaced
    heap = [(ledger.load[s], s) for s in sorted(ledger.load)]
    heapq.heapify(heap)
    for a in sorted(missing, key=lambda a: (-ledger.weight[a.name], a.name)):
        aside = []
        while heap:
            load, s = heapq.heappop(heap)
            if ledger.cap.fits(a, s):
                ledger.give(a, s, 1.0)
                aside.append((ledger.load[s], s))
                break
            aside.append((load, s))
        else:
            unplaced[a.name] = ledger.cap.why_not(a)
        for item in aside:
            heapq.heappush(heap, item)
    return unplaced


def repair(inp: PlacementInput, ledger: Ledger, limit: float) -> bool:
    """Shifts load off servers above `limit` (a load) onto the least loaded ones; True when all came below.

    From an overloaded server the adapter that costs the fewest bytes per load moved goes first: a shift of
    fractions to a server that holds the adapter already is free.
    """
    heaps: dict[int, list[tuple[float, str]]] = {}
    for s, v in sorted(ledger.load.items()):
        heaps.setdefault(ledger.max_rank[s], []).append((v, s))
    for heap in heaps.values():
        heapq.heapify(heap)
    over = sorted((s for s, v in ledger.load.items() if v > limit), key=lambda s: (-ledger.load[s], s))
    ok = True
    for server in over:
        for _ in range(64):
            if ledger.load[server] <= limit:
                break
            if not _shift(ledger, server, limit, heaps):
                break
        ok = ok and ledger.load[server] <= limit
    return ok


def _shift(ledger: Ledger, server: str, limit: float, heaps: dict[int, list[tuple[float, str]]]) -> bool:
    """Moves load of one adapter off `server`, as much as it is above `limit` and the target has room."""
    excess = ledger.load[server] - limit
    free: tuple[float, str, str] | None = None
    candidates: list[tuple[float, str]] = []
    for name in sorted(ledger.on[server]):
        spec = ledger.specs[name]
        here = ledger.phi[name][server] * ledger.cost(spec, server)
        if here <= 0.0:
            continue
        for other in ledger.phi[name]:
            room = limit - ledger.load[other]
            if other != server and room > 0.02 * excess:
                amount = min(here, excess, room)
                if free is None or amount > free[0]:
                    free = (amount, name, other)
        candidates.append((spec.bytes / min(here, excess), name))
    if free is not None:
        amount, name, target = free
        _move(ledger, name, server, target, amount, limit, heaps)
        return True
    for _, name in sorted(candidates)[:8]:
        spec = ledger.specs[name]
        found = _target(ledger, spec, server, limit, heaps)
        if found is not None:
            here = ledger.phi[name][server] * ledger.cost(spec, server)
            # A whole move costs no more bytes than a partial one and leaves one copy less.
            amount = here if here <= 1.5 * excess else excess
            _move(ledger, name, server, found, amount, limit, heaps)
            return True
    return False


def _target(
    ledger: Ledger, spec: AdapterSpec, server: str, limit: float, heaps: dict[int, list[tuple[float, str]]]
) -> str | None:
    """The least loaded server that takes `spec` without raising its largest rank: of its own rank's group
    first."""
    for rank in sorted(heaps):
        if rank and rank < spec.rank:
            continue
        heap = heaps[rank]
        aside: list[tuple[float, str]] = []
        found = None
        while heap and len(aside) < 32:
            load, s = heapq.heappop(heap)
            if load != ledger.load[s]:
                if (ledger.load[s], s) not in heap[:1]:
                    heapq.heappush(heap, (ledger.load[s], s))
                continue
            aside.append((load, s))
            if load >= limit:
                break
            if s != server and s not in ledger.phi[spec.name] and ledger.cap.fits(spec, s):
                found = s
                break
        for item in aside:
            heapq.heappush(heap, item)
        if found is not None:
            return found
    return None


def _move(
    ledger: Ledger,
    name: str,
    server: str,
    target: str,
    amount: float,
    limit: float,
    heaps: dict[int, list[tuple[float, str]]],
) -> None:
    """Shifts `amount` load (as counted on `server`) of an adapter, cut to the room there is on `target`."""
    spec = ledger.specs[name]
    fraction = min(amount / ledger.cost(spec, server), ledger.phi[name][server])
    fraction = min(fraction, max(limit - ledger.load[target], 0.0) / ledger.cost(spec, target))
    ledger.take(spec, server, fraction)
    ledger.give(spec, target, fraction)
    for s in (server, target):
        heapq.heappush(heaps[ledger.max_rank[s]], (ledger.load[s], s))


def settle(
    inp: PlacementInput, fresh: Placement, *, additive: bool, tolerance: float = TOLERANCE, allow_repair: bool = True
) -> Placement:
    """The placement to adopt: previous, repaired or fresh (see the module's text). Adapters that are new
    are placed and servers that are gone are left in every case."""
    if inp.previous is None or not inp.previous.phi:
        return fresh
    kept = Ledger(inp, carry_over(inp), additive)
    unplaced = place_missing(inp, kept)
    if len(unplaced) > len(fresh.unplaced):
        return fresh
    worst_fresh = max(interference_loads(inp, fresh, additive).values(), default=0.0)
    bound = max(worst_fresh * (1.0 + tolerance), IDLE_LOAD)

    def worst(p: Placement) -> float:
        return max(interference_loads(inp, p, additive).values(), default=0.0)

    candidate = kept.placement()
    candidate.unplaced = unplaced
    if worst(candidate) <= bound:
        return candidate
    if allow_repair:
        limit = max(worst_fresh * (1.0 + 0.5 * tolerance), 0.9 * IDLE_LOAD)
        repair(inp, kept, limit)
        repaired = kept.placement()
        repaired.unplaced = unplaced
        if worst(repaired) <= bound:
            return repaired
    return fresh
