"""What the pool tells Prometheus. The rate of a transfer is the rate of its byte counter."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class PoolMetrics:
    """The pool's counters in one registry. One object per registry and process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.fetches = Counter(
            "loraserve_fetches",
            "Adapters brought in, by source (arena, host, peer, checkpoint) and result (ok, failed, cancelled).",
            ["source", "result"],
            registry=registry,
        )
        self.moved = Counter(
            "loraserve_transfer_bytes", "Bytes of adapter pages that were set moving from peers.", registry=registry
        )
        self.arrived = Counter(
            "loraserve_transfer_arrived_bytes",
            "Bytes of adapter pages that arrived whole and verified, by the way they took.",
            ["rung"],
            registry=registry,
        )
        self.seconds = Histogram(
            "loraserve_fetch_seconds", "Seconds to bring an adapter in.", ["source"], buckets=BUCKETS, registry=registry
        )
        self.in_flight = Gauge("loraserve_fetches_in_flight", "Adapters being brought in now.", registry=registry)
        self.hedges = Counter(
            "loraserve_fetch_hedges", "Second sources started because the first was slow.", registry=registry
        )
        self.shared = Counter(
            "loraserve_fetches_shared", "Requests that waited for a fetch already under way.", registry=registry
        )
        self.prefetches = Counter("loraserve_prefetches", "Prefetches begun.", registry=registry)
