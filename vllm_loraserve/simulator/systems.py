"""The systems that are compared: a placement policy, how it routes, and whether it rebalances."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class RoutingMode(StrEnum):
    """How a request finds its server."""

    PHI = "phi"
    """Drawn by phi (the paper)."""
    PHI_LIVE = "phi-live"
    """Two drawn by phi, the one with fewer requests wins: what our router does for it."""
    LEAST_LOADED = "least-loaded"
    """The holder with the fewest tokens in flight (Dynamo's and dLoRA's request routing)."""
    LEAST_ADDED_COST = "least-added-cost"
    """Toppings: every server, by rank-aware predicted cost."""
    FINISH_TIME = "finish-time"
    """loraserve+: predicted finish time, spilling to non-holders when that is faster."""


class System(msgspec.Struct, frozen=True, kw_only=True):
    """A system under test. `period_s`: seconds between placements; 0.0: placed once."""

    name: str
    policy: str
    routing: RoutingMode = RoutingMode.PHI
    period_s: float = 5.0
    burst_rebalance: bool = False
    standby: bool = False


SYSTEMS = {
    s.name: s
    for s in (
        System(name="random", policy="random", period_s=0.0),
        System(name="contiguous", policy="contiguous", period_s=0.0),
        System(name="toppings", policy="toppings", routing=RoutingMode.LEAST_ADDED_COST, period_s=0.0),
        System(name="hrw", policy="hrw", routing=RoutingMode.LEAST_LOADED),
        System(name="min-cost-flow", policy="min-cost-flow", routing=RoutingMode.LEAST_LOADED),
        System(name="dlora-proactive", policy="dlora-proactive", routing=RoutingMode.LEAST_LOADED),
        System(name="rank-weighted", policy="rank-weighted"),
        System(name="loraserve", policy="loraserve"),
        System(name="loraserve-live", policy="loraserve", routing=RoutingMode.PHI_LIVE),
        System(
            name="loraserve+",
            policy="loraserve+",
            routing=RoutingMode.FINISH_TIME,
            burst_rebalance=True,
            standby=True,
        ),
    )
}
"""All systems by name. Dynamic ones share one period, so that none wins by rebalancing more often."""

STATIC_SLORA = ("random", "contiguous")
BASELINES = ("random", "contiguous", "toppings", "hrw", "min-cost-flow", "dlora-proactive")
"""What `loraserve` and `loraserve+` are compared with."""
