"""The device arena: one allocation that holds the pages of every adapter that may run now.

It is divided between the module groups by rank rows: every group gets the same number of pages, so an adapter
that targets all modules at one rank takes the same count in each. One allocation, outside of torch's allocator where
the extension is there: memory that GPUDirect may read.
"""

import ctypes
import logging
from collections.abc import Hashable, Sequence

import torch

from vllm_loraserve.adapters.layout import ALIGN_BYTES, Layout
from vllm_loraserve.memory import extension
from vllm_loraserve.memory.allocator import PageAllocator
from vllm_loraserve.memory.slab import DeviceSlab, HostSlab, Slab

logger = logging.getLogger(__name__)


class ArenaError(ValueError):
    """The arena cannot be made as asked; one sentence with the option to change."""


class Arena:
    """Pages for `rank_rows` rank rows in every module group of `layout`, on `device`.

    finely: page tables count in steps of ALIGN_BYTES, so that they can name pages outside of the arena, too
    (`numbers_at`); for host memory.

    `slab` is the memory for `transfer/` (None when torch's allocator holds it). Group g's pages begin at byte
    `group_offset(g)` of it; page p lies p * `layout.page_bytes(g)` further.
    """

    def __init__(self, layout: Layout, rank_rows: int, device: torch.device, *, finely: bool = False) -> None:
        self.layout, self.device = layout, device
        self.pages_per_group = rank_rows // layout.page_rows
        if self.pages_per_group < 1:
            raise ArenaError(
                f"The arena would hold {rank_rows} rank rows, less than one page of {layout.page_rows}; give it "
                f"at least {layout.bytes_per_page_set} bytes (--loraserve-config.arena_gib)."
            )
        self.nbytes = self.pages_per_group * layout.bytes_per_page_set
        dtype = getattr(torch, layout.dtype)
        # A layout without a module has pages of no bytes; a slab needs some.
        self.slab, raw = _allocate(max(self.nbytes, layout.item_bytes), device)
        self.flat = raw.view(dtype)
        self._offsets: list[int] = []
        at = 0
        for group in range(len(layout.groups)):
            self._offsets.append(at)
            at += self.pages_per_group * layout.page_bytes(group)
        step = ALIGN_BYTES // layout.item_bytes
        pages = [group.page_elements for group in layout.groups]
        self.fine = finely and device.type == "cpu"
        self._strides = [step] * len(pages) if self.fine else pages
        self.allocators = [PageAllocator(self.pages_per_group) for _ in layout.groups]

    @property
    def rank_rows(self) -> int:
        """Capacity, in rank rows of all modules."""
        return self.pages_per_group * self.layout.page_rows

    def group_offset(self, group: int) -> int:
        """Byte offset of the group's page 0 from the start of the arena."""
        return self._offsets[group]

    def group_flat(self, group: int) -> torch.Tensor:
        """The group's pages as one 1-D tensor; element 0 is where its page numbers count from."""
        start = self._offsets[group] // self.layout.item_bytes
        return self.flat[start : start + self.pages_per_group * self.layout.groups[group].page_elements]

    def group_pages(self, group: int) -> torch.Tensor:
        """The group's pages, [pages, page_elements]."""
        return self.group_flat(group).view(self.pages_per_group, self.layout.groups[group].page_elements)

    def stride(self, group: int) -> int:
        """Elements between two numbers of the group's page tables."""
        return self._strides[group]

    def numbers(self, pages: Sequence[Sequence[int]]) -> list[list[int]]:
        """What page tables hold for these pages of each group."""
        return [
            [page * (group.page_elements // stride) for page in owned]
            for owned, group, stride in zip(pages, self.layout.groups, self._strides, strict=True)
        ]

    def numbers_at(self, address: int, counts: Sequence[int]) -> list[list[int]] | None:
        """What page tables hold for pages that lie one after another from an address of host memory on, `counts[g]` of
        each group g; None where tables cannot name them."""
        if not self.fine:
            return None
        found: list[list[int]] = []
        for group, count in enumerate(counts):
            first, odd = divmod(address - (self.flat.data_ptr() + self._offsets[group]), ALIGN_BYTES)
            step = self.layout.page_bytes(group) // ALIGN_BYTES
            if odd or max(abs(first), abs(first + count * step)) >= 2**31:
                return None
            found.append([first + page * step for page in range(count)])
            address += count * self.layout.page_bytes(group)
        return found

    def free_pages(self) -> tuple[int, ...]:
        return tuple(allocator.free_pages for allocator in self.allocators)

    def allocate(self, counts: Sequence[int], owner: Hashable) -> list[list[int]] | None:
        """`counts[g]` pages of every group g, or None (and no change) when a group has too few."""
        if any(count > allocator.free_pages for count, allocator in zip(counts, self.allocators, strict=True)):
            return None
        return [
            allocator.allocate(count, owner) or [] for count, allocator in zip(counts, self.allocators, strict=True)
        ]

    def free(self, pages: Sequence[Sequence[int]], owner: Hashable) -> None:
        """Give back what `allocate` returned."""
        for allocator, owned in zip(self.allocators, pages, strict=True):
            allocator.free(owned, owner)

    def write(self, pages: Sequence[Sequence[int]], sources: Sequence[torch.Tensor | None]) -> None:
        """Copy whole pages in: `sources[g]` is [len(pages[g]), page_elements], None where there are none.

        On a GPU the copies are queued on the current stream (the source must be pinned and stay unchanged
        until they are done).
        """
        for group, (owned, source) in enumerate(zip(pages, sources, strict=True)):
            if source is None:
                continue
            target = self.group_pages(group)
            for first, count, at in _runs(owned):
                part, whole = target[first : first + count], source[at : at + count]
                if self.device.type == "cpu":
                    # One plain copy: torch would wake its threads, and wait for the slowest, for each piece.
                    ctypes.memmove(part.data_ptr(), whole.data_ptr(), part.nbytes)
                else:
                    part.copy_(whole, non_blocking=True)

    def zero(self, pages: Sequence[Sequence[int]]) -> None:
        for group, owned in enumerate(pages):
            for first, count, _ in _runs(owned):
                self.group_pages(group)[first : first + count].zero_()

    def check_integrity(self) -> None:
        for allocator in self.allocators:
            allocator.check_integrity()


def _runs(pages: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first page, count, index of the first in `pages`) of each ascending run."""
    runs: list[tuple[int, int, int]] = []
    for index, page in enumerate(pages):
        if runs and runs[-1][0] + runs[-1][1] == page:
            first, count, at = runs[-1]
            runs[-1] = (first, count + 1, at)
        else:
            runs.append((page, 1, index))
    return runs


def _allocate(nbytes: int, device: torch.device) -> tuple[Slab | None, torch.Tensor]:
    if device.type == "cpu":
        # Taken now: vLLM's CPU worker gives the KV cache all that this process has not touched before it measures.
        slab = HostSlab(nbytes, pinned=False, populate=True)
        return slab, torch.from_numpy(slab.array())[:nbytes]
    if device.type == "cuda" and extension.load() is not None:
        try:
            index = device.index if device.index is not None else torch.cuda.current_device()
            device_slab = DeviceSlab(nbytes, index)
            return device_slab, torch.as_tensor(device_slab, device=device)[:nbytes]
        except extension.ExtensionError as error:
            logger.warning("The arena is taken from torch, without RDMA: %s", error)
    return None, torch.empty(nbytes, dtype=torch.uint8, device=device)


def arena_rank_rows(
    layout: Layout,
    *,
    gib: float | None,
    rank_rows: int | None,
    stock_bytes: int,
    max_rank_seen: int,
    most_bytes: int | None = None,
) -> int:
    """Rank rows of the arena: given in GiB, or in rank rows (of `most_bytes` at most, where given), or by default what
    `stock_bytes` hold.

    In whole pages; at least one adapter of rank `max_rank_seen` (vLLM's --max-lora-rank) fits by default and in
    `most_bytes`, which is also the answer where no module lies in pages. Raises ArenaError when both sizes are given.
    """
    if gib is not None and rank_rows is not None:
        raise ArenaError("arena_gib and arena_rank_rows are both given; give the arena one size.")
    least = -(-max_rank_seen // layout.page_rows) * layout.page_rows
    if rank_rows is not None:
        rows = -(-rank_rows // layout.page_rows) * layout.page_rows
        if most_bytes is None or layout.bytes_per_page_set == 0:
            return rows
        return min(rows, max(most_bytes // layout.bytes_per_page_set * layout.page_rows, least))
    if layout.bytes_per_page_set == 0:
        return least
    nbytes = int(gib * 2**30) if gib is not None else stock_bytes
    rows = nbytes // layout.bytes_per_page_set * layout.page_rows
    return rows if gib is not None else max(rows, least)
