"""The adapter pool as one instance sees it: bring an adapter in from the nearest source that works.

Order of sources: arena, host tier, a peer, the checkpoint. Who holds what comes in as values with each call (the
coordinator's table), so that the pool goes on without a coordinator. One adapter is fetched once, however many ask for
it. When a source is slow a second one is started beside it and the first to verify wins. A source that fails makes
room for the next; only when all have failed does the caller get AdapterUnavailableError, and the engine goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Literal

import msgspec

from vllm_loraserve.transfer.errors import (
    AdapterUnavailableError,
    BandwidthError,
    CancelledError,
    DeadlineError,
    PeerLostError,
    TransferError,
)
from vllm_loraserve.transfer.flight import Flight, RateLimiter
from vllm_loraserve.transfer.metrics import PoolMetrics
from vllm_loraserve.transfer.pages import AdapterPages, Destination, Landing, Wanted
from vllm_loraserve.transfer.peers import PeerTable

logger = logging.getLogger(__name__)

Source = Literal["arena", "host", "peer", "checkpoint"]
CHECKPOINT: Source = "checkpoint"
MOST_READERS = 256
"""Checkpoints that may be read at a time, those included whose file system does not answer."""
CLOSE_S = 30.0
"""Longest that `close` waits for such a file system."""
REPORT_S = 1.0
"""Between two reports of progress while a fetch runs."""
LOOK_S = 0.02
"""Shortest pause between two looks at a source that our own bandwidth cap holds up."""
Find = Callable[[Wanted], AdapterPages | None]
"""A look into a tier of this process: the adapter's pages where they are there, None otherwise."""
LoadCheckpoint = Callable[[Wanted, Landing, Flight], AdapterPages]
"""Cuts the pages from the checkpoint into the landing and commits them; raises where it cannot."""


class Location(msgspec.Struct, frozen=True):
    """An instance that holds an adapter, by the last table: where its TransferServer listens (host:port)."""

    instance: str
    endpoint: str


