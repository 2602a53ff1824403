"""Shrink, Triton: h = x @ A^T for every adapter of the batch, each at its own rank.

One program takes work (item, slice, split of K) from a compact list until none is left; the number of items
is read on the device. An item is a tile of tokens of one adapter times one block of its rank rows. Rank rows
are found through the page table. Partial sums over K go to separate fp32 planes: no atomics, nothing to
clear, the same result every time.

Prior art: S-LoRA (rank-aware, row pages), Punica (segmented gather GEMM), SGLang's `triton_v2` LoRA plans
(compact tile lists, split-K planes).
"""

from __future__ import annotations

import triton
import triton.language as tl


# Sizes that change from batch to batch must not select compiled variants.
@triton.jit(do_not_specialize=["table_stride", "ranks_stride", "h_rows", "split_shift"])
def shrink_kernel(  # type: ignore[no-untyped-def]  # a Triton kernel: types are decided at launch
    x_ptr,  # [tokens, K]
    arena_ptr,  # 1-D
    table_ptr,  # int32 [slots, max_pages]
    ranks_ptr,  # int32 [slices, slots]
    slices_ptr,  # int64 [slices, 4]: A offset, B offset, first output column, output columns
    header_ptr,  # int32: [1] live items
    perm_ptr,  # int32: token of each sorted position
    items_ptr,  # int32 [items, 4]: slot, start, length, rank block
    h_ptr,  # fp32 [slices, 1 << split_shift, sorted positions, rank columns]
    K,
    x_stride,
    page_stride,
    table_stride,
    ranks_stride,
    h_rows,
    h_ranks,
    split_shift,  # K is shared among so many programs, as a power of two: no division by what is not a constant
    N_SLICES: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Write h[slice, split, start + m, n] for every live token position and every live rank row, and nothing
    else."""
    if DEPENDENT_LAUNCH:
        # Expand waits for the whole of this launch before it reads a plane, so it may take free room from now on.
        tl.extra.cuda.gdc_launch_dependents()
    step = tl.num_programs(0)
    n_work = (tl.load(header_ptr + 1) * N_SLICES) << split_shift
    last_split = (1 << split_shift) - 1
    k_chunk = ((tl.cdiv(K, BLOCK_K) + last_split) >> split_shift) * BLOCK_K
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    for work in range(tl.program_id(0), n_work, step):
        split = work & last_split
        slice_id = (work >> split_shift) % N_SLICES
        item_ptr = items_ptr + (work >> split_shift) // N_SLICES * 4
        slot = tl.load(item_ptr)
        start = tl.load(item_ptr + 1)
        length = tl.load(item_ptr + 2)
        first_row = tl.load(item_ptr + 3) * BLOCK_R
        rank = tl.load(ranks_ptr + slice_id * ranks_stride + slot)
        # A module may have a smaller rank than the adapter's largest, or be absent: then this item is not
        # live here.
        if first_row < rank:
            offs_r = first_row + tl.arange(0, BLOCK_R)
            in_tile = offs_m < length
            in_rank = offs_r < rank
            rows = tl.load(perm_ptr + start + offs_m, mask=in_tile, other=0).to(tl.int64)
            pages = tl.load(table_ptr + slot * table_stride + offs_r // PAGE_ROWS, mask=in_rank, other=0)
            a_offset = tl.load(slices_ptr + slice_id * 4)
            if ALIGNED:
                a_offset = tl.multiple_of(a_offset, 8)
            a_rows = pages.to(tl.int64) * page_stride + a_offset + (offs_r % PAGE_ROWS).to(tl.int64) * K
            k_first = split * k_chunk
            k_last = tl.minimum(k_first + k_chunk, K)
            x_ptrs = x_ptr + rows[:, None] * x_stride + (k_first + offs_k)[None, :]
            a_ptrs = arena_ptr + a_rows[None, :] + (k_first + offs_k)[:, None]
            acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for k in range(k_first, k_last, BLOCK_K):
                if EVEN_K:
                    x = tl.load(x_ptrs, mask=in_tile[:, None], other=0.0)
                    a = tl.load(a_ptrs, mask=in_rank[None, :], other=0.0)
                else:
                    in_k = k + offs_k < K
                    x = tl.load(x_ptrs, mask=in_tile[:, None] & in_k[None, :], other=0.0)
                    a = tl.load(a_ptrs, mask=in_k[:, None] & in_rank[None, :], other=0.0)
                acc = tl.dot(x, a, acc, input_precision="ieee")
                x_ptrs += BLOCK_K
                a_ptrs += BLOCK_K
            plane = tl.cast((slice_id << split_shift) + split, tl.int64) * h_rows
            h_ptrs = h_ptr + (plane + start + offs_m)[:, None] * h_ranks + offs_r[None, :]
            # Also zeros up to the next multiple of four columns, which expand loads together (x may hold infinities).
            acc = tl.where(in_rank[None, :], acc, 0.0)
            tl.store(h_ptrs, acc, mask=in_tile[:, None] & (offs_r // 4 * 4 < rank)[None, :])
