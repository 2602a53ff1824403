"""The LoRAServe paper's placement (arXiv 2511.22880, section IV): the six steps, with the gaps closed.

1. utilisation per rank from demand / OP[rank]; 2. a budget of servers per rank (largest remainder, so that
it sums to the number of servers); 3. fractional bin packing of each rank onto its own group, ranks
descending; 4. leftovers to the server whose largest rank covers them, least utilised first; 5. relabelling
onto physical servers for the fewest bytes moved (optimal assignment); 6. damping, so that noise moves
nothing.

Beyond the paper: host bytes, arena rank rows and slots are respected in steps 3 and 4; servers of different
speed take shares in proportion; more demand than servers scales every budget down instead of being an
error.
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
from vllm_loraserve.cluster.stability import interference_loads, settle

TARGET_FACTORS = (1.0, 1.05, 1.1, 1.2, 1.35)
SEARCH_LIMIT = 64
"""Up to this many servers the soft capacity is searched among TARGET_FACTORS."""
OVERFLOW = 0.05
"""Share of a server's capacity by which a rank's last rest may overfill it, rather than spill over."""
WHOLE_BUDGETS = 1.2
"""How much better the worst server must be for budgets that are not whole servers: their borders wander with every
change of demand, which costs moves, and their servers have no slack."""
SMALLEST_SHARE = 0.02
"""A split that leaves less than this fraction of an adapter, or of a server, on one more server is not
worth a copy."""


def rank_budgets(needs: dict[int, float], servers: list[tuple[str, float]]) -> dict[int, list[str]]:
    """Servers of each rank: each, fastest first, goes to the rank with the largest unmet need.

    `needs`: rank -> speed units needed (they sum to the total speed). For identical servers this is the
    method of largest remainders (Hamilton): the budgets sum to the number of servers.
    """
    groups: dict[int, list[str]] = {r: [] for r in needs}
    heap = [(-need, -rank) for rank, need in needs.items()]
    heapq.heapify(heap)
    for name, speed in servers:
        need, rank = heapq.heappop(heap)
        groups[-rank].append(name)
        heapq.heappush(heap, (need + speed, rank))
    return groups


class LoRAServe:
    """The paper's policy. `damped=False` gives the bare six steps (every call replans)."""

    name = "loraserve"
    additive = False
    choice: Choice | None = None

    def __init__(self, damped: bool = True) -> None:
        self.damped = damped

    def place(self, inp: PlacementInput) -> Placement:
        """See `PlacementPolicy.place`."""
        inp.validate()
        fresh = relabel(inp, self.six_steps(inp))
        return settle(inp, fresh, additive=False, allow_repair=len(inp.servers) > 32) if self.damped else fresh

    def six_steps(self, inp: PlacementInput) -> Placement:
        """Steps 1 to 4 on the servers as given, for the soft capacity that leaves the least loaded worst
        server.

        The paper's target assumes that every rank runs alone; where leftovers mix ranks the mixed servers
        end above it. Small clusters, where one mixed server matters, try some higher targets, and budgets that
        are not rounded to whole servers.
        """
        if not inp.adapters:
            return Placement()
        if len(inp.servers) > SEARCH_LIMIT:
            return self._pack(inp, 1.0)

        def worst(placement: Placement) -> float:
            return max(interference_loads(inp, placement, additive=False).values())

        whole = min((self._pack(inp, f) for f in TARGET_FACTORS), key=worst)
        mixed = self._fill(inp)
        return mixed if worst(mixed) * WHOLE_BUDGETS < worst(whole) else whole

    def _pack(self, inp: PlacementInput, factor: float) -> Placement:
        """Steps 1 to 4 with the target utilisation multiplied by `factor`."""
        weight = {a.name: inp.weight(a) for a in inp.adapters}
        util: dict[int, float] = {}
        for a in sorted(inp.adapters, key=lambda a: a.name):  # the order decides the last bit of a sum
            util[a.rank] = util.get(a.rank, 0.0) + weight[a.name]
        speeds = {s.name: s.speed for s in inp.servers}
        target = math.fsum(util.values()) / math.fsum(speeds.values())
        order = sorted(speeds.items(), key=lambda kv: (-kv[1], kv[0]))
        groups = rank_budgets({r: u / target for r, u in util.items()}, order)
        packer = _Packer(inp, weight, target * factor)
        by_rank: dict[int, list[AdapterSpec]] = {}
        for a in inp.adapters:
            by_rank.setdefault(a.rank, []).append(a)
        leftovers: list[AdapterSpec] = []
        for rank in sorted(by_rank, reverse=True):
            adapters = sorted(by_rank[rank], key=lambda a: (-weight[a.name], a.name))
            leftovers += packer.pack(adapters, groups[rank], rank) if groups[rank] else adapters
        packer.place_leftovers(leftovers)
        return packer.placement()

    def _fill(self, inp: PlacementInput) -> Placement:
        """Steps 2 to 4 with fractional budgets: servers are filled one after the other, largest ranks first, up to
        the least level at which everything fits; a server at the border of two ranks pays the larger one."""
        weight = {a.name: inp.weight(a) for a in inp.adapters}
        adapters = sorted(inp.adapters, key=lambda a: (-a.rank, -weight[a.name], a.name))
        servers = sorted(inp.servers, key=lambda s: (-s.speed, s.name))
        tokens: dict[int, float] = {}
        for a in adapters:
            tokens[a.rank] = tokens.get(a.rank, 0.0) + weight[a.name] * inp.op.at(a.rank)
        level = fill_level([(t, inp.op.at(r)) for r, t in tokens.items()], [s.speed for s in servers])
        packer = _Packer(inp, weight, level)
        packer.place_leftovers(packer.fill(adapters, [s.name for s in servers], tokens))
        return packer.placement()


