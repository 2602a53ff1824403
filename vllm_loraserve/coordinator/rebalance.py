"""Pure decisions between a policy's placement and what is published: repair, adoption, routes, moves.

A policy (`cluster.placement`) says where adapters should be. Here: keep what is there when the cluster changes a
little (`repair`), take a new placement only when it is worth its moves (`worth_adopting`), and send requests only
where they can be served (`effective_routes`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import msgspec

from vllm_loraserve.cluster.placement import (
    Capacity,
    Placement,
    PlacementInput,
    capacity_of,
    normalise,
    server_loads,
)
from vllm_loraserve.cluster.stability import interference_loads

MIN_GAIN, MIN_GAIN_SHARE = 0.05, 0.10
"""A new placement must lower the highest predicted load by this many servers and by this share of it, or by the same
share what does not fit in memory."""


class Move(msgspec.Struct, frozen=True):
    """A copy that a new placement needs (`bytes` cross the network or are read) or no longer needs (0 bytes)."""

    adapter: str
    instance: str
    action: Literal["prefetch", "release"]
    bytes: int


def repair(inp: PlacementInput, previous: Placement) -> Placement:
    """`previous` with as few changes as the servers and adapters of `inp` allow.

    Fractions on servers that are gone go to the remaining holders of the adapter; an adapter that has none left, or is
    new, goes whole to the least loaded server that can hold it. One that fits nowhere but whose rank some arena can
    take is put on the least loaded such server all the same: it then shares memory by eviction, which is slow but
    serves; only a rank that no arena can take is unplaced.
    """
    servers = {s.name: s for s in inp.servers}
    capacity = Capacity(inp.servers)
    placed = Placement()
    homeless = []
    for adapter in inp.adapters:
        # A server may have come back under its name with less room, and not every policy looks at max_rank.
        able = {name for name, server in servers.items() if server.takes(adapter)}
        kept = normalise({s: f for s, f in previous.phi.get(adapter.name, {}).items() if s in able})
        if not kept:
            standby = [s for s in previous.standby.get(adapter.name, ()) if s in able]
            kept = {standby[0]: 1.0} if standby else {}
        if kept:
            placed.phi[adapter.name] = kept
            for server in kept:
                capacity.add(adapter, server)
        else:
            homeless.append(adapter)
    load = server_loads(inp, placed)
    for adapter in sorted(homeless, key=lambda a: (-inp.weight(a), a.name)):
        takers = [s.name for s in inp.servers if s.takes(adapter)]
        if not takers:
            placed.unplaced[adapter.name] = capacity.why_not(adapter)
            continue
        fitting = [s for s in takers if capacity.fits(adapter, s)] or takers
        server = min(fitting, key=lambda s: (load[s], capacity.rows[s], s))
        capacity.add(adapter, server)
        load[server] += inp.weight(adapter) / servers[server].speed
        placed.phi[adapter.name] = {server: 1.0}
    # Last, so that a spare copy takes no place from one that serves.
    for adapter in inp.adapters:
        spare = []
        for server in previous.standby.get(adapter.name, ()) if adapter.name in placed.phi else ():
            if server in servers and server not in placed.phi[adapter.name] and capacity.fits(adapter, server):
                capacity.add(adapter, server)
                spare.append(server)
        if spare:
            placed.standby[adapter.name] = spare
    return placed


def worth_adopting(
    inp: PlacementInput, current: Placement, proposed: Placement, additive: bool = True
) -> tuple[bool, str]:
    """Whether `proposed` is enough better than `current`, and why (not), in one sentence for `explain`.

    `additive`: how the policy that proposes counts load (`PlacementPolicy`). The damping of the loop: demand that
    wobbles around an even placement changes nothing. Memory counts where load does not: a placement that relieves
    overfull instances is taken, unless the way back would then be worth its moves for the load alone.
    """
    now, then = (max(interference_loads(inp, p, additive).values(), default=0.0) for p in (current, proposed))
    told = f"highest predicted load {now:.2f} -> {then:.2f}"
    if not additive:
        told += " (tokens at the largest rank of their batch)"
    if _lower(now, then):
        return True, f"adopted: {told}"
    too_much, left = overfull(inp, current), overfull(inp, proposed)
    if _relieved(too_much, left) and not _lower(then, now):
        relief = ", ".join(f"{too_much[what]} -> {left[what]} {what}" for what in too_much if too_much[what])
        return True, f"adopted: does not fit {relief}; {told}"
    return False, f"kept: {told} is less than the {MIN_GAIN_SHARE:.0%} and {MIN_GAIN} that a move must gain"


def _lower(now: float, then: float) -> bool:
    """Whether a highest load of `then` instead of `now` is worth moves."""
    gain = now - then
    return gain >= MIN_GAIN and gain >= MIN_GAIN_SHARE * now


def overfull(inp: PlacementInput, placement: Placement) -> dict[str, int]:
    """What of the copies that serve is beyond the servers' limits, over all: `bytes` of host tiers, rank `rows` of
    arenas (where there is no host tier) and `adapters`. Standby copies only fill what is free."""
    held = capacity_of(inp, Placement(phi=placement.phi))
    out = {"bytes": 0, "rows": 0, "adapters": 0}
    for server in inp.servers:
        if server.host_bytes:
            out["bytes"] += max(0, held.bytes[server.name] - server.host_bytes)
        else:
            out["rows"] += max(0, held.rows[server.name] - server.capacity_rank_rows)
        if server.slots:
            out["adapters"] += max(0, held.count[server.name] - server.slots)
    return out


def _relieved(now: dict[str, int], then: dict[str, int]) -> bool:
    """Whether `then`, of `overfull`, is less in something by a share worth moves, and more in nothing."""
    less = any(then[what] <= (1.0 - MIN_GAIN_SHARE) * now[what] for what in now if now[what])
    return less and all(then[what] <= now[what] for what in now)


def only_fractions(current: Placement, proposed: Placement) -> bool:
    """Whether `proposed` has the copies of `current` and other fractions: free, so always worth it."""
    if current.phi.keys() != proposed.phi.keys():
        return False
    changed = False
    for adapter, routes in proposed.phi.items():
        before = current.phi[adapter]
        if routes.keys() != before.keys():
            return False
        changed = changed or any(abs(before[s] - f) > 0.02 for s, f in routes.items())
    return changed


def with_standby(current: Placement, proposed: Placement) -> Placement:
    """`current` with the warm copies that `proposed` wants beside what serves already."""
    standby = {}
    for adapter, routes in current.phi.items():
        spare = [s for s in proposed.standby.get(adapter, ()) if s not in routes]
        if spare:
            standby[adapter] = spare
    return Placement(phi=current.phi, standby=standby, unplaced=current.unplaced)


def moves(inp: PlacementInput, current: Placement, proposed: Placement) -> list[Move]:
    """Copies that `proposed` adds and drops, ordered by adapter and instance."""
    out = []
    for adapter in sorted(inp.adapters, key=lambda a: a.name):
        old, new = (set(p.holders(adapter.name)) for p in (current, proposed))
        out += [Move(adapter.name, s, "prefetch", adapter.bytes) for s in sorted(new - old)]
        out += [Move(adapter.name, s, "release", 0) for s in sorted(old - new)]
    return out


def effective_routes(
    target: Mapping[str, float], live: Collection[str], not_ready: Collection[str], holders: Collection[str]
) -> dict[str, float]:
    """Fractions to publish for one adapter.

    `target`: the placement's; `not_ready`: instances that are still fetching it or could not; `holders`: live
    instances that have it, placed there or not. Requests go to the live targets that are ready; while there is none,
    to whoever still holds a copy (the old place, until the new one has it); with no copy anywhere, to the targets,
    which load it for the first request.
    """
    alive = {s: f for s, f in target.items() if s in live and f > 0.0}
    ready = {s: f for s, f in alive.items() if s not in not_ready}
    if ready:
        return normalise(ready)
    if holders:
        return normalise(dict.fromkeys(holders, 1.0))
    return normalise(alive)
