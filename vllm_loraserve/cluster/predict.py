"""Quick predictions for `plan`: load, P95 time to first token, throughput within the SLO.

A queueing estimate, not a simulation: each server is an M/G/1 queue of prompts, its service time from the
step cost and its utilisation from the placement. Good for comparing two placements; the simulator is there
for figures to rely on.
"""

from __future__ import annotations

import math

import msgspec

from vllm_loraserve.cluster.placement import Placement, PlacementInput
from vllm_loraserve.cluster.stability import interference_loads


class Prediction(msgspec.Struct, frozen=True):
    """`loads`: server -> share of its operating point. `p95_ttft_s`: of all requests; inf when a server is
    asked for more than it can do. `headroom`: factor by which all demand could grow until the worst server
    is at its operating point (predicted throughput under the SLO = demand x headroom)."""

    loads: dict[str, float]
    p95_ttft_s: float
    headroom: float


class _Queue(msgspec.Struct, frozen=True):
    """An M/M/1 queue: its share of all requests, the share of time it is busy, seconds of one request's work and of
    its prompt."""

    share: float
    rho: float
    service: float
    prompt_s: float

    def later(self, t: float) -> float:
        """P(time to first token > t): P(wait > w) = rho exp(-(1 - rho) w / service)."""
        wait = t - self.prompt_s
        return 1.0 if wait < 0.0 else self.rho * math.exp(-(1.0 - self.rho) * wait / self.service)


def predict(
    inp: PlacementInput,
    placement: Placement,
    *,
    additive: bool = True,
    prompt_tokens: float = 1024.0,
    output_tokens: float = 200.0,
    utilisation_at_op: float = 0.85,
    burstiness: float = 1.0,
) -> Prediction:
    """What `placement` would do under the demand of `inp`.

    `additive`: the measure of load of the policy in question, as in `interference_loads`. `utilisation_at_op`: share of
    raw capacity that an operating point stands for. `burstiness`: squared coefficient of variation of arrivals plus
    service, halved (1.0: Poisson arrivals, exponential service).
    """
    loads = interference_loads(inp, placement, additive)
    worst = max(loads.values(), default=0.0)
    tokens = dict.fromkeys(loads, 0.0)
    for a in inp.adapters:
        for s, phi in placement.phi.get(a.name, {}).items():
            if s in tokens:
                tokens[s] += phi * inp.demand.get(a.name, 0.0)
    total = sum(tokens.values())
    queues = []
    for s, rate in tokens.items():
        if rate <= 0.0:
            continue
        rho = loads[s] * utilisation_at_op
        if rho >= 1.0:
            return Prediction(loads, math.inf, 1.0 / worst)
        service = rho / rate * (prompt_tokens + output_tokens)
        prompt_s = service * prompt_tokens / (prompt_tokens + output_tokens)
        queues.append(_Queue(rate / total, rho, service * burstiness, prompt_s))
    return Prediction(loads, _quantile(queues, 0.95), 1.0 / worst if worst > 0.0 else math.inf)


def _quantile(queues: list[_Queue], q: float) -> float:
    """Quantile of the time to first token over the requests of all queues; 0.0 without any."""

    def later(t: float) -> float:
        return sum(queue.share * queue.later(t) for queue in queues)

    low, high = 0.0, max((queue.prompt_s for queue in queues), default=0.0)
    while later(high) > 1.0 - q:
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if later(middle) > 1.0 - q else (low, middle)
    return high
