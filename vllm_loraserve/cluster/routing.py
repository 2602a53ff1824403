"""Which server a request goes to, given the routes of its adapter: pure choice functions, no state of their
own.

`choose` is what a router calls. It draws by phi (the paper), or picks the least loaded of the eligible
servers, with the session as a tie-break so that a conversation finds its prefix cache again.
Predicted-finish-time routing with spilling lives in `routing_plus`.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Collection, Mapping

AFFINITY_SLACK = 0.15
"""How much more loaded than the best (in units of the best's load + 1) a session's own server may be."""


def rendezvous(key: str, servers: Collection[str]) -> list[str]:
    """`servers` by highest-random-weight hash of (key, server), best first; the same in every process."""

    def weight(server: str) -> bytes:
        return hashlib.blake2b(f"{key}\0{server}".encode(), digest_size=8).digest()

    return sorted(servers, key=weight, reverse=True)


def draw(routes: Mapping[str, float], rng: random.Random) -> str:
    """A server drawn by its fraction; `routes` need not be normalised but must have a positive sum."""
    point = rng.random() * sum(routes.values())
    server = ""
    for server, phi in routes.items():  # noqa: B007 - the last one catches rounding
        point -= phi
        if point < 0.0:
            break
    return server


def choose(
    routes: Mapping[str, float],
    loads: Mapping[str, float] | None = None,
    rng: random.Random | None = None,
    affinity: str | None = None,
    exclude: Collection[str] = (),
) -> str | None:
    """The server for one request, or None when no route is left.

    `routes`: phi of the eligible servers. `loads`: live load of servers (any unit, larger is busier), for
    example running + waiting requests divided by phi-independent capacity; without it the draw is by phi
    alone. With loads it is phi-weighted power of two: two candidates are drawn by phi, the less loaded one
    wins, which keeps the long-run fractions near phi and still steps around a queue. `affinity`: a session
    or prefix key; its rendezvous server is taken as long as it is within `AFFINITY_SLACK` of the better
    candidate. `exclude`: servers that just failed.
    """
    eligible = {s: p for s, p in routes.items() if p > 0.0 and s not in exclude}
    if not eligible:
        # Standby copies and fractions of zero are better than no answer when all else has failed.
        eligible = {s: 1.0 for s in routes if s not in exclude}
    if not eligible:
        return None
    if len(eligible) == 1:
        return next(iter(eligible))
    rng = rng or random.Random()
    first = draw(eligible, rng)
    if loads is None:
        return rendezvous_weighted(affinity, eligible) if affinity is not None else first
    rest = {s: p for s, p in eligible.items() if s != first}
    second = draw(rest, rng)
    # Equal loads keep the first, which was drawn by phi; else two servers would never see their fractions.
    best = min((first, second), key=lambda s: loads.get(s, 0.0))
    if affinity is not None:
        own = rendezvous_weighted(affinity, eligible)
        if loads.get(own, 0.0) <= loads.get(best, 0.0) + AFFINITY_SLACK * (loads.get(best, 0.0) + 1.0):
            return own
    return best


def rendezvous_weighted(key: str, routes: Mapping[str, float]) -> str:
    """Weighted rendezvous hashing: over many keys each server gets its fraction, and a key keeps its server
    while the fractions change little (each key moves with probability of the change of phi)."""
    best, best_score = "", -math.inf
    for server, phi in sorted(routes.items()):
        if phi <= 0.0:
            continue
        digest = hashlib.blake2b(f"{key}\0{server}".encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "big") + 0.5) / 2**64
        score = -phi / math.log(uniform)
        if score > best_score:
            best, best_score = server, score
    return best
