"""One transfer under way: its deadline, its cancellation, its share of the bandwidth, its progress.

Every rung calls `advance` before it moves the next piece, so that a slow, capped or cancelled transfer behaves the same
way on all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vllm_loraserve.transfer.errors import CancelledError
from vllm_loraserve.transfer.wire import Deadline


class RateLimiter:
    """A token bucket over bytes, shared by all transfers of a process. `rate` in bytes/s; 0 or None: no limit.

    clock and sleep are passed in, so that tests need not wait.
    """

    def __init__(
        self,
        rate: float | None,
        burst: int = 8 << 20,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.rate, self.burst = rate or 0.0, burst
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_at = 0.0
        """When the bucket will have paid for everything taken so far."""

    def take(self, size: int) -> float:
        """Books `size` bytes and sleeps until they may move. Returns the seconds slept."""
        if self.rate <= 0:
            return 0.0
        with self._lock:
            now = self._clock()
            # What is idle is saved up to one burst, no more.
            self._free_at = max(self._free_at, now - self.burst / self.rate) + size / self.rate
            wait = self._free_at - now
        if wait > 0:
            self._sleep(wait)
        return max(wait, 0.0)


UNLIMITED = RateLimiter(None)


class Flight:
    """State of one transfer, shared by the threads that carry it."""

    def __init__(
        self,
        seconds: float | None = None,
        limiter: RateLimiter = UNLIMITED,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.deadline = Deadline(seconds)
        self.cancelled = threading.Event()
        self.moved = 0
        """Bytes whose move was begun."""
        self._limiter, self._on_bytes = limiter, on_bytes
        self._lock = threading.Lock()

    def advance(self, size: int) -> None:
        """Before moving `size` bytes. Raises CancelledError or DeadlineError where they must not be moved."""
        self.check()
        self._limiter.take(size)
        with self._lock:
            self.moved += size
        if self._on_bytes is not None:
            self._on_bytes(size)

    def check(self) -> None:
        """Raises CancelledError or DeadlineError where the transfer must stop."""
        if self.cancelled.is_set():
            raise CancelledError("the transfer was cancelled")
        self.deadline.left()

    def cancel(self) -> None:
        """The transfer stops before its next piece."""
        self.cancelled.set()
