"""On a CPU an adapter runs from its pages in the host tier until a side thread has copied them into the arena.

Both are memory that the kernels read alike, so no request waits for the copy: an adapter that is in host memory is
active as soon as its slot's page tables name its host pages. Its pages in the arena are taken at the same time, so that
the arena's accounting is what it is elsewhere. Once they are filled the tables name them, and as soon as no kernel can
still read by what the tables said before, the host tier may do with its pages what it likes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

import torch

from vllm_loraserve.engine.loader_thread import step_aside
from vllm_loraserve.engine.paged_layers import SlotTables
from vllm_loraserve.memory.arena import Arena
from vllm_loraserve.memory.host_tier import HostEntry, HostTier

COPY_AFTER_S = 0.05
"""From an adapter's first step to its copy, which would slow that step down."""
LOOK_S = 0.0005
"""Between two looks whether kernels still read."""


class Kernels(Protocol):
    """What is asked of `kernels/cpu_native.py`."""

    @property
    def idle(self) -> bool: ...


class _Loan:
    __slots__ = ("copied", "copying", "ended", "pages", "reading", "since", "slot", "sources")

    def __init__(
        self, slot: int, pages: list[list[int]], sources: Sequence[torch.Tensor | None], reading: ExitStack
    ) -> None:
        self.slot, self.pages, self.sources, self.reading = slot, pages, sources, reading
        self.since = time.monotonic()
        self.copying = self.copied = self.ended = False


class LentPages:
    """Loans of host pages to slots of `tables`, whose own pages are in `arena`."""

    def __init__(self, arena: Arena, tables: SlotTables, kernels: Kernels) -> None:
        self._arena, self._tables, self._kernels = arena, tables, kernels
        self._changed = threading.Condition()
        self._loans: dict[int, _Loan] = {}
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._loans)

    def numbers(self, host: HostTier, entry: HostEntry) -> list[list[int]] | None:
        """What page tables hold for the entry's pages where they lie; None: they must be in the arena to be read."""
        return self._arena.numbers_at(host.slab.address + entry.offset, entry.pages)

    def lend(
        self,
        lora_id: int,
        slot: int,
        pages: list[list[int]],
        sources: Sequence[torch.Tensor | None],
        reading: ExitStack,
    ) -> None:
        """The tables of `slot` name the host pages `sources` of an adapter that has `pages` in the arena: these will be
        filled. `reading` keeps the host pages as they are; it is closed when nobody reads them any more."""
        with self._changed:
            self._loans[lora_id] = _Loan(slot, pages, sources, reading)
            self._changed.notify_all()
            if self._thread is None:
                # One that can't be started now is with the next loan; until then nothing is wrong.
                thread = threading.Thread(target=self._run, name="loraserve-lent", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return
                self._thread = thread

    def end(self, lora_id: int) -> None:
        """The adapter leaves its slot, and then its pages in the arena; by the thread that runs the kernels. Waits for
        a copy under way."""
        with self._changed:
            loan = self._loans.pop(lora_id, None)
            if loan is None:
                return
            loan.ended = True
            self._changed.notify_all()
            while loan.copying and not loan.copied:
                self._changed.wait()
        loan.reading.close()

    def settle(self, timeout: float) -> bool:
        """Waits until nothing is lent; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._loans, timeout)

    def _run(self) -> None:
        step_aside()
        while (found := self._next()) is not None:
            lora_id, loan = found
            self._arena.write(loan.pages, loan.sources)
            with self._changed:
                loan.copied = True
                self._changed.notify_all()
                if not loan.ended:
                    self._tables.set_pages(loan.slot, self._arena.numbers(loan.pages))
            while not loan.ended and not self._kernels.idle:
                time.sleep(LOOK_S)
            with self._changed:
                if loan.ended:
                    continue
                del self._loans[lora_id]
                self._changed.notify_all()
            loan.reading.close()

    def _next(self) -> tuple[int, _Loan] | None:
        """The oldest loan, once its copy is due; None, and the thread ends, where there is none."""
        with self._changed:
            while self._loans:
                lora_id, loan = next(iter(self._loans.items()))
                left = loan.since + COPY_AFTER_S - time.monotonic()
                if left <= 0:
                    loan.copying = True
                    return lora_id, loan
                self._changed.wait(left)
            self._thread = None
            return None
