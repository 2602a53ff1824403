"""The host tier: adapters' pages in one slab of host memory, ready to be copied into the arena or to a peer.

An adapter's pages lie in one contiguous extent, group after group, in the layout of the arena; so bringing it
in is a few large copies, and a peer can read it with a few large reads. Every entry has a generation: a reader
that saw generation g and finds it unchanged afterwards has read a consistent adapter.

Thread-safe: conversion runs on side threads, activation on the engine's thread, transfers on their own.
"""

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from vllm_loraserve.adapters.convert import page_addresses
from vllm_loraserve.adapters.errors import AdapterError
from vllm_loraserve.adapters.layout import Layout
from vllm_loraserve.memory import checksum
from vllm_loraserve.memory.allocator import ExtentAllocator
from vllm_loraserve.memory.eviction import Candidate, Demand, cheapest_stretch, eviction_order, load_seconds
from vllm_loraserve.memory.prefault import Prefault
from vllm_loraserve.memory.slab import HostSlab

logger = logging.getLogger(__name__)

# Only their ratio to each other matters, and only between adapters of different size.
_CHECKPOINT_BYTES_PER_SECOND, _CHECKPOINT_FIXED_SECONDS = 0.5e9, 0.05


class HostTierFullError(RuntimeError):
    """No room, and nothing that may be evicted; one sentence with the option to change."""

    http_status = 503
    """What a request for the adapter deserves: another instance, or a later time, has room."""


@dataclass(eq=False)
class HostEntry:
    """One adapter in the host tier. `ranks`: per slice of the layout; `pages`: per group."""

    key: Hashable
    digest: str
    """Content hash of the checkpoint that the pages were made from."""
    ranks: tuple[int, ...]
    pages: tuple[int, ...]
    offset: int
    size: int
    generation: int
    checksums: list[int] = field(default_factory=list)
    """One for every page, in the order in which they lie."""
    ready: bool = False
    users: int = 0
    """Copies and transfers that read it now; it is not evicted meanwhile."""
    pinned: bool = False
    from_peer: bool = False
    """Brought in from a peer, so that all of the adapter is in these pages."""

    @property
    def rank(self) -> int:
        return max(self.ranks, default=0)


