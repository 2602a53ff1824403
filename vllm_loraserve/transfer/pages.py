"""The values that the transfer layer moves, and the seams to those who own memory.

An adapter's pages lie in a slab as a few contiguous ranges; read one after the other, the ranges are the adapter's
page stream. Source and destination cut the same stream into ranges of their own. Lengths and offsets are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec

from vllm_loraserve.memory.slab import Slab


class Range(NamedTuple):
    """`length` bytes from `offset` in a slab."""

    offset: int
    length: int


class Piece(NamedTuple):
    """One contiguous copy: `length` bytes from `source` (offset in the source's slab) to `target` (offset in ours)."""

    source: int
    target: int
    length: int


class AdapterPages(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter as one holder has it.

    `generation` is the holder's count of changes under this name: it rises whenever the pages are replaced or moved.
    `digest` is the content's identity (sha256 of the checkpoint), `layout` the layout fingerprint; both are compared,
    never interpreted. `meta` is for those who make and use pages (rank, module groups, ...): carried, never read.
    """

    name: str
    generation: int
    digest: str
    layout: str
    page_lengths: tuple[int, ...]
    checksums: tuple[int, ...]
    """Of each page, in the order of the stream (`memory/checksum.py`)."""
    ranges: tuple[Range, ...]
    meta: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of the whole stream."""
        return sum(self.page_lengths)

    def validate(self, slab_size: int | None = None) -> None:
        """Raises ValueError where lengths, checksums and ranges do not fit each other, or the slab.

        A page lies whole in one range: that is what lets one side check it where it landed.
        """
        if len(self.page_lengths) != len(self.checksums):
            raise ValueError(f"{self.name}: {len(self.page_lengths)} pages but {len(self.checksums)} checksums")
        if any(n <= 0 for n in self.page_lengths) or any(r.length <= 0 or r.offset < 0 for r in self.ranges):
            raise ValueError(f"{self.name}: pages and ranges need a length above 0")
        if slab_size is not None and any(r.offset + r.length > slab_size for r in self.ranges):
            raise ValueError(f"{self.name}: a range ends outside the slab of {slab_size} bytes")
        if sum(r.length for r in self.ranges) != self.size:
            raise ValueError(f"{self.name}: ranges hold {sum(r.length for r in self.ranges)} bytes, pages {self.size}")
        for _ in page_offsets(self.page_lengths, self.ranges):
            pass


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody needs: `layout` must be equal; `digest` too, unless it is empty."""

    name: str
    layout: str
    digest: str = ""


class Destination(NamedTuple):
    """Memory reserved for an adapter: ranges of our slab, of together its size, in the order of the stream."""

    slab: Slab
    ranges: tuple[Range, ...]


class PageStore(Protocol):
    """A tier that holds adapters in one slab and lets peers read them (the host tier, the arena, `SlabStore`).

    Called from the server's threads. Between `acquire` and `release` the pages stay where they are and as they are,
    unless the store has first called `TransferServer.revoke`.
    """

    @property
    def slab(self) -> Slab: ...

    def catalogue(self) -> Sequence[AdapterPages]:
        """Everything that peers may read now."""

    def acquire(self, name: str) -> AdapterPages | None:
        """Pins the adapter against eviction and reuse of its pages; None where it is not held."""

    def release(self, pages: AdapterPages) -> None:
        """Undoes one `acquire`."""

    def landed(self, pages: AdapterPages, peer: str) -> None:
        """`peer` has verified a copy of its own: from here on this one may go, should placement say so."""


class Landing(Protocol):
    """Whoever takes adapters in: the host tier, the arena, `SlabStore`."""

    def reserve(self, pages: AdapterPages) -> Destination:
        """Memory for these pages, page by page contiguous. Raises where there is no room."""

    def commit(self, pages: AdapterPages, destination: Destination) -> None:
        """The bytes are in place and verified; from here on they may be used."""

    def abandon(self, destination: Destination) -> None:
        """The reservation is not needed: the fetch failed, or another source was faster."""


def match(source: Sequence[Range], target: Sequence[Range], max_piece: int | None = None) -> list[Piece]:
    """Cuts two layouts of one stream into pieces contiguous in both, none above `max_piece` bytes.

    Raises ValueError where the two hold different numbers of bytes.
    """
    pieces: list[Piece] = []
    targets = iter(target)
    at, room = 0, 0
    for offset, length in source:
        while length > 0:
            if room == 0:
                at, room = next(targets, (0, 0))
                if room == 0:
                    raise ValueError("the destination is smaller than the source")
            take = min(length, room, max_piece or length)
            pieces.append(Piece(offset, at, take))
            offset, length, at, room = offset + take, length - take, at + take, room - take
    if room or next(targets, None) is not None:
        raise ValueError("the destination is larger than the source")
    return pieces


def page_offsets(page_lengths: Sequence[int], ranges: Sequence[Range]) -> Iterator[int]:
    """The slab offset of each page of a stream. Raises ValueError where a page crosses the end of a range."""
    left = iter(ranges)
    at = room = 0
    for length in page_lengths:
        if room == 0:
            at, room = next(left, (0, 0))
        if length > room:
            raise ValueError(f"a page of {length} bytes crosses the end of a range ({room} bytes left)")
        yield at
        at, room = at + length, room - length


def slice_stream(ranges: Sequence[Range], start: int, length: int) -> list[Range]:
    """The ranges that hold bytes [start, start + length) of the stream. Raises ValueError outside of it."""
    found: list[Range] = []
    if start < 0 or length < 0:
        raise ValueError(f"a slice needs start and length of at least 0, not {start}, {length}")
    for offset, size in ranges:
        if start >= size:
            start -= size
            continue
        if length == 0:
            break
        take = min(size - start, length)
        found.append(Range(offset + start, take))
        start, length = 0, length - take
    if length:
        raise ValueError(f"the slice ends {length} bytes after the stream")
    return found
