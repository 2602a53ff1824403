"""Quick predictions for `plan`: load, P95 time to first token, throughput within the SLO.

A queueing estimate, not a simulation: each server is an M/G/1 queue of prompts, its service time from the
step cost and its utilisation from the placement. Good for comparing two placements; the simulator is there
for figures to rely on.
"""

from __future__ import annotations

import math

import msgspec

from vllm_loraserve.cluster.placement import Placement, PlacementInput, server_loads


class Prediction(msgspec.Struct, frozen=True):
    """`loads`: server -> share of its operating point. `p95_ttft_s`: of all requests; inf when a server is
    asked for more than it can do. `headroom`: factor by which all demand could grow until the worst server
    is at its operating point (predicted throughput under the SLO = demand x headroom)."""

    loads: dict[str, float]
    p95_ttft_s: float
    headroom: float


def predict(
    inp: PlacementInput,
    placement: Placement,
    *,
    prompt_tokens: float = 1024.0,
    output_tokens: float = 200.0,
    utilisation_at_op: float = 0.85,
    burstiness: float = 1.0,
) -> Prediction:
    """What `placement` would do under the demand of `inp`.

    `utilisation_at_op`: share of raw capacity that an operating point stands for. `burstiness`: squared
    coefficient of variation of arrivals plus service, halved (1.0: Poisson arrivals, exponential service).
    """
    loads = server_loads(inp, placement)
    worst = max(loads.values(), default=0.0)
    share: list[tuple[float, float]] = []
    rank_tokens = {s.name: [0.0, 0.0] for s in inp.servers}
    for a in inp.adapters:
        for s, phi in placement.phi.get(a.name, {}).items():
            if s in rank_tokens:
                tokens = phi * inp.demand.get(a.name, 0.0)
                rank_tokens[s][0] += tokens
                rank_tokens[s][1] += tokens / inp.op.at(a.rank)
    speed = {s.name: s.speed for s in inp.servers}
    total = sum(t for t, _ in rank_tokens.values())
    p95 = 0.0
    for s, (tokens, work) in rank_tokens.items():
        if tokens <= 0.0:
            continue
        # Raw seconds of one request's work on this server, and the share of time it is busy.
        rho = work / speed[s] * utilisation_at_op
        service = work / tokens * utilisation_at_op * (prompt_tokens + output_tokens) / speed[s]
        prompt_s = service * prompt_tokens / (prompt_tokens + output_tokens)
        if rho >= 1.0:
            p95 = math.inf
            break
        share.append((tokens / total, prompt_s + _wait_quantile(rho, service * burstiness, 0.95)))
    if p95 == 0.0 and share:
        # The P95 over servers: the smallest t that covers 95 % of the requests is at most the worst
        # server's, and each server's own P95 is known; weigh by traffic.
        p95 = sum(w * t for w, t in share)
        p95 = max(p95, min(max(t for _, t in share), p95 * 2))
    return Prediction(loads, p95, 1.0 / worst if worst > 0.0 else math.inf)


def _wait_quantile(rho: float, service: float, q: float) -> float:
    """Quantile of the M/M/1 waiting time: P(wait > t) = rho exp(-(1 - rho) t / service)."""
    if rho <= 1.0 - q:
        return 0.0
    return service / (1.0 - rho) * math.log(rho / (1.0 - q))
