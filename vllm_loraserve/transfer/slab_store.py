"""The simplest holder of adapters: one host slab, first-fit ranges, no eviction of its own. Store and landing
at once.

Tests, benchmarks and tools use it; the engine's host tier and arena implement the same two protocols
(`pages.py`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import numpy as np

from vllm_loraserve.memory.checksum import checksums
from vllm_loraserve.memory.slab import HostSlab
from vllm_loraserve.transfer.pages import AdapterPages, Destination, Range, Wanted, page_offsets


class SlabStore:
    """`size` bytes of host memory. `max_range`: cut adapters into ranges of at most so many bytes (whole
    pages)."""

    def __init__(self, size: int, *, max_range: int | None = None, populate: bool = False) -> None:
        self.slab = HostSlab(size, populate=populate)
        self._max_range = max_range
        self._lock = threading.RLock()
        self._free: list[Range] = [Range(0, self.slab.size)]
        self._held: dict[str, AdapterPages] = {}
        self._pins: dict[tuple[str, int], int] = {}
        self._doomed: dict[tuple[str, int], AdapterPages] = {}
        """Dropped while pinned: freed with the last pin."""
        self._generations = itertools.count(1)
        self.landings: list[tuple[str, int, str]] = []
        """(name, generation, peer) of confirmed copies elsewhere."""

    # ---- filling it ----

    def put(
        self, name: str, pages: Sequence[bytes | np.ndarray], *, layout: str, digest: str = "", meta: bytes = b""
    ) -> AdapterPages:
        """Holds these pages under a new generation; an older one under the name goes. Raises MemoryError when
        full."""
        lengths = tuple(len(page) for page in pages)
        destination = self._reserve(lengths)
        at = [self.slab.address + o for o in page_offsets(lengths, destination.ranges)]
        for offset, page in zip(page_offsets(lengths, destination.ranges), pages, strict=True):
            self.slab.view(offset, len(page))[:] = np.frombuffer(page, np.uint8).data
        entry = AdapterPages(
            name=name,
            generation=0,
            digest=digest,
            layout=layout,
            page_lengths=lengths,
            checksums=tuple(checksums(at, lengths)),
            ranges=destination.ranges,
            meta=meta,
        )
        self.commit(entry, destination)
        return self._held[name]

    def drop(self, name: str) -> bool:
        """Lets go of an adapter; its memory is free again once nobody has it pinned. False where it was not
        held."""
        with self._lock:
            entry = self._held.pop(name, None)
            if entry is None:
                return False
            key = (name, entry.generation)
            if self._pins.get(key):
                self._doomed[key] = entry
            else:
                self._give_back(entry.ranges)
            return True

    def bytes_of(self, name: str) -> bytes:
        """The page stream of an adapter held here. Raises KeyError."""
        with self._lock:
            entry = self._held[name]
            return b"".join(bytes(self.slab.view(r.offset, r.length)) for r in entry.ranges)

    @property
    def free_bytes(self) -> int:
        return sum(r.length for r in self._free)

    # ---- PageStore ----

    def catalogue(self) -> list[AdapterPages]:
        with self._lock:
            return list(self._held.values())

    def acquire(self, name: str) -> AdapterPages | None:
        with self._lock:
            entry = self._held.get(name)
            if entry is not None:
                key = (name, entry.generation)
                self._pins[key] = self._pins.get(key, 0) + 1
            return entry

    def release(self, pages: AdapterPages) -> None:
        key = (pages.name, pages.generation)
        with self._lock:
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                doomed = self._doomed.pop(key, None)
                if doomed is not None:
                    self._give_back(doomed.ranges)

    def landed(self, pages: AdapterPages, peer: str) -> None:
        with self._lock:
            self.landings.append((pages.name, pages.generation, peer))

    def find(self, wanted: Wanted) -> AdapterPages | None:
        """The adapter where it is held here with this layout and digest."""
        with self._lock:
            entry = self._held.get(wanted.name)
        if entry is None or entry.layout != wanted.layout or (wanted.digest and entry.digest != wanted.digest):
            return None
        return entry

    # ---- Landing ----

    def reserve(self, pages: AdapterPages) -> Destination:
        return self._reserve(pages.page_lengths)

    def _reserve(self, lengths: Sequence[int]) -> Destination:
        with self._lock:
            ranges: list[Range] = []
            try:
                ranges.extend(self._take(run) for run in self._runs(lengths))
            except MemoryError:
                self._give_back(ranges)
                raise
        return Destination(self.slab, tuple(ranges))

    def commit(self, pages: AdapterPages, destination: Destination) -> None:
        with self._lock:
            self.drop(pages.name)
            self._held[pages.name] = AdapterPages(
                name=pages.name,
                generation=next(self._generations),
                digest=pages.digest,
                layout=pages.layout,
                page_lengths=pages.page_lengths,
                checksums=pages.checksums,
                ranges=destination.ranges,
                meta=pages.meta,
            )

    def abandon(self, destination: Destination) -> None:
        with self._lock:
            self._give_back(destination.ranges)

    # ---- memory ----

    def _runs(self, lengths: Sequence[int]) -> list[int]:
        """Bytes of the ranges to make: as much as `max_range` allows, pages whole."""
        runs: list[int] = []
        for length in lengths:
            if runs and (self._max_range is None or runs[-1] + length <= self._max_range):
                runs[-1] += length
            else:
                runs.append(length)
        return runs

    def _take(self, length: int) -> Range:
        for i, (offset, size) in enumerate(self._free):
            if size >= length:
                left = Range(offset + length, size - length)
                self._free[i : i + 1] = [left] if left.length else []
                return Range(offset, length)
        raise MemoryError(f"no {length} contiguous bytes are free in a slab of {self.slab.size}")

    def _give_back(self, ranges: Sequence[Range]) -> None:
        merged: list[Range] = []
        for offset, length in sorted([*self._free, *ranges]):
            if merged and merged[-1].offset + merged[-1].length == offset:
                merged[-1] = Range(merged[-1].offset, merged[-1].length + length)
            else:
                merged.append(Range(offset, length))
        self._free = merged

    def close(self) -> None:
        """Frees the slab; no server may serve from it any more."""
        self.slab.close()

    def __enter__(self) -> SlabStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
