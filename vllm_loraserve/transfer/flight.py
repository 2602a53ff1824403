"""One transfer under way: its deadline, its cancellation, its share of the bandwidth, its progress.

Every rung calls `advance` before it moves the next piece, so that a slow, capped or cancelled transfer behaves the same
way on all of them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from vllm_loraserve.transfer.errors import BandwidthError, CancelledError
from vllm_loraserve.transfer.wire import Deadline

LOCK_S = 0.1
"""Between two looks at cancellation while a lock is waited for."""


class RateLimiter:
    """A token bucket over bytes, shared by all transfers of a process. `rate` in bytes/s; 0 or None: no limit.

    It only keeps the books; who has booked waits by itself, so that the wait can be interrupted.
    """

    def __init__(self, rate: float | None, burst: int = 8 << 20, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst = rate or 0.0, burst
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = 0.0
        """When the bucket will have paid for everything booked so far."""

    def book(self, size: int) -> float:
        """Books `size` bytes; the seconds from now until they may move."""
        if self.rate <= 0:
            return 0.0
        with self._lock:
            now = self._clock()
            # What is idle is saved up to one burst, no more.
            self._free_at = max(self._free_at, now - self.burst / self.rate) + size / self.rate
            return max(self._free_at - now, 0.0)

    def give_back(self, size: int) -> None:
        """These bytes were booked and do not move: who books next need not wait for them."""
        if self.rate > 0:
            with self._lock:
                self._free_at -= size / self.rate


UNLIMITED = RateLimiter(None)


class Flight:
    """State of one transfer, shared by the threads that carry it."""

    def __init__(
        self,
        seconds: float | None = None,
        limiter: RateLimiter = UNLIMITED,
        on_bytes: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.deadline = Deadline(seconds)
        self.cancelled = threading.Event()
        self.moved = 0
        """Bytes whose move was begun, over all tries."""
        self.done, self.total = 0, 0
        """The same of the try at hand, and the bytes that it has to bring; 0: not known yet."""
        self._limiter, self._on_bytes, self._clock = limiter, on_bytes, clock
        self._lock = threading.Lock()
        self._held, self._holding, self._held_since = 0.0, 0, 0.0

    def begin(self, total: int) -> None:
        """A try begins, of `total` bytes."""
        with self._lock:
            self.done, self.total = 0, total

    def advance(self, size: int) -> None:
        """Before moving `size` bytes. Raises CancelledError or DeadlineError where they must not be moved."""
        self.check()
        if wait := self._limiter.book(size):
            self._hold(wait, size)
        with self._lock:
            self.moved += size
            self.done += size
        if self._on_bytes is not None:
            self._on_bytes(size)

    def _hold(self, seconds: float, size: int) -> None:
        """Waits for the bandwidth that was booked; gives it back where the transfer must stop."""
        with self._lock:
            if not self._holding:
                self._held_since = self._clock()
            self._holding += 1
        try:
            if self.deadline.left(seconds) < seconds:
                raise BandwidthError("the bandwidth cap leaves no time for the transfer")
            self.cancelled.wait(seconds)
            self.check()
        except BaseException:
            self._limiter.give_back(size)
            raise
        finally:
            with self._lock:
                self._holding -= 1
                if not self._holding:
                    self._held += self._clock() - self._held_since

    @property
    def held(self) -> float:
        """Seconds for which our own bandwidth cap, and not the source, has held the transfer up."""
        with self._lock:
            return self._held + (self._clock() - self._held_since if self._holding else 0.0)

    @contextlib.contextmanager
    def holding(self, lock: threading.Lock) -> Iterator[None]:
        """Holds `lock`, which another transfer may have for long; raises as `check` while it waits."""
        while not lock.acquire(timeout=self.deadline.left(LOCK_S)):
            self.check()
        try:
            yield
        finally:
            lock.release()

    def check(self) -> None:
        """Raises CancelledError or DeadlineError where the transfer must stop."""
        if self.cancelled.is_set():
            raise CancelledError("the transfer was cancelled")
        self.deadline.left()

    def cancel(self) -> None:
        """The transfer stops before its next piece, also where that waits for bandwidth."""
        self.cancelled.set()
