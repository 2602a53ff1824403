"""Keep torch to the calling thread for a while.

Converting an adapter is many small copies. Given several threads torch wakes them for each, and on a busy machine waits
each time for the slowest; and a side thread that loads would have a team of its own beside the engine's. Torch's own
`set_num_threads` is for the whole process (and vLLM's CPU worker forbids it); OpenMP's limit belongs to the thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@functools.cache
def _openmp() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    process = ctypes.CDLL(None)
    try:
        return process.omp_get_max_threads, process.omp_set_num_threads
    except AttributeError:
        return None


@contextmanager
def single_thread() -> Iterator[None]:
    """Inside the block this thread's torch operations use this thread alone (where torch uses OpenMP)."""
    openmp = _openmp()
    if openmp is None:
        yield
        return
    get, put = openmp
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)
