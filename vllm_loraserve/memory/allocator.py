"""Who owns which page of the arena, and which extent of the host tier. Pure bookkeeping, no memory.

Pages are all of one size and need not be adjacent, so the arena cannot fragment: n free pages serve any
request for n pages.
"""

import bisect
from collections.abc import Hashable, Iterable

Owner = Hashable


class PageAllocator:
    """The pages 0..n_pages-1 of one module group; each is free or has exactly one owner."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        # Popped from the end: low page numbers first, and pages given back are used again soonest.
        self._free = list(range(n_pages - 1, -1, -1))
        self._owner: dict[int, Owner] = {}

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def allocate(self, count: int, owner: Owner) -> list[int] | None:
        """`count` pages for `owner`, or None (and no change) when fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._owner.update(dict.fromkeys(pages, owner))
        return pages

    def free(self, pages: Iterable[int], owner: Owner) -> None:
        """Give pages back. Raises ValueError, and changes nothing, unless `owner` owns every one of them."""
        pages = list(pages)
        wrong = [page for page in pages if self._owner.get(page) != owner]
        if wrong or len(set(pages)) != len(pages):
            raise ValueError(f"pages {wrong or pages} are not owned once each by {owner!r}")
        for page in pages:
            del self._owner[page]
        self._free.extend(reversed(pages))

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is either free or owned, once."""
        seen = [*self._free, *self._owner]
        assert sorted(seen) == list(range(self.n_pages)), "a page is lost or held twice"

    def owned_by(self, owner: Owner) -> list[int]:
        return sorted(page for page, who in self._owner.items() if who == owner)


class ExtentAllocator:
    """Contiguous byte ranges of a slab: best fit, neighbours joined when freed."""

    def __init__(self, size: int, align: int = 4096) -> None:
        self.size, self.align = size // align * align, align
        self._starts = [0] if self.size else []
        self._length = {0: self.size} if self.size else {}
        self.free_bytes = self.size

    def allocate(self, size: int) -> int | None:
        """Offset of `size` bytes (rounded up to the alignment), or None when no gap is that long."""
        size = self.rounded(size)
        fitting = [(length, start) for start, length in self._length.items() if length >= size]
        if not fitting:
            return None
        length, start = min(fitting)
        self._remove(start)
        if length > size:
            self._insert(start + size, length - size)
        self.free_bytes -= size
        return start

    def free(self, offset: int, size: int) -> None:
        """Give back what `allocate(size)` returned."""
        size = self.rounded(size)
        at = bisect.bisect_left(self._starts, offset)
        before = self._starts[at - 1] if at else None
        after = self._starts[at] if at < len(self._starts) else None
        if (before is not None and before + self._length[before] > offset) or (
            after is not None and offset + size > after
        ):
            raise ValueError(f"the extent at {offset} of {size} bytes is free already")
        self.free_bytes += size
        if after is not None and offset + size == after:
            size += self._remove(after)
        if before is not None and before + self._length[before] == offset:
            offset, size = before, self._remove(before) + size
        self._insert(offset, size)

    def gaps(self) -> list[tuple[int, int]]:
        """(offset, length) of every free range, ascending."""
        return [(start, self._length[start]) for start in self._starts]

    def rounded(self, size: int) -> int:
        return -(-max(size, 1) // self.align) * self.align

    def _insert(self, start: int, length: int) -> None:
        bisect.insort(self._starts, start)
        self._length[start] = length

    def _remove(self, start: int) -> int:
        self._starts.pop(bisect.bisect_left(self._starts, start))
        return self._length.pop(start)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the free ranges are sorted, apart, not adjacent, and add up."""
        assert self._starts == sorted(self._length)
        assert sum(self._length.values()) == self.free_bytes
        for left, right in zip(self._starts, self._starts[1:], strict=False):
            assert left + self._length[left] < right, "two free ranges touch or overlap"