class Brought(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that is here now. `via`: the rung and the instance it came by, empty for tiers of our own."""

    pages: AdapterPages
    source: Source
    via: str = ""
    seconds: float = 0.0


class PoolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """deadline_s: for one adapter in all. peer_deadline_s: for one peer's part in it. hedge_s: after so long without an
    end, waits for our own `rate` apart, a second source is started. rate: bytes/s that all fetches from peers together
    may take, 0 for no limit."""

    deadline_s: float = 30.0
    peer_deadline_s: float = 30.0
    hedge_s: float = 0.5
    rate: float = 0.0


class Progress(msgspec.Struct, frozen=True):
    """One fetch under way: bytes set moving of all that it has to bring (0: not known yet), by the source that is
    furthest, and for how long, in seconds."""

    name: str
    done: int
    total: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes/s since the fetch began."""
        return self.done / self.seconds if self.seconds > 0 else 0.0


class _Race:
    """A landing in which only the first commit counts; who comes second is cancelled and abandons its memory."""

    def __init__(self, landing: Landing) -> None:
        self._landing, self._lock, self._won = landing, threading.Lock(), False

    def reserve(self, pages: AdapterPages) -> Destination:
        return self._landing.reserve(pages)

    def commit(self, pages: AdapterPages, destination: Destination) -> None:
        with self._lock:
            if self._won:
                raise CancelledError(f"{pages.name} has come from another source")
            self._landing.commit(pages, destination)
            self._won = True

    def abandon(self, destination: Destination) -> None:
        self._landing.abandon(destination)


class _Fetch:
    """One adapter on its way in, with everybody who waits for it."""

    def __init__(self, name: str) -> None:
        self.name, self.done, self.begun = name, Future[Brought](), time.monotonic()
        self.flights: list[Flight] = []

    def progress(self, now: float) -> Progress:
        """As it is `now`."""
        done, total = max(((flight.done, flight.total) for flight in self.flights), default=(0, 0))
        return Progress(self.name, done, total, now - self.begun)


class AdapterPool:
    """Brings adapters into `landing`. Methods may be called from any thread; `bring` blocks, so never the engine's.

    tiers: ("arena", find), ("host", find) in that order. load: how to make pages from the checkpoint, None where
    there is no way. device: of the landing's slab (-1: host memory), for the choice of the rung. on_progress: called
    about once a second, on the thread of a fetch, while fetches run.
    """

    def __init__(
        self,
        landing: Landing,
        peers: PeerTable,
        *,
        tiers: Sequence[tuple[Source, Find]] = (),
        load: LoadCheckpoint | None = None,
        device: int = -1,
        options: PoolOptions | None = None,
        metrics: PoolMetrics | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._landing, self._peers, self._tiers, self._load, self._device = landing, peers, tuple(tiers), load, device
        self.options = options or PoolOptions()
        self._metrics, self._on_progress = metrics, on_progress
        if metrics is not None:
            metrics.running = self.progress
        self._limiter = RateLimiter(self.options.rate)
        self._lock = threading.Lock()
        self._fetches: dict[Wanted, _Fetch] = {}
        self._workers = ThreadPoolExecutor(16, thread_name_prefix="loraserve-pool")
        self._readers: set[threading.Thread] = set()
        """Threads that read a checkpoint."""
        self._reported = 0.0
        self._closing = False

    # ---- bringing in ----

    def bring(self, wanted: Wanted, locations: Sequence[Location] = (), *, ahead: bool = False) -> Brought:
        """The adapter, here. Raises AdapterUnavailableError when every source failed; blocks up to `deadline_s`.

        locations: the peers to ask, in the order to ask them. ahead: nobody waits for it yet (for the metrics only: it
        is the caller who keeps such loads behind others).
        """
        if ahead and self._metrics:
            self._metrics.prefetches.inc()
        return self._bring(wanted, locations)

    def progress(self) -> list[Progress]:
        """Every fetch under way."""
        now = time.monotonic()
        with self._lock:
            return [fetch.progress(now) for fetch in self._fetches.values()]

    def _report(self) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._reported < REPORT_S:
                return
            self._reported = now
        self._on_progress()

    def _bring(self, wanted: Wanted, locations: Sequence[Location]) -> Brought:
        for source, find in self._tiers:
            if (pages := find(wanted)) is not None:
                self._count(source, "ok")
                return Brought(pages=pages, source=source)
        with self._lock:
            if self._closing:
                raise CancelledError("the pool is closing")
            fetch = self._fetches.get(wanted)
            mine = fetch is None
            if fetch is None:
                fetch = self._fetches[wanted] = _Fetch(wanted.name)
        if not mine:
            if self._metrics:
                self._metrics.shared.inc()
            return fetch.done.result(timeout=self.options.deadline_s + 5)
        try:
            if self._metrics:
                self._metrics.in_flight.inc()
            fetch.done.set_result(self._fetch(wanted, locations, fetch))
        except BaseException as error:
            fetch.done.set_exception(error)
        finally:
            if self._metrics:
                self._metrics.in_flight.dec()
            with self._lock:
                del self._fetches[wanted]
        return fetch.done.result()

    def _fetch(self, wanted: Wanted, locations: Sequence[Location], fetch: _Fetch) -> Brought:
        """Source after source, the next one beside the last where that is slow, until one has landed."""
        race = _Race(self._landing)
        waiting = self._sources(wanted, locations, race)
        running: dict[Future[Brought], tuple[str, Flight, float]] = {}
        failures: list[tuple[str, str]] = []
        end = time.monotonic() + self.options.deadline_s
        try:
            while waiting or running:
                now = time.monotonic()
                left = end - now
                if left <= 0:
                    failures += [(label, "not done in time") for label, _, _ in running.values()]
                    break
                # One source, and one more beside it where it is slow, and not by our own bandwidth cap.
                until_hedge = max(
                    (begun + self.options.hedge_s + flight.held - now for _, flight, begun in running.values()),
                    default=0.0,
                )
                if waiting and len(running) < 2 and until_hedge <= 0:
                    label, run = waiting.pop(0)
                    most = left if label == CHECKPOINT else min(left, self.options.peer_deadline_s)
                    flight = Flight(most, self._limiter, self._moved)
                    fetch.flights.append(flight)
                    if running and self._metrics:
                        self._metrics.hedges.inc()
                    begin = self._read_aside if label == CHECKPOINT else self._workers.submit
                    running[begin(run, flight)] = (label, flight, now)
                    until_hedge = self.options.hedge_s
                patience = max(until_hedge, LOOK_S) if waiting and len(running) < 2 else left
                done, _ = wait(running, timeout=min(patience, left, REPORT_S), return_when=FIRST_COMPLETED)
                for future in done:
                    label, _, _ = running.pop(future)
                    error = future.exception()
                    if error is None:
                        return self._landed(future.result(), fetch)
                    failures.append((label, str(error)))
                    logger.warning("transfer: %s from %s failed: %s", wanted.name, label, error)
                if not done:
                    self._report()
        finally:
            for _, flight, _ in running.values():
                flight.cancel()
        raise AdapterUnavailableError(wanted.name, failures)

    def _read_aside(self, run: Callable[[Flight], Brought], flight: Flight) -> Future[Brought]:
        """A source on a thread of its own: where a file system does not answer, it would keep a worker for ever."""
        future = Future[Brought]()

        def read() -> None:
            try:
                brought = run(flight)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(brought)
            finally:
                with self._lock:
                    self._readers.discard(thread)

        thread = threading.Thread(target=read, name="loraserve-checkpoint", daemon=True)
        try:
            with self._lock:
                if len(self._readers) >= MOST_READERS:
                    raise RuntimeError(f"{MOST_READERS} checkpoints are being read; their file systems do not answer")
                thread.start()
                self._readers.add(thread)
        except RuntimeError as error:  # or the system has no more threads
            future.set_exception(TransferError(str(error)))
        return future

    def _landed(self, brought: Brought, fetch: _Fetch) -> Brought:
        seconds = time.monotonic() - fetch.begun
        if self._metrics:
            self._metrics.seconds.labels(brought.source).observe(seconds)
            if brought.source == "peer":
                self._metrics.arrived.labels(brought.via.split(" ")[0]).inc(brought.pages.size)
        logger.info(
            "transfer: %s (%.1f MiB) came from %s %s in %.1f ms",
            fetch.name,
            brought.pages.size / 2**20,
            brought.source,
            brought.via,
            seconds * 1e3,
        )
        return msgspec.structs.replace(brought, seconds=seconds)

    # ---- sources ----

    def _sources(
        self, wanted: Wanted, locations: Sequence[Location], race: _Race
    ) -> list[tuple[str, Callable[[Flight], Brought]]]:
        names = {location.endpoint: location.instance for location in reversed(locations)}
        endpoints = self._peers.rested_first(list(dict.fromkeys(location.endpoint for location in locations)))
        sources: list[tuple[str, Callable[[Flight], Brought]]] = [
            (f"peer {names[e]}", lambda flight, e=e: self._from_peer(e, names[e], wanted, race, flight))  # type: ignore[misc]
            for e in endpoints
        ]
        load = self._load
        if load is not None:
            sources.append((CHECKPOINT, lambda flight: self._from_checkpoint(load, wanted, race, flight)))
        return sources

    def _from_peer(self, endpoint: str, instance: str, wanted: Wanted, race: _Race, flight: Flight) -> Brought:
        result = "failed"
        try:
            pages, rung = self._peers.get(endpoint).fetch(wanted, race, flight, self._device)
            result = "ok"
            return Brought(pages=pages, source="peer", via=f"{rung} {instance}")
        except CancelledError:
            result = "cancelled"
            raise
        except BandwidthError:
            raise
        except (PeerLostError, DeadlineError):
            self._peers.rest(endpoint)
            raise
        finally:
            self._count("peer", result)

    def _from_checkpoint(self, load: LoadCheckpoint, wanted: Wanted, race: _Race, flight: Flight) -> Brought:
        result = "failed"
        try:
            pages = load(wanted, race, flight)
            result = "ok"
            return Brought(pages=pages, source="checkpoint")
        except CancelledError:
            result = "cancelled"
            raise
        except TransferError:
            raise
        except Exception as error:  # whatever a reader of files may raise: one more source that failed
            raise TransferError(f"{type(error).__name__}: {error}") from error
        finally:
            self._count("checkpoint", result)

    def _moved(self, size: int) -> None:
        if self._metrics:
            self._metrics.moved.inc(size)

    def _count(self, source: Source, result: str) -> None:
        if self._metrics:
            self._metrics.fetches.labels(source, result).inc()

    def close(self) -> None:
        """Cancels what is under way, waits for it, ends all sessions. The landing must outlive this call.

        A checkpoint's file system that does not answer is left after CLOSE_S.
        """
        with self._lock:
            self._closing = True
            flights = [flight for fetch in self._fetches.values() for flight in fetch.flights]
        for flight in flights:
            flight.cancel()
        self._workers.shutdown()
        with self._lock:
            readers = list(self._readers)
        end = time.monotonic() + CLOSE_S
        for reader in readers:
            reader.join(max(end - time.monotonic(), 0.0))
        self._peers.close()

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
