"""A fetch on its way: how far it is and how fast, and a bandwidth cap that slows it but starts no second source."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from transfer.helpers import KEY, PATIENCE_S, until, wanted
from vllm_loraserve.transfer import pool as pool_module
from vllm_loraserve.transfer.errors import AdapterUnavailableError, BandwidthError, CancelledError
from vllm_loraserve.transfer.flight import Flight, RateLimiter
from vllm_loraserve.transfer.metrics import PoolMetrics
from vllm_loraserve.transfer.pages import AdapterPages, Landing, Wanted
from vllm_loraserve.transfer.peers import PeerTable
from vllm_loraserve.transfer.pool import AdapterPool, Location, PoolOptions


def aside(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Runs it on a thread; what it returned or raised is then in the list."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_the_metrics_say_how_far_a_fetch_is_while_it_runs(source, target, server, monkeypatch):
    monkeypatch.setattr(pool_module, "REPORT_S", 0.01)
    registry, gate, first, reports = CollectorRegistry(), threading.Event(), [], []
    peers = PeerTable(KEY, "me", order=("memfd",))
    pool = AdapterPool(
        target,
        peers,
        options=PoolOptions(deadline_s=PATIENCE_S, hedge_s=PATIENCE_S),
        metrics=PoolMetrics(registry),
        on_progress=lambda: reports.append(gauges()),
    )

    def gauges() -> dict[str, float | None]:
        return {
            name: registry.get_sample_value(f"loraserve:fetch_progress_{name}", {"adapter": "a"})
            for name in ("bytes", "total_bytes", "bytes_per_second")
        }

    (rung,) = peers.get(server.endpoint).rungs()
    read = rung.read

    def half_way(link: object, lease: object, destination: object, flight: Flight) -> object:
        if not first:
            first.append(flight)
            flight.advance(1000)
            assert gate.wait(PATIENCE_S)
            flight.begin(flight.total)
        return read(link, lease, destination, flight)  # type: ignore[arg-type]

    rung.read = half_way  # type: ignore[method-assign]
    size = source.find(wanted()).size
    with pool:
        thread, results = aside(lambda: pool.bring(wanted(), [Location("one", server.endpoint)]))
        until(lambda: any(report["bytes"] == 1000 for report in reports))
        (now,) = pool.progress()
        assert (now.name, now.done, now.total) == ("a", 1000, size)
        assert gauges()["total_bytes"] == size
        assert 0 < gauges()["bytes_per_second"] <= 1000 / 0.01
        gate.set()
        thread.join(PATIENCE_S)
        assert results[0].source == "peer"
        assert set(gauges().values()) == {None}, "nothing is on its way"
        assert registry.get_sample_value("loraserve:transfer_bytes_total") == size + 1000


def test_a_new_try_begins_at_nothing(server, source, target, connect):
    flight, totals = Flight(PATIENCE_S), []
    entry = source.find(wanted("a"))
    source.slab.view(entry.ranges[0].offset, 1)[0] ^= 1
    begin = flight.begin

    def begun(total: int) -> None:
        begin(total)
        totals.append((flight.done, total))
        if len(totals) == 2:
            source.slab.view(entry.ranges[0].offset, 1)[0] ^= 1

    flight.begin = begun  # type: ignore[method-assign]
    connect("memfd").fetch(wanted("a"), target, flight)
    assert totals == [(0, entry.size)] * 2
    assert (flight.done, flight.moved) == (entry.size, 2 * entry.size)


class SlowLimiter(RateLimiter):
    """Everything waits for `gate`; the seconds are those of the test's own clock."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.booked = threading.Event()

    def book(self, size: int) -> float:
        self.booked.set()
        return PATIENCE_S / 2


@pytest.mark.parametrize("why", ["cap", "source"])
def test_our_own_bandwidth_cap_starts_no_second_source(why, source, target, server, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(
        pool_module, "Flight", lambda s, limiter, moved: Flight(PATIENCE_S, limiter, moved, lambda: clock.now)
    )
    monkeypatch.setattr(pool_module, "LOOK_S", 0.001)
    loads, looks = [], []

    def load(asked: Wanted, landing: Landing, flight: Flight) -> AdapterPages:
        loads.append(asked.name)
        raise FileNotFoundError(asked.name)

    peers = PeerTable(KEY, "me", order=("memfd",))
    pool = AdapterPool(target, peers, load=load, options=PoolOptions(deadline_s=1e9, hedge_s=0.01))
    monkeypatch.setattr(pool, "_report", lambda: looks.append(clock.now))
    limiter, entered, gate = SlowLimiter(), threading.Event(), threading.Event()
    (rung,) = peers.get(server.endpoint).rungs()
    read = rung.read

    def stuck(*arguments: object) -> object:
        entered.set()
        assert gate.wait(PATIENCE_S)
        return read(*arguments)

    if why == "cap":
        pool._limiter, entered = limiter, limiter.booked
    else:
        rung.read = stuck  # type: ignore[method-assign]
    with pool:
        thread, results = aside(lambda: pool.bring(wanted(), [Location("one", server.endpoint)]))
        assert entered.wait(PATIENCE_S)
        if why == "cap":
            until(lambda: pool._fetches[wanted()].flights[0]._holding)
        clock.now += 1000.0
        if why == "source":
            until(lambda: loads)
            gate.set()
        else:
            until(lambda: looks.count(clock.now) > 2)  # it has thought about it
            assert loads == []
            (flight,) = pool._fetches[wanted()].flights
            assert flight.held == 1000.0
            flight.cancelled.set()  # and a wait for bandwidth ends at once
        thread.join(PATIENCE_S)
    if why == "cap":
        assert isinstance(results[0], AdapterUnavailableError)
    else:
        assert results[0].source == "peer"


def test_a_wait_for_bandwidth_ends_with_the_flight_and_gives_it_back():
    limiter = RateLimiter(1000.0, burst=0, clock=lambda: 100.0)
    flight = Flight(None, limiter)
    thread, results = aside(lambda: flight.advance(1_000_000))
    until(lambda: flight._holding)
    flight.cancel()
    thread.join(PATIENCE_S)
    assert isinstance(results[0], CancelledError)
    assert flight.moved == 0
    assert limiter.book(1000) == pytest.approx(1.0), "what was booked and did not move costs nobody else"
    with pytest.raises(BandwidthError, match="bandwidth cap"):
        Flight(5.0, limiter).advance(1_000_000)
    assert limiter.book(1000) == pytest.approx(2.0)


def test_a_peer_that_our_own_cap_made_late_is_not_at_fault(source, target, server):
    peers = PeerTable(KEY, "me", order=("memfd",))
    with AdapterPool(target, peers, options=PoolOptions(deadline_s=PATIENCE_S, rate=1.0)) as pool:
        pool._limiter.burst = 0
        with pytest.raises(AdapterUnavailableError, match="bandwidth cap"):
            pool.bring(wanted(), [Location("one", server.endpoint)])
        assert peers._rests == {}
