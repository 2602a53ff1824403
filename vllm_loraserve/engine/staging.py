"""Pages into the arena beside the step: an adapter that requests wait for is staged before they are scheduled.

A load's thread asks for free pages and copies the adapter from the host tier into them; activating it then only fills
a slot. Where no pages are free it waits for the engine's thread, which alone may send an idle adapter away, to do so
in its next step; an engine that does not step has nobody who would suffer from a copy in the step, so nothing is
waited for then. Nothing depends on staging: what is not staged is copied when it is activated.

On a GPU the copies run on a stream of their own, which `side_stream.py` keeps behind the last step that may still read
the pages.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from vllm_loraserve.engine.arena_residents import ArenaResidents, Staged
from vllm_loraserve.engine.side_stream import SideStream
from vllm_loraserve.memory.host_tier import HostEntry, HostTier

STEPS_WITHIN_S = 0.2
"""An engine whose last step is longer ago stands still."""
GRANT_S = 0.1
"""Longest wait for the engine's thread to make room."""
UNUSED_S = 10.0
"""After which a staged adapter nobody activated goes before others."""


class _Want:
    """A thread's wish for pages, until the engine's thread has looked at it (`seen`)."""

    def __init__(self, lora_id: int, entry: HostEntry) -> None:
        self.lora_id, self.entry = lora_id, entry
        self.seen = threading.Event()
        self.staged: Staged | None = None


class Staging:
    """Stages adapters of `host` in the arena of `residents`. `side_stream`: of the arena's GPU; None: host memory.
    in_place: whether an adapter can run before its pages are copied (`lent_pages.py`): then they are only taken."""

    def __init__(
        self,
        residents: ArenaResidents,
        host: Callable[[], HostTier],
        side_stream: SideStream | None = None,
        in_place: Callable[[HostEntry], bool] = lambda entry: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residents, self._host, self._side_stream, self._clock = residents, host, side_stream, clock
        self._in_place = in_place
        self._last_step = float("-inf")
        self._lock = threading.Lock()
        self._wants: deque[_Want] = deque()

    def stage(self, lora_id: int) -> bool:
        """Brings the adapter's host pages into the arena; False: it is active, not in the host tier, or finds no room.
        For side threads; takes GRANT_S at most besides the copy."""
        with self._host().reading(lora_id) as entry:
            if entry is None:
                return False
            staged = self._room(lora_id, entry)
            if staged is None:
                return False
            try:
                if not self._in_place(entry):
                    self._fill(staged.pages, self._host().targets(entry))
                staged.intact = True
            finally:
                staged.filled.set()
        return True

    def _fill(self, pages: list[list[int]], sources: Sequence[torch.Tensor | None]) -> None:
        write = self._residents.arena.write
        if self._side_stream is None:
            write(pages, sources)
        else:
            self._side_stream.copy_aside(lambda: write(pages, sources))

    def _room(self, lora_id: int, entry: HostEntry) -> Staged | None:
        staged = self._residents.stage(lora_id, entry.pages, entry.generation)
        stands = self._clock() - self._last_step > STEPS_WITHIN_S
        if staged is not None or stands or lora_id in self._residents:
            return staged
        want = _Want(lora_id, entry)
        with self._lock:
            self._wants.append(want)
        want.seen.wait(GRANT_S)
        with self._lock:
            if want in self._wants:
                self._wants.remove(want)
            return want.staged

    def step(self, make_room: Callable[[int, Sequence[int]], bool]) -> None:
        """The engine's thread, in every step, when its adapters are active: room for those that wait to be staged.

        make_room(adapter, needed pages): sends idle adapters away until so many are free; False: nobody went.
        """
        self._last_step = self._clock()
        while True:
            with self._lock:
                if not self._wants:
                    return
                want = self._wants.popleft()
                with self._residents.lock:
                    lora_id, entry = want.lora_id, want.entry
                    if lora_id not in self._residents and make_room(lora_id, entry.pages):
                        want.staged = self._residents.stage(lora_id, entry.pages, entry.generation)
                want.seen.set()
