"""Prometheus metrics of the router, `loraserve:router_*`.

Labels are bounded: endpoints are those the router serves, adapters appear as rank classes (powers of two), instances as
far as they are in the table; names from requests never become labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_loraserve.router.directory import Directory
    from vllm_loraserve.router.queue import Admission

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def rank_class(rank: int) -> str:
    """`base` for the base model (0), `none` for no model (-1), else the next power of two from 8 to 512."""
    if rank <= 0:
        return "base" if rank == 0 else "none"
    return str(min(512, max(8, 1 << (rank - 1).bit_length())))


class RouterMetrics:
    """Every metric of one router, in a registry of its own."""

    def __init__(self, directory: Directory, admission: Admission) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_Live(directory, admission))
        self._requests = Counter(
            "loraserve:router_requests",
            "Requests answered, by endpoint, rank class of the adapter and HTTP status (499: the client left).",
            ["endpoint", "rank", "status"],
            registry=self.registry,
        )
        self._first_byte = Histogram(
            "loraserve:router_first_byte_seconds",
            "From a request's arrival to the first byte of its answer, queue and retries included.",
            ["rank"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._queue_wait = Histogram(
            "loraserve:router_queue_wait_seconds",
            "Time that requests waited for a place on an instance.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.retries = Counter(
            "loraserve:router_retries",
            "Requests sent again to another instance, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.broken_streams = Counter(
            "loraserve:router_broken_streams",
            "Streams that ended with an error event because their instance died.",
            registry=self.registry,
        )
        self.stalled_clients = Counter(
            "loraserve:router_stalled_clients",
            "Streams ended because their client did not read.",
            registry=self.registry,
        )
        self._observe_queue = self._queue_wait.observe
        self._request_children: dict[tuple[str, int, int], Counter] = {}
        self._first_children: dict[int, Histogram] = {}

    def answered(self, endpoint: str, rank: int, status: int) -> None:
        """Counts a finished request."""
        child = self._request_children.get((endpoint, rank, status))
        if child is None:
            child = self._requests.labels(endpoint, rank_class(rank), str(status))
            self._request_children[endpoint, rank, status] = child
        child.inc()

    def first_byte(self, rank: int, seconds: float) -> None:
        """Records the time to the first byte."""
        child = self._first_children.get(rank)
        if child is None:
            child = self._first_children[rank] = self._first_byte.labels(rank_class(rank))
        child.observe(seconds)

    def queued(self, seconds: float) -> None:
        """Records the wait for a place."""
        self._observe_queue(seconds)

    def exposition(self) -> bytes:
        """The text that /metrics answers."""
        return generate_latest(self.registry)


class _Live(Collector):
    """Gauges read off the router's state when somebody asks, so that they can't drift from it."""

    def __init__(self, directory: Directory, admission: Admission) -> None:
        self._directory = directory
        self._admission = admission

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterable[GaugeMetricFamily]:
        directory = self._directory
        yield GaugeMetricFamily(
            "loraserve:router_queue_depth", "Requests that wait for a place.", value=self._admission.waiting
        )
        running = GaugeMetricFamily(
            "loraserve:router_in_flight", "Requests under way, by instance.", labels=["instance"]
        )
        breaker = GaugeMetricFamily(
            "loraserve:router_breaker_open", "1 while an instance is avoided after a failure.", labels=["instance"]
        )
        for upstream in directory.busy():
            running.add_metric([upstream.name], upstream.in_flight)
            breaker.add_metric([upstream.name], float(upstream.failures > 0))
        yield running
        yield breaker
        yield GaugeMetricFamily(
            "loraserve:router_adapters", "Adapters in the routing table.", value=len(directory.adapters)
        )
        yield GaugeMetricFamily(
            "loraserve:router_table_age_seconds", "Since a routing table last came in.", value=directory.age_s()
        )
