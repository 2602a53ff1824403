"""The host tier (`memory/host_tier.py`) as a store that peers read from and as a landing that fetches write into.

The tier keys its entries by whatever the engine likes (an adapter id); between instances an adapter goes by its name.
The two functions that translate are the engine's. An adapter with weights outside the pages (embeddings, lm_head)
cannot be served from pages alone: `name_of` gives None for it, and peers take it from its checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager

import msgspec

from vllm_loraserve.adapters.convert import page_addresses
from vllm_loraserve.memory.host_tier import HostEntry, HostTier
from vllm_loraserve.memory.slab import HostSlab
from vllm_loraserve.transfer.errors import LayoutMismatchError
from vllm_loraserve.transfer.pages import AdapterPages, Destination, Range, Wanted


class HostMeta(msgspec.Struct, frozen=True):
    """What goes with the pages in `AdapterPages.meta`: the rank of every slice of the layout."""

    ranks: tuple[int, ...]


class HostTierStore:
    """One host tier, by adapter name. `on_landed(name, digest, peer)`: a peer has confirmed a copy (see `handover.py`).

    landing_key: (name, digest) -> the key under which this content is to land; None: `key_of` alone says so, which a
    name that gets new content while the old is on its way would lead astray.
    """

    def __init__(
        self,
        tier: HostTier,
        *,
        name_of: Callable[[Hashable], str | None],
        key_of: Callable[[str], Hashable | None],
        on_landed: Callable[[str, str, str], None] | None = None,
        landing_key: Callable[[str, str], Hashable | None] | None = None,
    ) -> None:
        self.tier, self._name_of, self._key_of, self._on_landed = tier, name_of, key_of, on_landed
        self._landing_key = landing_key if landing_key is not None else lambda name, _: key_of(name)
        self._lock = threading.Lock()
        self._pins: dict[tuple[str, int], list[AbstractContextManager[HostEntry | None]]] = {}
        self._reserved: dict[int, HostEntry] = {}
        """By the slab offset of the reservation."""

    @property
    def slab(self) -> HostSlab:
        return self.tier.slab

    # ---- PageStore ----

    def catalogue(self) -> list[AdapterPages]:
        named = ((self._name_of(entry.key), entry) for entry in self.tier.entries())
        return [self._describe(name, entry) for name, entry in named if name is not None]

    def acquire(self, name: str) -> AdapterPages | None:
        key = self._key_of(name)
        if key is None or self._name_of(key) is None:
            return None
        reading = self.tier.reading(key)
        entry = reading.__enter__()
        if entry is None:
            reading.__exit__(None, None, None)
            return None
        pages = self._describe(name, entry)
        with self._lock:
            self._pins.setdefault((name, entry.generation), []).append(reading)
        return pages

    def release(self, pages: AdapterPages) -> None:
        key = (pages.name, pages.generation)
        with self._lock:
            held = self._pins[key]
            reading = held.pop()
            if not held:
                del self._pins[key]
        reading.__exit__(None, None, None)

    def landed(self, pages: AdapterPages, peer: str) -> None:
        with self.tier.lock:
            # The news may come late: of a copy that is gone by now it says nothing about the next one.
            entry = self.tier.get(self._key_of(pages.name))
            if self._on_landed is not None and entry is not None and entry.generation == pages.generation:
                self._on_landed(pages.name, pages.digest, peer)

    def find(self, wanted: Wanted) -> AdapterPages | None:
        """The adapter where the tier holds it with this layout and digest."""
        key = self._key_of(wanted.name)
        entry = self.tier.get(key) if key is not None else None
        if entry is None or wanted.layout != self.tier.layout.fingerprint:
            return None
        if wanted.digest and entry.digest != wanted.digest:
            return None
        return self._describe(wanted.name, entry)

    def _describe(self, name: str, entry: HostEntry) -> AdapterPages:
        _, lengths = page_addresses(self.tier.layout, entry.pages, 0)
        return AdapterPages(
            name=name,
            generation=entry.generation,
            digest=entry.digest,
            layout=self.tier.layout.fingerprint,
            page_lengths=tuple(lengths),
            checksums=tuple(entry.checksums),
            ranges=(Range(entry.offset, entry.size),) if entry.size else (),
            meta=msgspec.msgpack.encode(HostMeta(entry.ranks)),
        )

    # ---- Landing ----

    def adopt(self, name: str, entry: HostEntry) -> tuple[AdapterPages, Destination]:
        """A reservation out of an entry that was created, and filled, without one: to be committed or abandoned."""
        with self._lock:
            self._reserved[entry.offset] = entry
        # Its checksums are made when it is committed.
        pages = AdapterPages(
            name=name,
            generation=entry.generation,
            digest=entry.digest,
            layout=self.tier.layout.fingerprint,
            page_lengths=tuple(page_addresses(self.tier.layout, entry.pages, 0)[1]),
            checksums=(),
            ranges=(Range(entry.offset, entry.size),),
            meta=msgspec.msgpack.encode(HostMeta(entry.ranks)),
        )
        return pages, Destination(self.tier.slab, pages.ranges)

    def reserve(self, pages: AdapterPages) -> Destination:
        """Raises HostTierFullError without room, AdapterError where the whole tier is too small, LayoutMismatchError
        where the pages are not what the ranks say."""
        key = self._landing_key(pages.name, pages.digest)
        if key is None:
            raise LayoutMismatchError(f"{pages.name} is not an adapter known here")
        try:
            ranks = msgspec.msgpack.decode(pages.meta, type=HostMeta).ranks
        except msgspec.MsgspecError as error:
            raise LayoutMismatchError(f"{pages.name} came without its ranks: {error}") from None
        layout = self.tier.layout
        slices = sum(len(group.places) for group in layout.groups)
        _, lengths = page_addresses(layout, layout.pages_for(ranks), 0)
        if len(ranks) != slices or tuple(lengths) != pages.page_lengths:
            raise LayoutMismatchError(f"{pages.name}: the pages offered are not those of its ranks")
        entry = self.tier.create(key, pages.digest, ranks)
        entry.from_peer = True
        with self._lock:
            self._reserved[entry.offset] = entry
        return Destination(self.tier.slab, (Range(entry.offset, entry.size),) if entry.size else ())

    def commit(self, pages: AdapterPages, destination: Destination) -> None:
        # A peer's pages come verified; those of `adopt` have no checksums yet.
        self.tier.commit(self._take(destination), pages.checksums or None)

    def abandon(self, destination: Destination) -> None:
        self.tier.discard(self._take(destination))

    def _take(self, destination: Destination) -> HostEntry:
        with self._lock:
            return self._reserved.pop(destination.ranges[0].offset)
