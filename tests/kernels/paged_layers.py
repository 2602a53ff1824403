"""A small paged layer with random adapters, NaN wherever no kernel may read."""

from __future__ import annotations

import torch

from vllm_loraserve.kernels.paged import PagedLinear


def make_layer(
    *,
    slots: int,
    ranks: list[list[int]],
    in_size: int,
    out_sizes: tuple[int, ...],
    dtype: torch.dtype,
    page_rows: int = 8,
    seed: int = 0,
) -> PagedLinear:
    """`ranks[slice][slot]`. Pages are dealt in random order; all memory that is no rank row is NaN."""
    generator = torch.Generator().manual_seed(seed)
    offsets, at = [], 3 * 8
    for size in out_sizes:
        offsets.append((at, at + page_rows * in_size))
        at += page_rows * (in_size + size) + 8
    tops = [max(slice_ranks[slot] for slice_ranks in ranks) for slot in range(slots)]
    needed = [-(-top // page_rows) for top in tops]
    n_pages, max_pages = sum(needed) + 3, max(*needed, 1) + 1
    order = torch.randperm(n_pages, generator=generator).tolist()
    table = torch.full((slots, max_pages), 10**6, dtype=torch.int32)
    arena = torch.full((n_pages * at,), float("nan"), dtype=dtype)
    for slot in range(slots):
        mine = [order.pop() for _ in range(needed[slot])]
        table[slot, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        for s, size in enumerate(out_sizes):
            for row in range(ranks[s][slot]):
                base = mine[row // page_rows] * at
                for offset, width in zip(offsets[s], (in_size, size), strict=True):
                    start = base + offset + row % page_rows * width
                    arena[start : start + width] = torch.randn(width, generator=generator).to(dtype) * 0.3
    return PagedLinear(
        arena=arena,
        page_table=table,
        ranks=torch.tensor(ranks, dtype=torch.int32),
        page_stride=at,
        page_rows=page_rows,
        a_offsets=tuple(a for a, _ in offsets),
        b_offsets=tuple(b for _, b in offsets),
        in_size=in_size,
        out_sizes=out_sizes,
        name="test",
    )
