"""The threads that load adapters: one for each load, a bounded number, and none that hangs keeps the others waiting.

Loads that the scheduler orders start at once, since it bounds their number and requests wait for them; others
(`add_lora`: a prefetch, a registration) wait in a queue for one of `places`, and until no ordered one runs. A load that
takes longer than `timeout_s` hangs: its place goes to the next one, and its thread, a daemon, is only counted from then
on. Of one adapter at most HUNG_EACH loads may hang, of all HUNG_MOST; beyond that a load is refused at once, until one
of them ends. Of several loads of one adapter the one asked for last counts: what an earlier one brings, however late,
is dropped.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from vllm.logger import init_logger

logger = init_logger("vllm.loraserve.load_threads")

HUNG_EACH, HUNG_MOST = 2, 256


class SupersededError(Exception):
    """A later load of the same adapter was asked for, or the adapter was removed."""


class Load:
    """One load of one adapter; `run` is called on a thread of its own, or `refuse` with the reason on the caller's."""

    def __init__(
        self, adapter: int, path: str, run: Callable[[], None], refuse: Callable[[Exception], None], place: bool
    ) -> None:
        self.adapter, self.path, self.run, self.refuse, self.takes_place = adapter, path, run, refuse, place
        self.started = 0.0
        self.hangs = False
        self.superseded = False


_here = threading.local()


def ordered() -> bool:
    """Whether this is the thread of a load that requests wait for, or no thread of a load at all."""
    load = getattr(_here, "load", None)
    return load is None or not load.takes_place


def ensure_wanted() -> None:
    """Raises SupersededError on the thread of a load whose result nobody wants any more. Called before a result is put
    where others find it; elsewhere it does nothing."""
    if not wanted():
        raise SupersededError("a later load of the adapter was asked for, or it was removed")


def wanted() -> bool:
    """False on the thread of a load whose result nobody wants any more."""
    load = getattr(_here, "load", None)
    return load is None or not load.superseded


class LoadThreads:
    """`places`: queued loads that run at a time; `timeout_s`: after which a load counts as hanging."""

    def __init__(self, places: int, timeout_s: float) -> None:
        self.places, self.timeout_s = places, timeout_s
        self._changed = threading.Condition()
        self._queue: deque[Load] = deque()
        self._running: set[Load] = set()
        self._latest: dict[int, Load] = {}
        """The load of each adapter whose result counts; an adapter whose last load has ended has none."""
        self._pump: threading.Thread | None = None

    @property
    def hung(self) -> int:
        """Loads that have run longer than `timeout_s`."""
        with self._changed:
            self._expire()
            return sum(load.hangs for load in self._running)

    def start(
        self, adapter: int, path: str, run: Callable[[], None], refuse: Callable[[Exception], None], *, queued: bool
    ) -> None:
        """Runs `run` aside, at once or (`queued`) when a place is free; earlier loads of the adapter count no more.

        Raises RuntimeError for a queued load, which changes nothing, where the system has no thread for the queue.
        """
        load = Load(adapter, path, run, refuse, queued)
        with self._changed:
            if queued and self._pump is None:
                pump = threading.Thread(target=self._feed, name="loraserve-queue", daemon=True)
                pump.start()
                self._pump = pump
            self._supersede(adapter)
            self._latest[adapter] = load
            if queued:
                self._queue.append(load)
                return
            problem = self._begin(load)
        self._launch(load, problem)

    def supersede(self, adapter: int) -> None:
        """What loads of this adapter still bring is dropped."""
        with self._changed:
            self._supersede(adapter)

    def pending(self, adapter: int, path: str) -> bool:
        """Whether a load of this content is queued, or runs and does not hang."""
        with self._changed:
            self._expire()
            load = self._latest.get(adapter)
            return load is not None and load.path == path and not load.hangs

    def runs(self, adapter: int, path: str) -> bool:
        """Whether a load of this content runs and does not hang; False for one that is queued."""
        with self._changed:
            self._expire()
            load = self._latest.get(adapter)
            return load is not None and load.path == path and load in self._running and not load.hangs

    # ---- inside; with `_changed` held but for `_launch`, `_feed` and `_run` ----

    def _supersede(self, adapter: int) -> None:
        before = self._latest.pop(adapter, None)
        if before is not None:
            before.superseded = True
            self._changed.notify_all()

    def _expire(self) -> None:
        now = time.monotonic()
        for load in self._running:
            if not load.hangs and now - load.started > self.timeout_s:
                load.hangs = True
                logger.warning("A load of adapter %d takes longer than %g s: it hangs.", load.adapter, self.timeout_s)

    def _begin(self, load: Load) -> Exception | None:
        """Counts a load as running; else why it may not."""
        self._expire()
        hung = [other.adapter for other in self._running if other.hangs]
        if hung.count(load.adapter) >= HUNG_EACH or len(hung) >= HUNG_MOST:
            if self._latest.get(load.adapter) is load:
                del self._latest[load.adapter]
            return TimeoutError(
                f"{hung.count(load.adapter)} earlier loads of it and {len(hung)} in all hang; their source "
                "does not answer"
            )
        load.started = time.monotonic()
        self._running.add(load)
        return None

    def _launch(self, load: Load, problem: Exception | None) -> None:
        if problem is None:
            try:
                threading.Thread(
                    target=self._run, args=(load,), name=f"loraserve-load-{load.adapter}", daemon=True
                ).start()
                return
            except RuntimeError as error:  # can't start new thread
                problem = error
                self._end(load)
        load.refuse(problem)

    def _feed(self) -> None:
        """Gives places to queued loads, in order, while nobody waits for another adapter; ends with the queue."""
        while True:
            with self._changed:
                while self._queue and not self._queue[0].superseded and (wait := self._until_place()) > 0:
                    self._changed.wait(wait)
                if not self._queue:
                    self._pump = None
                    return
                load = self._queue.popleft()
                problem: Exception | None = SupersededError("a later load was asked for")
                if not load.superseded:
                    problem = self._begin(load)
            self._launch(load, problem)

    def _until_place(self) -> float:
        """Seconds until a place may be free; 0: one is, and no ordered load runs."""
        self._expire()
        live = [load for load in self._running if not load.hangs]
        taken = [load.started for load in live if load.takes_place]
        if len(taken) == len(live) < self.places:
            return 0.0
        return max(min(load.started for load in live) + self.timeout_s - time.monotonic(), 0.0) + 0.001

    def _run(self, load: Load) -> None:
        _here.load = load
        try:
            load.run()
        finally:
            self._end(load)

    def _end(self, load: Load) -> None:
        with self._changed:
            self._running.discard(load)
            if self._latest.get(load.adapter) is load:
                del self._latest[load.adapter]
            self._changed.notify_all()
