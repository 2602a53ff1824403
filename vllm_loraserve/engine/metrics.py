"""The scheduler's counters on the server's `/metrics`.

The scheduler runs in the engine-core process, `/metrics` in the API server: the scheduler publishes its totals once a
second, and when it runs out of requests, on a socket beside the loads' channel; the API server keeps the last ones and
shows them under `loraserve:`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from vllm.logger import init_logger

from vllm_loraserve.engine.channel import Family
from vllm_loraserve.engine.readiness import LOAD_BUCKETS_S, LoadCounters
from vllm_loraserve.engine.trace import ROWS_BUCKETS, SHARE_BUCKETS, StepCounters

logger = init_logger("vllm.loraserve.metrics")

PUBLISH_S = 1.0


class Totals(msgspec.Struct, frozen=True):
    """What is published."""

    steps: StepCounters
    loads: LoadCounters
    loading: int
    waiting_adapters: int
    rows_in_use: int
    figures: list[Family] = []
    """Of all workers: what their memory holds, what came from peers."""


def summed(workers: Iterable[list[Family]]) -> list[Family]:
    """One list for all workers: samples of one name and labels are added up."""
    families: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for worker in workers:
        for family in worker:
            families.setdefault(family.name, family)
            found = values.setdefault(family.name, {})
            for name, labels, value in family.samples:
                key = (name, tuple(labels.items()))
                found[key] = found.get(key, 0.0) + value
    return [
        msgspec.structs.replace(
            family, samples=[(name, dict(labels), value) for (name, labels), value in values[family.name].items()]
        )
        for family in families.values()
    ]


class Publisher:
    """The scheduler's side: `publish` costs nothing until a second has passed."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._next = 0.0

    def due(self, now: float) -> bool:
        """Whether it is time."""
        return now >= self._next

    def publish(self, totals: Totals, now: float) -> None:
        """To whoever listens; never waits."""
        self._next = now + PUBLISH_S
        self._socket.send(msgspec.msgpack.encode(totals), zmq.NOBLOCK)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


class Collector:
    """The API server's side: a prometheus collector over the totals that came last."""

    def __init__(self) -> None:
        self.totals: Totals | None = None
        self.received = 0.0

    async def listen(self, address: str) -> None:
        """Runs until cancelled."""
        socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(address)
        decode = msgspec.msgpack.Decoder(Totals).decode
        try:
            while True:
                self.totals, self.received = decode(await socket.recv()), time.monotonic()
        finally:
            socket.close()

    def collect(self) -> Iterator[Any]:
        """The families; none before the first totals came."""
        if self.totals is None:
            return
        steps, loads = self.totals.steps, self.totals.loads
        for name, text, value in (
            ("steps", "Steps of the scheduler.", steps.steps),
            ("lora_steps", "Steps in which adapters ran.", steps.lora_steps),
            ("admitted_requests", "Requests that began to run.", steps.admitted),
            ("cut_prefill_chunks", "Prefill chunks of adapters cut or put off beside decodes.", steps.cut_chunks),
            ("held_prefills", "Prefills kept out of a step by the work budget.", steps.held_prefills),
            ("skips", "Requests admitted past an older one whose adapter found no room.", steps.overtakes),
            ("drain_steps", "Steps in which room was made for a request that waited long.", steps.drains),
            ("failed_requests", "Requests ended because their adapter can't be had.", steps.failed_requests),
            ("limited_requests", "Requests ended with 429.", steps.limited_requests),
            ("load_failures", "Loads that failed for good.", loads.failures),
            ("load_retries", "Loads tried again.", loads.retries),
            ("load_timeouts", "Loads that did not end within load_timeout_s.", loads.timeouts),
            ("load_stalls", "Adapters read inside a step after all.", loads.stalls),
            ("load_stall_seconds", "Seconds of such reading.", loads.stall_seconds),
        ):
            yield CounterMetricFamily(f"loraserve:{name}", text, value=value)
        for name, text, gauge in (
            ("oldest_wait_seconds", "Longest wait of a request that waits for an adapter.", steps.oldest_wait_s),
            ("loading_adapters", "Adapters being loaded while requests wait.", self.totals.loading),
            ("waiting_adapters", "Adapters with waiting requests.", self.totals.waiting_adapters),
            ("rank_rows_in_use", "Rank rows of adapters of running requests.", self.totals.rows_in_use),
        ):
            yield GaugeMetricFamily(f"loraserve:{name}", text, value=gauge)
        yield _histogram("load_seconds", "Seconds of a load.", LOAD_BUCKETS_S, loads.load_histogram, loads.load_seconds)
        yield _histogram(
            "rank_rows_per_step", "Rank rows of a step's adapters.", ROWS_BUCKETS, steps.rank_rows, steps.rank_rows_sum
        )
        yield _histogram(
            "lora_cost_share",
            "LoRA work over base work of a step.",
            SHARE_BUCKETS,
            steps.cost_share,
            steps.cost_share_sum,
        )
        for family in self.totals.figures:
            metric = Metric(family.name, family.text, family.kind)
            for name, labels, value in family.samples:
                metric.add_sample(name, labels, value)
            yield metric


def _histogram(name: str, text: str, bounds: Any, counts: list[int], total: float) -> Any:
    buckets, seen = [], 0
    for bound, count in zip([*map(str, map(float, bounds)), "+Inf"], counts, strict=True):
        seen += count
        buckets.append((bound, seen))
    return HistogramMetricFamily(f"loraserve:{name}", text, buckets=buckets, sum_value=total)
