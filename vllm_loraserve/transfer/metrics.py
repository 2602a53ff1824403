"""What the pool tells Prometheus: counters of all fetches, and how far each that runs now has come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Running(Protocol):
    """A fetch under way (`pool.Progress`)."""

    @property
    def name(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def rate(self) -> float: ...


class PoolMetrics:
    """The pool's counters in one registry. One object per registry and process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.running: Callable[[], Iterable[Running]] = lambda: ()
        """Where the fetches under way are asked for, whenever the registry is collected."""
        registry.register(self)
        self.fetches = Counter(
            "loraserve:fetches",
            "Adapters brought in, by source (arena, host, peer, checkpoint) and result (ok, failed, cancelled).",
            ["source", "result"],
            registry=registry,
        )
        self.moved = Counter(
            "loraserve:transfer_bytes", "Bytes of adapter pages that were set moving from peers.", registry=registry
        )
        self.arrived = Counter(
            "loraserve:transfer_arrived_bytes",
            "Bytes of adapter pages that arrived whole and verified, by the way they took.",
            ["rung"],
            registry=registry,
        )
        self.seconds = Histogram(
            "loraserve:fetch_seconds", "Seconds to bring an adapter in.", ["source"], buckets=BUCKETS, registry=registry
        )
        self.in_flight = Gauge("loraserve:fetches_in_flight", "Adapters being brought in now.", registry=registry)
        self.hedges = Counter(
            "loraserve:fetch_hedges", "Second sources started because the first was slow.", registry=registry
        )
        self.shared = Counter(
            "loraserve:fetches_shared", "Requests that waited for a fetch already under way.", registry=registry
        )
        self.prefetches = Counter(
            "loraserve:prefetches", "Adapters brought in before a request waited for them.", registry=registry
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One sample of each gauge for every adapter on its way."""
        done, total, rate = (
            GaugeMetricFamily(f"loraserve:fetch_progress_{name}", text, labels=["adapter"])
            for name, text in (
                ("bytes", "Bytes set moving so far, of an adapter on its way from a peer."),
                ("total_bytes", "Bytes that it has in all; 0: not known yet."),
                ("bytes_per_second", "Bytes set moving a second since the fetch began."),
            )
        )
        for fetch in self.running():
            done.add_metric([fetch.name], fetch.done)
            total.add_metric([fetch.name], fetch.total)
            rate.add_metric([fetch.name], fetch.rate)
        return iter((done, total, rate))