def fill_level(needs: list[tuple[float, float]], speeds: list[float]) -> float:
    """Least load at which servers of `speeds`, filled in turn with `needs` [(tokens/s, OP)], smallest OP (largest rank)
    first, take everything; a server's tokens all count against the first OP that it got.

    The rest of a rank that is less than `OVERFLOW` of a server goes on top: alone on the next server it would set the
    price of everything there.
    """

    def overload(level: float) -> float:
        """Load of the last server, which takes what is left, beyond `level`."""
        i, used, price = 0, 0.0, 0.0
        for need, op in needs:
            tokens = need
            while tokens > 0.0:
                price = price or op
                room = level * speeds[i] * price - used
                if tokens <= room + OVERFLOW * speeds[i] * price or i == len(speeds) - 1:
                    used += tokens
                    break
                tokens -= max(room, 0.0)
                i, used, price = i + 1, 0.0, 0.0
        return used / (speeds[i] * price) - level if price and i == len(speeds) - 1 else -level

    low = math.fsum(t / op for t, op in needs) / math.fsum(speeds)
    high = max(math.fsum(t for t, _ in needs) / (needs[0][1] * min(speeds)), low) if needs else low
    for _ in range(24):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if overload(middle) > 0.0 else (low, middle)
    return high


class _Packer:
    """State of steps 3 and 4: loads, the largest rank of each server, shares of each adapter."""

    def __init__(self, inp: PlacementInput, weight: dict[str, float], target: float) -> None:
        self.cap = Capacity(inp.servers)
        self.weight = weight
        self.rest = dict(weight)
        self.target = target
        self.op = inp.op
        self.idle = {a.name for a in inp.adapters if not inp.demand.get(a.name)}
        self.tokens = dict.fromkeys(self.cap.servers, 0.0)
        self.load = dict.fromkeys(self.cap.servers, 0.0)
        self.max_rank = dict.fromkeys(self.cap.servers, 0)
        self.share: dict[str, dict[str, float]] = {}
        self.unplaced: dict[str, str] = {}

    def _give(self, a: AdapterSpec, server: str, amount: float) -> None:
        self.cap.add(a, server)
        shares = self.share.setdefault(a.name, {})
        shares[server] = shares.get(server, 0.0) + amount
        # A server sustains OP[its largest rank] tokens/s: that is what every token counts against.
        self.tokens[server] += amount * self.op.at(a.rank)
        self.max_rank[server] = max(self.max_rank[server], a.rank)
        speed = self.cap.servers[server].speed
        self.load[server] = self.tokens[server] / (self.op.at(self.max_rank[server]) * speed)
        self.rest[a.name] -= amount

    def pack(self, adapters: list[AdapterSpec], group: list[str], rank: int) -> list[AdapterSpec]:
        """FRACTIONALBINPACKING of one rank onto its group: fill the least loaded server up to the target,
        split the rest over the next. Returns what did not fit wholly."""
        left = []
        heap = [(self.load[s], s) for s in group]
        heapq.heapify(heap)
        for a in adapters:
            aside: list[tuple[float, str]] = []
            sliver = SMALLEST_SHARE * min(self.weight[a.name], self.target)
            while heap and self.rest[a.name] > sliver:
                load, s = heapq.heappop(heap)
                room = (self.target - load) * self.cap.servers[s].speed
                if not self.cap.fits(a, s):
                    aside.append((load, s))
                    continue
                # Accept a small overflow rather than a copy for a sliver.
                rest = self.rest[a.name]
                take = rest if a.name in self.idle or rest <= room + sliver else room
                if take <= sliver and rest > take:
                    heapq.heappush(heap, (load, s))
                    break  # the least loaded one is full, so all are
                self._give(a, s, take)
                aside.append((self.load[s], s))
            for item in aside:
                heapq.heappush(heap, item)
            if self.rest[a.name] > sliver:
                left.append(a)
        return left

    def fill(self, adapters: list[AdapterSpec], servers: list[str], tokens: dict[int, float]) -> list[AdapterSpec]:
        """Fills `servers` in turn with `adapters` (largest ranks first; `tokens`: tokens/s of each rank) up to the
        target, as `fill_level` counts. Returns what did not fit wholly."""
        left, i, to_come = [], 0, dict(tokens)
        for a in adapters:
            sliver = SMALLEST_SHARE * min(self.weight[a.name], self.target)
            op = self.op.at(a.rank)
            while self.rest[a.name] > sliver:
                s = servers[i]
                if not self.cap.fits(a, s):
                    left.append(a)
                    break
                price = self.op.at(max(self.max_rank[s], a.rank)) * self.cap.servers[s].speed
                room = self.target * price - self.tokens[s]
                rest = self.rest[a.name]
                if (
                    i == len(servers) - 1
                    or to_come[a.rank] <= room + OVERFLOW * price
                    or rest * op <= room + sliver * op
                    or (a.name in self.idle and room > 0.0)
                ):
                    take = rest
                else:
                    take = room / op
                    i += 1
                if take > sliver or take == rest:
                    self._give(a, s, take)
                    to_come[a.rank] -= take * op
        return left

    def place_leftovers(self, adapters: list[AdapterSpec]) -> None:
        """ALLOCATEHIGHESTMAXRANK: the whole rest of an adapter to the least utilised server whose largest
        rank covers it, else to the least utilised of all that has room."""
        heaps: dict[int, list[tuple[float, str]]] = {}
        for s, r in self.max_rank.items():
            heaps.setdefault(r, []).append((self.load[s], s))
        for heap in heaps.values():
            heapq.heapify(heap)
        for a in adapters:
            covering = [r for r in heaps if r >= a.rank]
            server = self._least(a, covering, heaps) or self._least(a, list(heaps), heaps)
            if server is None:
                if a.name not in self.share:
                    self.unplaced[a.name] = self.cap.why_not(a)
                continue
            self._give(a, server, self.rest[a.name])
            heaps.setdefault(self.max_rank[server], [])
            heapq.heappush(heaps[self.max_rank[server]], (self.load[server], server))

    def _least(self, a: AdapterSpec, ranks: list[int], heaps: dict[int, list[tuple[float, str]]]) -> str | None:
        """The least loaded server with room among those whose largest rank is in `ranks`."""
        best: tuple[float, str] | None = None
        for r in ranks:
            heap = heaps[r]
            aside = []
            while heap:
                load, s = heap[0]
                if self.max_rank[s] != r or load != self.load[s]:
                    heapq.heappop(heap)  # stale
                    continue
                if not self.cap.fits(a, s):
                    aside.append(heapq.heappop(heap))
                    continue
                if best is None or (load, s) < best:
                    best = (load, s)
                break
            for item in aside:
                heapq.heappush(heap, item)
        # Its entry stays and is recognised as stale once the load has changed.
        return None if best is None else best[1]

    def placement(self) -> Placement:
        """Fractions renormalised to 1 (what fitted nowhere is left out of the sum)."""
        return Placement(phi={a: normalise(s) for a, s in self.share.items()}, unplaced=self.unplaced)


register(LoRAServe, LoRAServe.name)
