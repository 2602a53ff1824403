"""Expand, Triton: y += h @ B^T for every adapter of the batch, each at its own rank.

One program takes work (tile of tokens, block of output columns of one slice) until none is left. It walks the
adapter's own rank only, adds up the shrink kernel's partial planes as it loads them, and touches no row of a
base-model token and no slice that the adapter lacks. B lies transposed in the arena, so that a rank row is
contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum_planes(h_ptrs, mask, stride, SPLIT_K: tl.constexpr, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of SPLIT_K planes that lie `stride` elements apart, at `h_ptrs` in the first; in an order that the two
    constants alone decide."""
    if PLANES == 1:
        h = tl.load(h_ptrs, mask=mask, other=0.0)
        for _ in tl.static_range(SPLIT_K - 1):
            h_ptrs += stride
            h += tl.load(h_ptrs, mask=mask, other=0.0)
    else:
        # Each load above is brought into the layout of `tl.dot` through shared memory by itself, one after the other;
        # here PLANES are in flight at once and the sum alone is brought over.
        some_ptrs = h_ptrs[None, :, :] + (tl.arange(0, PLANES).to(tl.int64) * stride)[:, None, None]
        some = tl.load(some_ptrs, mask=mask[None, :, :], other=0.0)
        for _ in tl.static_range(SPLIT_K // PLANES - 1):
            some_ptrs += PLANES * stride
            some += tl.load(some_ptrs, mask=mask[None, :, :], other=0.0)
        h = tl.sum(some, 0)
    return h


# Sizes that change from batch to batch must not select compiled variants.
@triton.jit(do_not_specialize=["n_blocks", "table_stride", "ranks_stride", "h_rows"])
def expand_kernel(  # type: ignore[no-untyped-def]  # a Triton kernel: types are decided at launch
    y_ptr,  # [tokens, all output columns]
    h_ptr,  # fp32 [slices, SPLIT_K, sorted positions, rank columns]
    arena_ptr,  # 1-D
    table_ptr,  # int32 [slots, max_pages]
    ranks_ptr,  # int32 [slices, slots]
    slices_ptr,  # int64 [slices, 4]: A offset, B offset, first output column, output columns
    blocks_ptr,  # int32 [column blocks, 2]: slice, first column inside the slice
    header_ptr,  # int32: [0] live tiles
    perm_ptr,  # int32: token of each sorted position
    tiles_ptr,  # int32 [tiles, 4]: slot, start, length, 0
    n_blocks,
    y_stride,
    page_stride,
    table_stride,
    ranks_stride,
    h_rows,
    h_ranks,
    PAGE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PLANES: tl.constexpr,
    ADD_INPUTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EARLY_Y: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Add (or, without ADD_INPUTS, write) the LoRA part to y, for live tokens and slices of rank > 0 only."""
    step = tl.num_programs(0)
    n_work = tl.load(header_ptr) * n_blocks
    offs_m = tl.arange(0, BLOCK_M)
    for work in range(tl.program_id(0), n_work, step):
        block_ptr = blocks_ptr + (work % n_blocks) * 2
        tile_ptr = tiles_ptr + (work // n_blocks) * 4
        slice_id = tl.load(block_ptr)
        offs_n = tl.load(block_ptr + 1) + tl.arange(0, BLOCK_N)
        slot = tl.load(tile_ptr)
        start = tl.load(tile_ptr + 1)
        length = tl.load(tile_ptr + 2)
        rank = tl.load(ranks_ptr + slice_id * ranks_stride + slot)
        if rank > 0:
            b_offset = tl.load(slices_ptr + slice_id * 4 + 1)
            y_offset = tl.load(slices_ptr + slice_id * 4 + 2)
            size = tl.load(slices_ptr + slice_id * 4 + 3)
            if ALIGNED:
                b_offset = tl.multiple_of(b_offset, 8)
                y_offset = tl.multiple_of(y_offset, 8)
                size = tl.multiple_of(size, 8)
                offs_n = tl.max_contiguous(tl.multiple_of(offs_n, BLOCK_N), BLOCK_N)
            in_tile = offs_m < length
            in_slice = offs_n < size
            rows = tl.load(perm_ptr + start + offs_m, mask=in_tile, other=0).to(tl.int64)
            y_ptrs = y_ptr + rows[:, None] * y_stride + (y_offset + offs_n)[None, :]
            y_mask = in_tile[:, None] & in_slice[None, :]
            if ADD_INPUTS and EARLY_Y:
                y = tl.load(y_ptrs, mask=y_mask, other=0.0)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for r in range(0, rank, BLOCK_RANK):
                offs_r = r + tl.arange(0, BLOCK_RANK)
                in_rank = offs_r < rank
                pages = tl.load(table_ptr + slot * table_stride + offs_r // PAGE_ROWS, mask=in_rank, other=0)
                b_rows = pages.to(tl.int64) * page_stride + b_offset + (offs_r % PAGE_ROWS).to(tl.int64) * size
                b_ptrs = arena_ptr + b_rows[:, None] + offs_n[None, :]
                b = tl.load(b_ptrs, mask=in_rank[:, None] & in_slice[None, :], other=0.0)
                # Shrink fills up groups of four columns, so that a load is one instruction of 16 bytes, not four.
                h_mask = in_tile[:, None] & (offs_r // 4 * 4 < rank)[None, :]
                plane = tl.cast(slice_id * SPLIT_K, tl.int64) * h_rows + start
                h_ptrs = h_ptr + (plane + offs_m)[:, None] * h_ranks + offs_r[None, :]
                if DEPENDENT_LAUNCH:
                    tl.extra.cuda.gdc_wait()
                h = _sum_planes(h_ptrs, h_mask, tl.cast(h_rows, tl.int64) * h_ranks, SPLIT_K, PLANES)
                acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
            if ADD_INPUTS:
                if not EARLY_Y:
                    y = tl.load(y_ptrs, mask=y_mask, other=0.0)
                acc += y.to(tl.float32)
            tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=y_mask)
    if DEPENDENT_LAUNCH:
        # Also without work: what follows in the stream waits for this launch alone, and must not begin before shrink
        # has ended (it may write the planes again).
        tl.extra.cuda.gdc_wait()
