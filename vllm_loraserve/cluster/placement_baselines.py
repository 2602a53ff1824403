"""Placement baselines, each as its own description says; none of them looks at rank in placement.

- `random`: S-LoRA Random, every adapter on one server drawn at random, static.
- `contiguous`: S-LoRA Contiguous, adapters sorted by rank and cut into equal runs, static.
- `toppings`: everything everywhere; its intelligence is in the per-request choice (routing mode
`least-added-cost`).
- `hrw`: replicas proportional to demand, on the servers of highest rendezvous weight (as NVIDIA Dynamo
describes).
- `min-cost-flow`: the same replica counts, servers chosen by min-cost flow with a cost for new loads and a
reward for
  keeping (as Dynamo describes).
- `dlora-proactive`: replicas added to the most under-provisioned adapter while the worst one does not suffer.

Static policies keep what `previous` says and only place what is new.
"""

from __future__ import annotations

import hashlib
import heapq
from functools import lru_cache

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from vllm_loraserve.cluster.placement import (
    AdapterSpec,
    Capacity,
    Placement,
    PlacementInput,
    register,
)
from vllm_loraserve.cluster.routing_plus import Choice

TOP_CANDIDATES = 16
"""Servers with the highest rendezvous weight that min-cost flow considers for an adapter."""


