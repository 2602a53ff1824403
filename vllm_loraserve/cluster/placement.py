"""Where adapters go: the interface of all placement policies, their shared capacity book-keeping, the
registry.

A policy is a pure function of a `PlacementInput` (adapters, servers, demand, operating points, the previous
placement); it has no clock, does no I/O, and gives the same answer for the same input. Each family of
policies has its own file (`placement_loraserve`, `placement_baselines`, `placement_plus`) and registers
itself in `POLICIES`; use `make_policy(name)`.

Words: **phi[adapter][server]** is the fraction of an adapter's requests that a server gets; the fractions
of a placed adapter sum to 1. A server with phi > 0, or listed in `standby`, holds a copy. **Load** of a
server is sum(phi x demand / OP[rank]) / speed: 1.0 means it runs at its operating point.
"""

from __future__ import annotations

import heapq
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import msgspec

from vllm_loraserve.cluster.operating_points import OperatingPoints, shipped_defaults
from vllm_loraserve.cluster.routing_plus import Choice

IDLE_TOKENS_PER_S = 1e-3
IDLE_SHARE = 0.02
"""Demand assumed of an idle adapter: this share of the mean, so that idle adapters spread over the servers
without deciding anything against real demand (and IDLE_TOKENS_PER_S when nobody has demand)."""


class PlacementError(ValueError):
    """A placement that cannot be computed at all (no server, unknown policy, a contradictory input)."""


class AdapterSpec(msgspec.Struct, frozen=True):
    """An adapter as placement sees it.

    `rank_rows`: rank rows it takes in the device arena (its pages, rounded up); `bytes`: bytes of its pages
    on one server (all tensor-parallel workers together), what a copy costs to hold and to move.
    """

    name: str
    rank: int
    rank_rows: int
    bytes: int


class ServerSpec(msgspec.Struct, frozen=True):
    """An instance as placement sees it.

    `capacity_rank_rows`: rank rows of the device arena; an adapter with more cannot run there.
    `host_bytes`: bytes of the host tier, which holds the placed adapters. 0: no host tier, then the placed
    adapters must fit the arena together.
    `slots`: most adapters that may be placed there at once; 0: no limit.
    `max_rank`: largest rank of an adapter that it accepts; 0: whatever fits the arena.
    `speed`: tokens/s relative to the instance the operating points were measured on.
    """

    name: str
    capacity_rank_rows: int
    host_bytes: int = 0
    slots: int = 0
    speed: float = 1.0
    max_rank: int = 0

    def takes(self, adapter: AdapterSpec) -> bool:
        """Whether the adapter can run there at all, with nothing else in the way."""
        return adapter.rank_rows <= self.capacity_rank_rows and not 0 < self.max_rank < adapter.rank


class Placement(msgspec.Struct):
    """The answer: phi[adapter][server], extra copies kept warm, and the adapters that fit nowhere.

    `unplaced` maps an adapter to the one-sentence reason; such an adapter has no entry in `phi`.
    """

    phi: dict[str, dict[str, float]] = {}
    standby: dict[str, list[str]] = {}
    unplaced: dict[str, str] = {}

    def holders(self, adapter: str) -> list[str]:
        """Servers that hold a copy: those with a fraction first, then standby copies."""
        routed = self.phi.get(adapter, {})
        return [*routed, *(s for s in self.standby.get(adapter, ()) if s not in routed)]

    def on(self, server: str) -> list[str]:
        """Adapters that `server` holds (in the order of `phi`, then standby copies)."""
        held = [a for a, routes in self.phi.items() if server in routes]
        return held + [a for a, ss in self.standby.items() if server in ss and server not in self.phi.get(a, {})]

    def by_server(self) -> dict[str, list[str]]:
        """Server -> adapters it holds, in one pass."""
        out: dict[str, list[str]] = {}
        for a in self.phi:
            for s in self.holders(a):
                out.setdefault(s, []).append(a)
        return out


