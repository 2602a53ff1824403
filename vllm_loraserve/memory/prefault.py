"""Memory that was never touched, touched ahead of use.

Slabs take their memory from the system page by page, at the first write. For an adapter of tens of MiB that costs
several times what the copy itself costs, and it would fall on the request that waits for the adapter. Allocators hand
out low addresses first, so what comes next lies just above the highest address used so far: a thread of low priority
touches a little of it ahead.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Sequence

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_STEP = 4 << 20
"""Bytes per system call: what a mapping that goes away waits for at most."""
_NICENESS = 19
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def populate(address: int, size: int, *, write: bool = True) -> bool:
    """Gives [address, address + size) its memory now, contents unchanged; False where a kernel before 5.14 can't.
    write: False for a mapping that is only read."""
    page = os.sysconf("SC_PAGE_SIZE")
    start = address // page * page
    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    return bool(_LIBC.madvise(start, -(-(address + size - start) // page) * page, advice) == 0)


class Prefault:
    """Keeps `ahead[i]` bytes above the highest used address of zone i touched. Zones are (address, size) of memory that
    lives as long as this object is used."""

    def __init__(self, zones: Sequence[tuple[int, int]], ahead: Sequence[int]) -> None:
        self._zones, self._ahead = list(zones), list(ahead)
        self._lock = threading.Lock()
        self._used = [0] * len(self._zones)
        self._touched = [0] * len(self._zones)
        self._thread: threading.Thread | None = None
        self._wake()

    def used(self, zone: int, end: int) -> None:
        """Bytes [0, end) of the zone have been handed out; returns at once."""
        with self._lock:
            if end <= self._used[zone]:
                return
            self._used[zone] = end
        self._wake()

    def touched(self, zone: int = 0) -> int:
        """Bytes from the start of the zone that have their memory, as far as is known here."""
        return max(self._touched[zone], self._used[zone])

    def settle(self, timeout: float | None = None) -> bool:
        """Waits for the thread, if one runs; False where it still runs after `timeout` seconds."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def _next(self) -> tuple[int, int, int] | None:
        """(zone, offset, length) of the next piece to touch, or None."""
        for zone, (_, size) in enumerate(self._zones):
            begin = max(self._touched[zone], self._used[zone])
            end = min(self._used[zone] + self._ahead[zone], size)
            if begin < end:
                return zone, begin, min(_STEP, end - begin)
        return None

    def _wake(self) -> None:
        with self._lock:
            if self._thread is not None or self._next() is None:
                return
            thread = threading.Thread(target=self._run, name="loraserve-prefault", daemon=True)
            # Called in the middle of an allocation: without a thread the first write touches the memory, as ever.
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            with self._lock:
                piece = self._next()
                if piece is None:
                    self._thread = None
                    return
            zone, offset, length = piece
            if not populate(self._zones[zone][0] + offset, length):
                with self._lock:  # never again: the first write does it then
                    self._ahead = [0] * len(self._zones)
                continue
            with self._lock:
                self._touched[zone] = max(self._touched[zone], offset + length)
