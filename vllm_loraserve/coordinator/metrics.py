"""Prometheus metrics of the coordinator: read from its state when scraped, so nothing is counted twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_loraserve.coordinator.control import Controller


class _ControllerCollector(Collector):
    def __init__(self, controller: Controller, counters: Counter[str]) -> None:
        self._controller = controller
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        controller = self._controller
        messages = CounterMetricFamily("loraserve_coordinator_messages", "Messages by type or fault.", labels=["kind"])
        for kind, count in sorted(dict(self._counters).items()):
            messages.add_metric([kind], count)
        yield messages
        states = Counter(r.state for r in controller.registry.all())
        adapters = GaugeMetricFamily("loraserve_coordinator_adapters", "Registered adapters.", labels=["state"])
        for state in ("active", "draining", "failed"):
            adapters.add_metric([state], states[state])
        yield adapters
        members = controller.members.all()
        yield GaugeMetricFamily("loraserve_coordinator_instances", "Live instances.", value=len(members))
        resident = GaugeMetricFamily("loraserve_coordinator_resident", "Adapters resident.", labels=["instance"])
        tokens = GaugeMetricFamily("loraserve_coordinator_tokens_per_s", "Tokens per second.", labels=["instance"])
        for member in members:
            resident.add_metric([member.name], len(member.resident))
            tokens.add_metric([member.name], member.load.tokens_per_s)
        yield resident
        yield tokens
        yield GaugeMetricFamily(
            "loraserve_coordinator_pending_commands", "Commands not answered.", value=len(controller.commands.pending())
        )
        yield GaugeMetricFamily(
            "loraserve_coordinator_table_version", "Version of the table.", value=controller.version
        )


def serve_metrics(controller: Controller, counters: Counter[str], host: str, port: int) -> Callable[[], None]:
    """Serves `/metrics` on a thread of its own; returns what stops it. Raises OSError when the port is taken."""
    registry = CollectorRegistry()
    registry.register(_ControllerCollector(controller, counters))
    server, thread = start_http_server(port, host, registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return stop