class PlacementInput(msgspec.Struct, kw_only=True):
    """All that a policy may look at.

    `demand`: tokens/s (prompt + output) expected of an adapter in the next period; missing means never seen.
    `observed_load`: live load per server (1.0: at its operating point) where known; only some policies use
    it.
    """

    adapters: list[AdapterSpec]
    servers: list[ServerSpec]
    demand: dict[str, float] = {}
    op: OperatingPoints = msgspec.field(default_factory=shipped_defaults)
    previous: Placement | None = None
    observed_load: dict[str, float] = {}
    idle_demand: float = -1.0
    """Tokens/s assumed of an idle adapter; < 0: derived from the others."""

    def __post_init__(self) -> None:
        if self.idle_demand < 0.0:
            mean = math.fsum(self.demand.get(a.name, 0.0) for a in self.adapters) / max(len(self.adapters), 1)
            self.idle_demand = max(IDLE_TOKENS_PER_S, IDLE_SHARE * mean)

    def weight(self, adapter: AdapterSpec) -> float:
        """Share of one speed-1.0 server that the adapter asks for; always > 0, so idle adapters spread
        too."""
        return max(self.demand.get(adapter.name, 0.0), self.idle_demand) / self.op.at(adapter.rank)

    def validate(self) -> None:
        """Raises PlacementError for an input no policy can work with."""
        if not self.servers:
            raise PlacementError("placement: there is no server; start an instance and let it register")
        for what, names in (
            ("server", [s.name for s in self.servers]),
            ("adapter", [a.name for a in self.adapters]),
        ):
            if len(set(names)) != len(names):
                twice = next(n for n in names if names.count(n) > 1)
                raise PlacementError(f"placement: {what} {twice!r} is listed twice; names must be unique")
        for s in self.servers:
            if not s.speed > 0.0:
                raise PlacementError(f"placement: server {s.name!r} has speed {s.speed}; it must be positive")


class PlacementPolicy(Protocol):
    """A placement policy: pure, deterministic, `name` is its key in the registry.

    `additive`: the measure it balances by, as in `stability.interference_loads`: every token costs its own rank, or
    the largest of its batch. Its placements are to be judged by the same one. `choice`: by which prediction of
    `routing_plus` requests are to be routed; None: by phi and load.
    """

    name: str
    additive: bool
    choice: Choice | None

    def place(self, inp: PlacementInput) -> Placement:
        """The placement of every adapter of `inp`; raises PlacementError on an impossible input."""
        ...


class Capacity:
    """Book-keeping of what each server holds while a placement is built; the one place that knows the
    limits."""

    def __init__(self, servers: Iterable[ServerSpec]) -> None:
        self.servers = {s.name: s for s in servers}
        self.bytes = dict.fromkeys(self.servers, 0)
        self.rows = dict.fromkeys(self.servers, 0)
        self.count = dict.fromkeys(self.servers, 0)
        self.held: set[tuple[str, str]] = set()

    def fits(self, adapter: AdapterSpec, server: str) -> bool:
        """Whether `server` can hold `adapter` (true when it already does)."""
        if (adapter.name, server) in self.held:
            return True
        s = self.servers[server]
        if not s.takes(adapter) or (s.slots and self.count[server] >= s.slots):
            return False
        if s.host_bytes:
            return self.bytes[server] + adapter.bytes <= s.host_bytes
        return self.rows[server] + adapter.rank_rows <= s.capacity_rank_rows

    def add(self, adapter: AdapterSpec, server: str) -> None:
        """Counts a copy; the caller has asked `fits`."""
        if (adapter.name, server) not in self.held:
            self.held.add((adapter.name, server))
            self.bytes[server] += adapter.bytes
            self.rows[server] += adapter.rank_rows
            self.count[server] += 1

    def remove(self, adapter: AdapterSpec, server: str) -> None:
        """Forgets a copy."""
        if (adapter.name, server) in self.held:
            self.held.remove((adapter.name, server))
            self.bytes[server] -= adapter.bytes
            self.rows[server] -= adapter.rank_rows
            self.count[server] -= 1

    def why_not(self, adapter: AdapterSpec) -> str:
        """One sentence: why no server takes `adapter`, and what to change."""
        largest = max((s.capacity_rank_rows for s in self.servers.values()), default=0)
        if adapter.rank_rows > largest:
            return (
                f"needs {adapter.rank_rows} rank rows and the largest arena has {largest}; "
                "give an instance a larger arena"
            )
        if not any(s.takes(adapter) for s in self.servers.values()):
            return f"has rank {adapter.rank}, and no instance with room for it takes one; raise its max_rank"
        return (
            f"needs {adapter.bytes} bytes and every server that could run it is full "
            "(host tier or slots); add host memory, slots or an instance"
        )


