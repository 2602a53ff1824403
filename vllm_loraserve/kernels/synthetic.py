"""Random adapters in a poisoned arena, for tests and benchmarks of the kernels.

Every element of the arena that is no live rank row is NaN, every page-table entry that no rank row needs
points far outside, and pages lie in random order: a kernel that reads one element too many shows it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_loraserve.kernels.paged import PagedLinear

UNUSED_PAGE = 1 << 28
"""Page-table entry where no page is needed; following it would leave the arena by terabytes."""


def synthetic_linear(
    *,
    in_size: int,
    out_sizes: Sequence[int],
    ranks: Sequence[Sequence[int]],
    max_rank: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    page_rows: int = 8,
    spare_pages: int = 2,
    gap: int = 0,
    poison: bool = True,
    seed: int = 0,
    name: str = "synthetic",
) -> PagedLinear:
    """A layer with random adapters; ranks[slice][slot] are true ranks (0: the adapter lacks the module).

    gap: elements of other layers between this layer's blocks in a page. Values are scaled so that a LoRA
    delta of a unit-variance input has a variance near 1.
    Without `poison` the whole arena is filled at once, quickly.
    """
    rng = torch.Generator(device="cpu").manual_seed(seed)
    slots = len(ranks[0])
    max_pages = -(-max_rank // page_rows)
    a_offsets, b_offsets, at = [], [], gap
    for size in out_sizes:
        a_offsets.append(at)
        at += page_rows * in_size + gap
        b_offsets.append(at)
        at += page_rows * size + gap
    needed = [-(-max(row[slot] for row in ranks) // page_rows) for slot in range(slots)]
    n_pages = sum(needed) + spare_pages
    arena = torch.full((n_pages * at,), float("nan"), dtype=dtype, device=device)
    table = torch.full((slots, max_pages), UNUSED_PAGE, dtype=torch.int32)
    free = torch.randperm(n_pages, generator=rng).tolist()
    value_rng = torch.Generator(device=device).manual_seed(seed + 1)
    if not poison:
        arena.normal_(generator=value_rng).mul_(in_size**-0.5)
    for slot in range(slots):
        for index in range(needed[slot]):
            page = free.pop()
            table[slot, index] = page
            for s, size in enumerate(out_sizes):
                rows = min(page_rows, ranks[s][slot] - index * page_rows)
                if rows <= 0 or not poison:
                    continue
                for offset, width, scale in (
                    (a_offsets[s], in_size, in_size**-0.5),
                    (b_offsets[s], size, ranks[s][slot] ** -0.5),
                ):
                    values = torch.randn(rows * width, generator=value_rng, device=device) * scale
                    first = page * at + offset
                    arena[first : first + rows * width] = values.to(dtype)
    return PagedLinear(
        arena=arena,
        page_table=table.to(device),
        ranks=torch.tensor([list(row) for row in ranks], dtype=torch.int32, device=device),
        page_stride=at,
        page_rows=page_rows,
        a_offsets=tuple(a_offsets),
        b_offsets=tuple(b_offsets),
        in_size=in_size,
        out_sizes=tuple(out_sizes),
        name=name,
    )


def padded_weights(linear: PagedLinear, max_rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same adapters as vLLM stacks them: per slice A [slots, 1, max_rank, in] and B [slots, 1, out,
    max_rank], zero beyond each adapter's rank."""
    arena, table, ranks = linear.arena, linear.page_table.cpu(), linear.ranks.cpu()
    stacked_a, stacked_b = [], []
    for s, size in enumerate(linear.out_sizes):
        a = torch.zeros(linear.slots, 1, max_rank, linear.in_size, dtype=arena.dtype, device=arena.device)
        b = torch.zeros(linear.slots, 1, size, max_rank, dtype=arena.dtype, device=arena.device)
        for slot in range(linear.slots):
            for first in range(0, int(ranks[s, slot]), linear.page_rows):
                rows = min(linear.page_rows, int(ranks[s, slot]) - first)
                page = int(table[slot, first // linear.page_rows]) * linear.page_stride
                a_at, b_at = page + linear.a_offsets[s], page + linear.b_offsets[s]
                a[slot, 0, first : first + rows] = arena[a_at : a_at + rows * linear.in_size].view(rows, -1)
                b[slot, 0, :, first : first + rows] = arena[b_at : b_at + rows * size].view(rows, -1).T
        stacked_a.append(a)
        stacked_b.append(b)
    return stacked_a, stacked_b