class HostTier:
    """Adapters within `budget_bytes` of one slab, and at most `max_adapters` of them (None: no such limit)."""

    def __init__(
        self,
        layout: Layout,
        budget_bytes: int,
        *,
        max_adapters: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        slab: HostSlab | None = None,
    ) -> None:
        self.layout, self.max_adapters = layout, max_adapters
        self.slab = slab if slab is not None else HostSlab(max(budget_bytes, 4096))
        self._bytes = torch.from_numpy(self.slab.array())
        self._dtype = getattr(torch, layout.dtype)
        self._extents = ExtentAllocator(max(budget_bytes, 4096))
        self._entries: dict[Hashable, HostEntry] = {}
        self._retired: set[HostEntry] = set()
        self._demand: Demand[Hashable] = Demand()
        self._clock = clock
        self._generation = 0
        self.evictions = 0
        """Adapters that had to leave for others, since the start."""
        self._kept: Counter[Hashable] = Counter()
        self._held: set[Hashable] = set()
        self._prefault: Prefault | None = None
        self.lock = threading.RLock()
        self.may_evict: Callable[[Hashable], bool] = lambda key: True
        """Asked before an entry is evicted (a cluster keeps the last copy of an adapter)."""
        self.before_evicting: Callable[[], None] = lambda: None
        """Called, without the lock, by who is about to ask `may_evict`: what that goes by may be brought up to date."""

    def warm(self, ahead: int) -> None:
        """From now on `ahead` bytes beyond those ever used have their memory before they are needed."""
        self._prefault = Prefault([(self.slab.address, self._extents.size)], [ahead])

    def __contains__(self, key: Hashable) -> bool:
        return self.get(key) is not None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def free_bytes(self) -> int:
        return self._extents.free_bytes

    @property
    def capacity_bytes(self) -> int:
        """What it holds when full."""
        return self._extents.size

    def get(self, key: Hashable) -> HostEntry | None:
        """The entry, if it is complete."""
        with self.lock:
            entry = self._entries.get(key)
            return entry if entry is not None and entry.ready else None

    def entries(self) -> list[HostEntry]:
        """All complete entries."""
        with self.lock:
            return [entry for entry in self._entries.values() if entry.ready]

    def touch(self, key: Hashable, amount: float = 1.0) -> None:
        """Count a use, for eviction."""
        with self.lock:
            self._demand.use(key, self._clock(), amount)

    def demand(self, key: Hashable) -> float:
        with self.lock:
            return self._demand.of(key, self._clock())

    def create(self, key: Hashable, digest: str, ranks: Sequence[int]) -> HostEntry:
        """Room for an adapter, evicting others if need be; fill `targets(entry)`, then `commit` or `discard`.

        An entry of the same key stays in place until `commit`. Raises HostTierFullError, or AdapterError `too_large`
        where not even the whole tier has that room; nothing is evicted then.
        """
        pages = self.layout.pages_for(ranks)
        size = self.layout.size_bytes(pages)
        if self._extents.rounded(size) > self._extents.size:
            raise AdapterError(
                "too_large",
                f"The adapter takes {size} bytes and the whole host tier has {self._extents.size}; raise "
                "--loraserve-config.host_gib.",
            )
        if self._would_evict(size):
            self.before_evicting()
        with self.lock:
            offset = self._extents.allocate(size)
            if offset is None:
                for victim in self._in_the_way(size, key):
                    self._evict(victim)
                offset = self._extents.allocate(size)
                assert offset is not None
            if self._prefault is not None:
                self._prefault.used(0, offset + size)
            self._generation += 1
            return HostEntry(key, digest, tuple(ranks), pages, offset, size, self._generation, users=1)

    def commit(self, entry: HostEntry, checksums: Sequence[int] | None = None) -> HostEntry:
        """The entry is complete: show it, in place of an older one of the same key.

        checksums: of its pages, where they have been verified as they lie here; None: they are computed.
        """
        entry.checksums = self.current_checksums(entry) if checksums is None else list(checksums)
        with self.lock:
            before = self._entries.pop(entry.key, None)
            entry.pinned = before is not None and before.pinned
            self._drop(before)
            entry.ready = True
            entry.users -= 1
            self._entries[entry.key] = entry
            self._demand.use(entry.key, self._clock())
            if self.max_adapters is not None:
                surplus = len(self._entries) - self.max_adapters
                for victim in eviction_order(self._candidates(entry.key))[: max(surplus, 0)]:
                    self._evict(victim)
        return entry

    def discard(self, entry: HostEntry) -> None:
        """Give up an entry that was created and not committed."""
        with self.lock:
            entry.users -= 1
            self._drop(entry)

    def remove(self, key: Hashable) -> bool:
        """Forget an adapter; its memory is free as soon as nobody reads it."""
        with self.lock:
            entry = self._entries.pop(key, None)
            self._drop(entry)
            self._demand.forget(key)
            return entry is not None

    def pin(self, key: Hashable, pinned: bool = True) -> bool:
        """Keep an adapter whatever happens, or no longer. False when it is not here."""
        entry = self.get(key)
        if entry is not None:
            entry.pinned = pinned
        return entry is not None

    @contextmanager
    def reading(self, key: Hashable) -> Iterator[HostEntry | None]:
        """The entry, guarded against eviction while the block runs; None when it is not here."""
        with self.lock:
            entry = self.get(key)
            if entry is not None:
                entry.users += 1
        try:
            yield entry
        finally:
            if entry is not None:
                with self.lock:
                    entry.users -= 1
                    if entry in self._retired:
                        self._retired.discard(entry)
                        self._drop(entry)

    def hold(self, key: Hashable, held: bool = True) -> None:
        """From now on (or no longer) `key` is not evicted, be it here already or put in later. It may be replaced."""
        with self.lock:
            (self._held.add if held else self._held.discard)(key)

    def is_held(self, key: Hashable) -> bool:
        return key in self._held

    @contextmanager
    def keeping(self, key: Hashable) -> Iterator[None]:
        """While the block runs `key` is not evicted, be it here already or put in meanwhile. It may be replaced."""
        with self.lock:
            self._kept[key] += 1
        try:
            yield
        finally:
            with self.lock:
                self._kept[key] -= 1
                if not self._kept[key]:
                    del self._kept[key]

    def targets(self, entry: HostEntry) -> list[torch.Tensor | None]:
        """The entry's pages as tensors over the slab: per group [pages, page_elements], None without pages."""
        views: list[torch.Tensor | None] = []
        at = entry.offset
        for group, count in enumerate(entry.pages):
            length = count * self.layout.page_bytes(group)
            part = self._bytes[at : at + length].view(self._dtype) if count else None
            views.append(None if part is None else part.view(count, -1))
            at += length
        return views

    def current_checksums(self, entry: HostEntry) -> list[int]:
        """Checksums of the entry's pages as they are in memory now."""
        return checksum.checksums(*page_addresses(self.layout, entry.pages, self.slab.address + entry.offset))

    def check_integrity(self) -> None:
        """Raise AssertionError unless extents and entries account for every byte exactly once."""
        with self.lock:
            self._extents.check_integrity()
            held = [*self._entries.values(), *self._retired]
            used = sum(self._extents.rounded(entry.size) for entry in held)
            assert used + self._extents.free_bytes == self._extents.size, "bytes are lost or held twice"
            ends = sorted((entry.offset, entry.offset + entry.size) for entry in held)
            for (_, end), (start, _) in itertools.pairwise(ends):
                assert end <= start, "two adapters overlap"

    def _would_evict(self, size: int) -> bool:
        with self.lock:
            crowded = self.max_adapters is not None and len(self._entries) >= self.max_adapters
            return crowded or all(length < self._extents.rounded(size) for _, length in self._extents.gaps())

    def _candidates(self, besides: Hashable) -> list[Candidate[Hashable]]:
        """What may be evicted for the good of `besides`."""
        now = self._clock()
        stays = {besides, *self._kept, *self._held}
        return [
            Candidate(
                key,
                entry.size,
                load_seconds(entry.size, _CHECKPOINT_BYTES_PER_SECOND, _CHECKPOINT_FIXED_SECONDS),
                self._demand.of(key, now),
            )
            for key, entry in self._entries.items()
            if key not in stays and not entry.users and not entry.pinned and self.may_evict(key)
        ]

    def _in_the_way(self, size: int, key: Hashable) -> list[Hashable]:
        """Whom to evict for `size` bytes for `key`: an extent is contiguous, so its neighbours count, not the order of
        eviction alone. Raises HostTierFullError."""
        held = {}
        for candidate in self._candidates(key):
            entry = self._entries[candidate.key]
            held[entry.offset, self._extents.rounded(entry.size)] = candidate
        victims = cheapest_stretch(self._extents.gaps(), held, self._extents.rounded(size))
        if victims is None:
            raise HostTierFullError(
                f"The host tier of {self._extents.size} bytes has no room for {size} more; raise "
                "--loraserve-config.host_gib or unload adapters."
            )
        return victims

    def _evict(self, key: Hashable) -> None:
        logger.debug("Evicting adapter %s from the host tier", key)
        self.evictions += 1
        self._drop(self._entries.pop(key))

    def _drop(self, entry: HostEntry | None) -> None:
        if entry is None:
            return
        if entry.users:
            self._retired.add(entry)
        else:
            self._extents.free(entry.offset, entry.size)