def capacity_of(inp: PlacementInput, placement: Placement) -> Capacity:
    """The book-keeping that `placement` leads to on the servers of `inp` (copies elsewhere are ignored)."""
    cap = Capacity(inp.servers)
    specs = {a.name: a for a in inp.adapters}
    for name in placement.phi:
        if (spec := specs.get(name)) is not None:
            for server in placement.holders(name):
                if server in cap.servers:
                    cap.add(spec, server)
    return cap


def server_loads(inp: PlacementInput, placement: Placement) -> dict[str, float]:
    """Predicted load of each server under `placement` (1.0: at its operating point)."""
    load = {s.name: 0.0 for s in inp.servers}
    speed = {s.name: s.speed for s in inp.servers}
    for a in inp.adapters:
        for server, phi in placement.phi.get(a.name, {}).items():
            if server in load:
                load[server] += phi * inp.weight(a) / speed[server]
    return load


def normalise(phi: Mapping[str, float]) -> dict[str, float]:
    """Fractions scaled to sum to 1, in the order of the server names; drops non-positive ones."""
    positive = {s: v for s, v in sorted(phi.items()) if v > 0.0}
    total = sum(positive.values())
    return {s: v / total for s, v in positive.items()}


class RankWeighted:
    """Rank-weighted least loaded: the simplest policy that knows about rank.

    Adapters by weight (demand / OP[rank]), heaviest first, go to the least loaded server that has room. One
    that asks for more than a fair share of a server is split over as many as it needs. With no demand at
    all it spreads adapters by the cost of their rank. The result depends on names only to break ties.
    """

    name = "rank-weighted"
    additive = True
    choice: Choice | None = None

    def place(self, inp: PlacementInput) -> Placement:
        """See `PlacementPolicy.place`."""
        inp.validate()
        cap = Capacity(inp.servers)
        out = Placement()
        target = math.fsum(inp.weight(a) for a in inp.adapters) / math.fsum(s.speed for s in inp.servers)
        heap = [(0.0, s.name) for s in sorted(inp.servers, key=lambda s: s.name)]
        heapq.heapify(heap)
        for a in sorted(inp.adapters, key=lambda a: (-inp.weight(a), a.name)):
            rest = inp.weight(a)
            share: dict[str, float] = {}
            set_aside: list[tuple[float, str]] = []
            while heap and rest > 1e-15:
                load, server = heapq.heappop(heap)
                if not cap.fits(a, server):
                    set_aside.append((load, server))
                    continue
                speed = cap.servers[server].speed
                room = max(target * speed - load * speed, 0.0)
                # Split only what is worth a copy: not idle adapters, not a rest below a tenth of a fair
                # share.
                whole = not inp.demand.get(a.name) or rest <= room + 0.1 * target * speed
                take = rest if whole else max(room, 0.1 * target * speed)
                cap.add(a, server)
                share[server] = share.get(server, 0.0) + take
                rest -= take
                set_aside.append((load + take / speed, server))
            for item in set_aside:
                heapq.heappush(heap, item)
            if share:
                out.phi[a.name] = normalise(share)
            else:
                out.unplaced[a.name] = cap.why_not(a)
        return out


POLICIES: dict[str, Callable[[], PlacementPolicy]] = {RankWeighted.name: RankWeighted}
"""name -> factory. Policies of other files appear here when `make_policy` or `policy_names` is first
called."""

_FAMILIES = ("placement_loraserve", "placement_baselines", "placement_plus")


def register(factory: Callable[[], PlacementPolicy], name: str) -> None:
    """Adds a policy under `name`; a second one of the same name is an error."""
    if name in POLICIES:
        raise PlacementError(f"placement policy {name!r} is registered twice; choose another name")
    POLICIES[name] = factory


def _load_families() -> None:
    for family in _FAMILIES:
        module = f"{__package__}.{family}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)


def policy_names() -> list[str]:
    """Names of all policies."""
    _load_families()
    return sorted(POLICIES)


def make_policy(name: str) -> PlacementPolicy:
    """A policy by name; PlacementError lists the known names."""
    _load_families()
    if name not in POLICIES:
        raise PlacementError(f"unknown placement policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
