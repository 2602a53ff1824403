"""What a rank-aware kernel must know about one LoRA linear layer: where its rank rows lie in the arena.

This is the seam between the LoRA manager, which owns the arena, and the kernels, which only read it. A layer
has one *slice* for each packed sub-module (q, k, v of a QKV projection; gate and up; otherwise a single
slice). All slices of a layer lie in the same module group, so that they share one page table.

Inside a page of `page_rows` rank rows, slice `s` of this layer holds two contiguous blocks, counted in
elements from the start of the page:

    a_offsets[s] : A rows           [page_rows, in_size]
    b_offsets[s] : B, transposed    [page_rows, out_sizes[s]]   (the LoRA scaling is already folded in)

Rank row `n` of the adapter in slot `t` is therefore found at element
`page_table[t, n // page_rows] * page_stride + a_offsets[s] + (n % page_rows) * in_size` of `arena`.
Nothing beyond row `ranks[s, t]` is ever read: the rest of a page may hold anything, NaN included.

The module imports torch only, so that it can be used without vLLM and without Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

EXPAND_BLOCK_SIZES = (32, 64, 128, 256)
"""Output-column block widths for which a layer keeps a block table (see `PagedLinear.column_blocks`)."""

HANDLE_FIELDS = 4
"""Columns of `PagedLinear.handle`: A offset, B offset, first output column, number of output columns."""


@dataclass(eq=False)
class PagedLinear:
    """One LoRA linear layer of this worker's shard, as the kernels see it. All tensors live on one device.

    arena: 1-D tensor of the adapters' dtype; the base that page numbers count from.
    page_table: int32 [slots, max_pages]; entries that no rank row needs may hold anything.
    ranks: int32 [slices, slots]; this layer's true rank for each slot, 0 where the adapter lacks the module.
    page_stride: elements between consecutive page numbers. page_elements: those of a page, 0: as many. Where a page
    takes several numbers they count in finer steps, so that they can name pages anywhere, also outside of `arena`.
    """

    arena: torch.Tensor
    page_table: torch.Tensor
    ranks: torch.Tensor
    page_stride: int
    page_rows: int
    a_offsets: tuple[int, ...]
    b_offsets: tuple[int, ...]
    in_size: int
    out_sizes: tuple[int, ...]
    name: str = ""
    page_elements: int = 0
    handle: torch.Tensor = field(init=False)
    """int64 [slices, 4] on the device: per slice A offset, B offset, first output column, output columns. The
    kernels read it, and its address names the layer inside the custom op (no per-layer constant reaches
    torch.compile)."""
    column_blocks: dict[int, torch.Tensor] = field(init=False)
    """Per block width: int32 [blocks, 2] = (slice, first column inside the slice), without empty blocks."""
    _constants: list[tuple[torch.Tensor, torch.Tensor]] = field(init=False, repr=False)
    """(on the device, the same in host memory)."""
    aligned: bool = field(init=False)
    """True when every rank row and output slice starts on a 16-byte boundary, so that loads can be
    vectorised."""

    def __post_init__(self) -> None:
        self.page_elements = self.page_elements or self.page_stride
        self._validate()
        device = self.arena.device
        starts = [sum(self.out_sizes[:s]) for s in range(self.n_slices)]
        handle = torch.tensor(
            list(zip(self.a_offsets, self.b_offsets, starts, self.out_sizes, strict=True)), dtype=torch.int64
        )
        column_blocks = {
            width: torch.tensor(
                [(s, n) for s, size in enumerate(self.out_sizes) for n in range(0, size, width)], dtype=torch.int32
            )
            for width in EXPAND_BLOCK_SIZES
        }
        self.handle = handle.to(device, copy=True)
        self.column_blocks = {width: blocks.to(device, copy=True) for width, blocks in column_blocks.items()}
        self._constants = [(self.handle, handle)]
        self._constants += [(self.column_blocks[width], blocks) for width, blocks in column_blocks.items()]
        unit = 16 // self.arena.element_size()
        sizes = (self.page_stride, self.in_size, *self.a_offsets, *self.b_offsets, *self.out_sizes)
        self.aligned = all(size % unit == 0 for size in sizes) and self.arena.data_ptr() % 16 == 0

    def restore(self) -> None:
        """Writes the constants on the device again, where they are: a sleep that discards weights discards them."""
        for there, here in self._constants:
            there.copy_(here)

    @property
    def stacked(self) -> tuple[torch.Tensor]:
        """What the layer passes to the Punica wrapper where vLLM passes its stacked weights."""
        return (self.handle,)

    @property
    def n_slices(self) -> int:
        return len(self.out_sizes)

    @property
    def slots(self) -> int:
        return self.page_table.shape[0]

    @property
    def max_rank(self) -> int:
        """The largest rank that the page table can describe."""
        return self.page_table.shape[1] * self.page_rows

    def _validate(self) -> None:
        where = f"LoRA layer {self.name!r}" if self.name else "LoRA layer"
        slices = len(self.out_sizes)
        if slices == 0 or len(self.a_offsets) != slices or len(self.b_offsets) != slices:
            raise ValueError(
                f"{where}: a_offsets, b_offsets and out_sizes need one entry per slice, got "
                f"{len(self.a_offsets)}, {len(self.b_offsets)} and {slices}"
            )
        if self.arena.dim() != 1 or not self.arena.is_contiguous():
            raise ValueError(f"{where}: the arena must be a contiguous 1-D tensor, got {tuple(self.arena.shape)}")
        if self.page_table.dtype != torch.int32 or self.page_table.dim() != 2 or self.page_table.stride(1) != 1:
            raise ValueError(f"{where}: page_table must be int32 [slots, max_pages] with contiguous rows")
        if self.ranks.dtype != torch.int32 or self.ranks.shape != (slices, self.slots) or self.ranks.stride(1) != 1:
            raise ValueError(
                f"{where}: ranks must be int32 [{slices}, {self.slots}] with contiguous rows, "
                f"got {self.ranks.dtype} {tuple(self.ranks.shape)}"
            )
        for s in range(slices):
            ends = (
                self.a_offsets[s] + self.page_rows * self.in_size,
                self.b_offsets[s] + self.page_rows * self.out_sizes[s],
            )
            if min(self.a_offsets[s], self.b_offsets[s]) < 0 or max(ends) > self.page_elements:
                raise ValueError(f"{where}: slice {s} ends at element {max(ends)} of a page of {self.page_elements}")


def reference_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    linear: PagedLinear,
    token_slots: torch.Tensor,
    *,
    add_inputs: bool = True,
) -> torch.Tensor:
    """What `lora_linear` must compute, in float64 on the host: the oracle of every kernel test.

    y [tokens, sum(out_sizes)], x [tokens, in_size], token_slots int [tokens] (-1: base model, row untouched).
    Returns a new float64 tensor. With `add_inputs=False` a touched row holds the LoRA part alone.
    """
    arena, table, ranks = linear.arena.cpu(), linear.page_table.cpu().long(), linear.ranks.cpu().long()
    out = y.detach().cpu().double().clone()
    x64 = x.detach().cpu().double()
    for slot in sorted({int(t) for t in token_slots.tolist() if t >= 0}):
        rows = (token_slots.cpu() == slot).nonzero().flatten()
        start = 0
        for s, size in enumerate(linear.out_sizes):
            rank = int(ranks[s, slot])
            if rank:
                index = torch.arange(rank)
                base = table[slot, index // linear.page_rows] * linear.page_stride
                inner = index % linear.page_rows
                a_at = (base + linear.a_offsets[s] + inner * linear.in_size)[:, None] + torch.arange(linear.in_size)
                b_at = (base + linear.b_offsets[s] + inner * size)[:, None] + torch.arange(size)
                delta = x64[rows] @ arena[a_at].double().T @ arena[b_at].double()
                columns = slice(start, start + size)
                out[rows, columns] = delta + (out[rows, columns] if add_inputs else 0.0)
            start += size
    return out