@lru_cache(maxsize=1 << 18)
def hash_unit(adapter: str, server: str) -> float:
    """Rendezvous weight of the pair in (0, 1); the same in every process."""
    digest = hashlib.blake2b(f"{adapter}\0{server}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2.0**64


def _put(out: Placement, cap: Capacity, a: AdapterSpec, servers: list[str]) -> bool:
    """Places `a` with equal fractions on those of `servers` that have room."""
    taken = [s for s in servers if cap.fits(a, s)]
    for s in taken:
        cap.add(a, s)
    if taken:
        out.phi[a.name] = dict.fromkeys(sorted(taken), 1.0 / len(taken))
    return bool(taken)


def _kept(inp: PlacementInput, cap: Capacity, out: Placement) -> list[AdapterSpec]:
    """Copies the previous placement where it still holds; returns the adapters that are left to place."""
    rest = []
    for a in inp.adapters:
        before = inp.previous.phi.get(a.name, {}) if inp.previous is not None else {}
        if not _put(out, cap, a, [s for s in before if s in cap.servers]):
            rest.append(a)
    return rest


class RandomStatic:
    """S-LoRA Random: one copy, on a server drawn by a hash of the names (deterministic, looks random)."""

    name = "random"
    additive = True
    choice: Choice | None = None

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def place(self, inp: PlacementInput) -> Placement:
        """See `PlacementPolicy.place`."""
        inp.validate()
        cap, out = Capacity(inp.servers), Placement()
        names = sorted(cap.servers)
        for a in sorted(_kept(inp, cap, out), key=lambda a: a.name):
            first = int(hash_unit(f"{self.seed}:{a.name}", "draw") * len(names))
            order = names[first:] + names[:first]
            room = next((s for s in order if cap.fits(a, s)), None)
            if room is None or not _put(out, cap, a, [room]):
                out.unplaced[a.name] = cap.why_not(a)
        return out


class Contiguous:
    """S-LoRA Contiguous: adapters by rank, cut into runs of equal count, one run for each server."""

    name = "contiguous"
    additive = False
    choice: Choice | None = None

    def place(self, inp: PlacementInput) -> Placement:
        """See `PlacementPolicy.place`."""
        inp.validate()
        cap, out = Capacity(inp.servers), Placement()
        names = sorted(cap.servers)
        rest = sorted(_kept(inp, cap, out), key=lambda a: (a.rank, a.name))
        for i, a in enumerate(rest):
            first = i * len(names) // len(rest)
            order = names[first:] + names[:first]
            room = next((s for s in order if cap.fits(a, s)), None)
            if room is None or not _put(out, cap, a, [room]):
                out.unplaced[a.name] = cap.why_not(a)
        return out


class FullReplication:
    """Toppings' placement: a copy of every adapter on every server that can hold it, the most wanted
    first."""

    name = "toppings"
    additive = True
    choice: Choice | None = "least-added-cost"

    def place(self, inp: PlacementInput) -> Placement:
        """See `PlacementPolicy.place`."""
        inp.validate()
        cap, out = Capacity(inp.servers), Placement()
        order = sorted(inp.adapters, key=lambda a: (-inp.demand.get(a.name, 0.0), a.name))
        # One copy of everything first (least full server), so that a full host tier costs replicas, not
        # adapters.
        heap = [(0, s) for s in sorted(cap.servers)]
        heapq.heapify(heap)
        for a in order:
            aside = []
            while heap:
                item = heapq.heappop(heap)
                aside.append(item)
                if cap.fits(a, item[1]):
                    _put(out, cap, a, [item[1]])
                    aside[-1] = (cap.bytes[item[1]], item[1])
                    break
            else:
                out.unplaced[a.name] = cap.why_not(a)
            for item in aside:
                heapq.heappush(heap, item)
        for a in order:
            if a.name in out.phi:
                _put(out, cap, a, sorted(cap.servers))
        return out


def replica_counts(inp: PlacementInput, slots: int) -> dict[str, int]:
    """Replicas proportional to demand by largest remainder over `slots` places: at least 1, at most one a
    server."""
    n = len(inp.servers)
    total = sum(inp.demand.get(a.name, 0.0) for a in inp.adapters)
    spare = max(slots - len(inp.adapters), 0)
    if total <= 0.0:
        return {a.name: 1 for a in inp.adapters}
    quota = {a.name: spare * inp.demand.get(a.name, 0.0) / total for a in inp.adapters}
    count = {k: min(1 + int(v), n) for k, v in quota.items()}
    left = spare - sum(int(v) for v in quota.values())
    for k in sorted(quota, key=lambda k: (-(quota[k] - int(quota[k])), k))[: max(left, 0)]:
        count[k] = min(count[k] + 1, n)
    return count


def total_slots(inp: PlacementInput) -> int:
    """Places for copies in the cluster: the servers' slots, or twice the adapters where slots are
    unlimited."""
    if all(s.slots for s in inp.servers):
        return sum(s.slots for s in inp.servers)
    return max(2 * len(inp.adapters), len(inp.servers))


class Rendezvous:
    """Highest-random-weight hashing with replicas by demand."""

    name = "hrw"
    additive = True
    choice: Choice | None = None

    def place(self, inp: PlacementInput) -> Placement:
        """See `PlacementPolicy.place`."""
        inp.validate()
        cap, out = Capacity(inp.servers), Placement()
        count = replica_counts(inp, total_slots(inp))
        for a in sorted(inp.adapters, key=lambda a: (-count[a.name], a.name)):
            order = sorted(cap.servers, key=lambda s: -hash_unit(a.name, s))
            taken: list[str] = []
            for s in order:
                if len(taken) < count[a.name] and cap.fits(a, s):
                    taken.append(s)
            if not _put(out, cap, a, taken):
                out.unplaced[a.name] = cap.why_not(a)
        return out


class MinCostFlow:
    """Replicas by demand, servers by min-cost flow: cost = rendezvous preference + new-load penalty - keep
    reward.

    A transportation problem (each adapter sends its replicas to distinct servers, each server takes its
    slots); its matrix is totally unimodular, so the linear program's vertex solution is integral.
    Candidates of an adapter are the servers with the highest weights and those that hold it.
    """

    name = "min-cost-flow"
    additive = True
    choice: Choice | None = None
    new_load = 1.0
    keep = 1.0

    def place(self, inp: PlacementInput) -> Placement:
        """See `PlacementPolicy.place`."""
        inp.validate()
        cap, out = Capacity(inp.servers), Placement()
        slots = total_slots(inp)
        count = replica_counts(inp, slots)
        names = sorted(cap.servers)
        column = {s: j for j, s in enumerate(names)}
        previous = inp.previous.phi if inp.previous is not None else {}
        rows_a, rows_s, cost = [], [], []
        adapters = sorted(inp.adapters, key=lambda a: a.name)
        for i, a in enumerate(adapters):
            order = sorted(names, key=lambda s: -hash_unit(a.name, s))
            held = [s for s in previous.get(a.name, {}) if s in column]
            wanted = max(TOP_CANDIDATES, count[a.name])
            for s in sorted({*order[:wanted], *held}):
                if cap.servers[s].takes(a):
                    rows_a.append(i)
                    rows_s.append(column[s])
                    cost.append(1.0 - hash_unit(a.name, s) + (-self.keep if s in held else self.new_load))
        if cost:
            per_server = -(-sum(count.values()) // len(names)) + 1
            n, m, k = len(adapters), len(names), len(cost)
            ones, idx = np.ones(k), np.arange(k)
            feasible = np.bincount(rows_a, minlength=n)
            need = np.minimum([count[a.name] for a in adapters], feasible)
            limits = [s.slots or per_server for s in (cap.servers[name] for name in names)]
            solved = linprog(
                np.array(cost),
                A_eq=csr_matrix((ones, (rows_a, idx)), shape=(n, k)),
                b_eq=need,
                A_ub=csr_matrix((ones, (rows_s, idx)), shape=(m, k)),
                b_ub=limits,
                bounds=(0.0, 1.0),
                method="highs-ds",
            )
            flow = solved.x if solved.success else None
            chosen: dict[int, list[str]] = {}
            if flow is not None:
                for e in np.nonzero(flow > 0.5)[0]:
                    chosen.setdefault(rows_a[e], []).append(names[rows_s[e]])
            for i, a in enumerate(adapters):
                wanted_servers = chosen.get(i) or sorted(names, key=lambda s: -hash_unit(a.name, s))[: count[a.name]]
                if not _put(out, cap, a, wanted_servers):
                    room = next((s for s in sorted(names, key=lambda s: -hash_unit(a.name, s)) if cap.fits(a, s)), None)
                    if room is None or not _put(out, cap, a, [room]):
                        out.unplaced[a.name] = cap.why_not(a)
        else:
            out.unplaced = {a.name: cap.why_not(a) for a in inp.adapters}
        return out


class DLoRAProactive:
    """dLoRA's proactive placement: one copy of each adapter round the servers, then replicas for the
    adapter with the least provision (sum over its copies of free capacity / its load), onto the server with
    fewest adapters, while the minimum over adapters does not fall; at most N + M - 1 copies of N servers
    and M adapters beyond the first."""

    name = "dlora-proactive"
    additive = True
    choice: Choice | None = None

    def place(self, inp: PlacementInput) -> Placement:
        """See `PlacementPolicy.place`."""
        inp.validate()
        cap, out = Capacity(inp.servers), Placement()
        load = {a.name: max(inp.demand.get(a.name, 0.0), 1e-3) for a in inp.adapters}
        names = sorted(cap.servers)
        where: dict[str, list[str]] = {}
        specs = {a.name: a for a in inp.adapters}
        for a in sorted(inp.adapters, key=lambda a: (-load[a.name], a.name)):
            room = min((s for s in names if cap.fits(a, s)), key=lambda s: (cap.count[s], s), default=None)
            if room is None:
                out.unplaced[a.name] = cap.why_not(a)
                continue
            cap.add(a, room)
            where[a.name] = [room]
        expected = dict.fromkeys(names, 0.0)
        for name, held in where.items():
            expected[held[0]] += load[name]
        share = {s: cap.servers[s].speed for s in names}

        def provision(a: str) -> float:
            return sum(share[s] / max(expected[s], 1e-9) for s in where[a])

        heap = [(provision(name), name) for name in where]
        heapq.heapify(heap)
        worst = heap[0][0] if heap else 0.0
        for _ in range(len(names) + len(where) - 1):
            if not heap:
                break
            _, name = heapq.heappop(heap)
            spec = specs[name]
            free = [s for s in names if s not in where[name] and cap.fits(spec, s)]
            if not free:
                continue
            s = min(free, key=lambda s: (cap.count[s], expected[s], s))
            before = len(where[name])
            for t in where[name]:
                expected[t] -= load[name] / before - load[name] / (before + 1)
            expected[s] += load[name] / (before + 1)
            where[name].append(s)
            now_worst = min(provision(b) for b in where) if len(where) <= 256 else provision(name)
            if now_worst < worst:
                where[name].pop()
                expected[s] -= load[name] / (before + 1)
                for t in where[name]:
                    expected[t] += load[name] / before - load[name] / (before + 1)
                break
            worst = now_worst
            cap.add(spec, s)
            heapq.heappush(heap, (provision(name), name))
        for name, held in where.items():
            out.phi[name] = dict.fromkeys(sorted(held), 1.0 / len(held))
        return out


for _policy in (RandomStatic, Contiguous, FullReplication, Rendezvous, MinCostFlow, DLoRAProactive):
    register(_policy, _policy.name)
