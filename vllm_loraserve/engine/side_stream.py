"""Copies into the arena on a stream of their own, beside the one that computes.

An adapter that takes pages which have been free for a while is copied while the step before still computes. Pages that
came free just now may still be read by it: the copies wait for what the compute stream had been given by then. The
compute stream waits for the copies before it goes on, so that no kernel sees half an adapter. The engine's thread waits
for nothing. A load's thread copies on a third stream, and waits until that is done (`staging.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SideStream:
    """Copy streams of `device`. `cuda`: torch.cuda, or what stands for it in a test. The engine's thread only, but for
    `copy_aside`."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._stream, self._aside = cuda.Stream(device), cuda.Stream(device)
        self.freed()

    def freed(self) -> None:
        """Pages come free now: what the compute stream has been given so far may still read them."""
        event: Any = self._cuda.Event()
        event.record(self._cuda.current_stream())
        self._freed = event

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Within the block copies go to the side stream; what the compute stream is given after it sees them done."""
        compute = self._cuda.current_stream()
        self._stream.wait_event(self._freed)
        try:
            with self._cuda.stream(self._stream):
                yield
        finally:
            done = self._cuda.Event()
            done.record(self._stream)
            compute.wait_event(done)

    def copy_aside(self, copy: Callable[[], None]) -> None:
        """Any thread: runs `copy`, which queues copies to pages that are free, and waits until they are done."""
        self._cuda.set_device(self._device)
        self._aside.wait_event(self._freed)
        with self._cuda.stream(self._aside):
            copy()
        self._aside.synchronize()
