"""The page: how the rank rows of a model's LoRA modules lie in memory, the same in every tier.

A page of a module group is `page_rows` rank rows of all modules of the group:

    for each module slice:  A rows [page_rows, in_size], then B transposed [page_rows, out_size]

with the LoRA scaling folded into B, sizes as sharded on this worker, and each block starting on a 64-byte
boundary. The slices of one runtime layer (q, k, v of a fused projection) are in the same group, so that a
kernel needs one page table per layer.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import msgspec

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ALIGN_BYTES = 64
FORMAT = 1
"""Raise it when the meaning of a page's bytes changes: old pages then have another fingerprint."""


class ModuleShape(msgspec.Struct, frozen=True):
    """One runtime LoRA layer of this worker's shard: its name, input features, output features by slice."""

    name: str
    group: str
    in_size: int
    out_sizes: tuple[int, ...]


class SlicePlace(msgspec.Struct, frozen=True):
    """Where one slice of a module lies in a page; offsets are elements from the start of the page."""

    module: str
    index: int
    in_size: int
    out_size: int
    a_offset: int
    b_offset: int


class PageGroup(msgspec.Struct, frozen=True):
    """The modules that share pages, in order, and the page's size in elements."""

    name: str
    places: tuple[SlicePlace, ...]
    page_elements: int


class Layout(msgspec.Struct, frozen=True, dict=True):
    """The page layout of one worker. Equal fingerprints mean that pages can be exchanged as they are."""

    model: str
    """What the pages are for: the model's architecture (its weights do not matter to a page)."""
    dtype: str
    page_rows: int
    tp_rank: int
    tp_size: int
    groups: tuple[PageGroup, ...]

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that gives a page's bytes their meaning."""
        return hashlib.sha256(msgspec.json.encode((FORMAT, self))).hexdigest()

    @cached_property
    def slice_index(self) -> dict[tuple[str, int], int]:
        """(module, slice) -> its position in an adapter's `ranks`."""
        return {(place.module, place.index): at for at, place in enumerate(self.places())}

    def places(self) -> Iterator[SlicePlace]:
        """All slices, group by group; the order of an adapter's `ranks`."""
        for group in self.groups:
            yield from group.places

    def page_bytes(self, group: int) -> int:
        return self.groups[group].page_elements * self.item_bytes

    @cached_property
    def bytes_per_page_set(self) -> int:
        """Bytes of one page in every group."""
        return sum(self.page_bytes(group) for group in range(len(self.groups)))

    def pages_for(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Pages that an adapter with these ranks (one per slice, 0: not targeted) takes in each group."""
        pages, at = [], 0
        for group in self.groups:
            rank = max(ranks[at : at + len(group.places)], default=0)
            pages.append(-(-rank // self.page_rows))
            at += len(group.places)
        return tuple(pages)

    def uniform_pages(self, rank: int) -> tuple[int, ...]:
        """Pages of an adapter with this rank in every module."""
        return (-(-rank // self.page_rows),) * len(self.groups)

    def size_bytes(self, pages: Sequence[int]) -> int:
        """Bytes of so many pages in each group."""
        return sum(count * self.page_bytes(group) for group, count in enumerate(pages))


def build_layout(
    modules: Iterable[ModuleShape], *, model: str, dtype: str, page_rows: int, tp_rank: int, tp_size: int
) -> Layout:
    """Place `modules` in the pages of their groups; groups and modules keep their order.

    Raises ValueError for a dtype that no kernel reads.
    """
    if dtype not in ITEM_BYTES:
        raise ValueError(f"LoRA dtype {dtype} is not served; use one of {', '.join(ITEM_BYTES)}")
    align = ALIGN_BYTES // ITEM_BYTES[dtype]
    places: dict[str, list[SlicePlace]] = {}
    ends: dict[str, int] = {}
    for module in modules:
        for index, out_size in enumerate(module.out_sizes):
            a_offset = ends.get(module.group, 0)
            b_offset = _round_up(a_offset + page_rows * module.in_size, align)
            ends[module.group] = _round_up(b_offset + page_rows * out_size, align)
            places.setdefault(module.group, []).append(
                SlicePlace(module.name, index, module.in_size, out_size, a_offset, b_offset)
            )
    groups = tuple(PageGroup(name, tuple(inside), ends[name]) for name, inside in places.items())
    return Layout(model, dtype, page_rows, tp_rank, tp_size, groups)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
