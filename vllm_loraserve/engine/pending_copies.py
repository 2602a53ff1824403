"""Host pages from which a device still copies: nobody may evict them, and the engine's thread does not wait for it.

A copy is queued on a stream (`side_stream.py`), where it may wait for what the step before reads, so that waiting for
it could be waiting for the step. An event behind the copy tells when its pages are free; it is asked whenever an
adapter comes or goes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch


def event_on_current_stream() -> Any:
    """An event behind all that is queued on the current stream."""
    event = torch.cuda.Event()
    event.record()
    return event


class PendingCopies:
    """Readings of the host tier that end with their copies. `event`: made behind a copy, `query()` says whether all
    before it is done, `synchronize()` waits for that. Thread-safe."""

    def __init__(self, event: Callable[[], Any] = event_on_current_stream) -> None:
        self._event = event
        self._lock = threading.Lock()
        self._pending: deque[tuple[Any, ExitStack]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def hold(self, reading: ExitStack) -> None:
        """`reading` ends when what the current stream has been given by now is done."""
        event = self._event()
        with self._lock:
            self._pending.append((event, reading))

    def drain(self, *, wait: bool = False) -> None:
        """Ends the readings whose copies are done; all of them (wait), blocking until they are."""
        with self._lock:
            # One stream: the first that is not done has none behind it that is.
            while self._pending and (wait or self._pending[0][0].query()):
                event, reading = self._pending.popleft()
                if wait:
                    event.synchronize()
                reading.close()
