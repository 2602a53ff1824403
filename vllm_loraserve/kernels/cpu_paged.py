"""LoRA of a paged linear layer in plain torch: what runs on a CPU where the native library is not built.

For each adapter of the batch its rank rows are gathered from the pages once, and multiplied with all of its
tokens. The native library (`cpu_native.py`) needs no gather; this one needs nothing.
"""

import ctypes

import torch

from vllm_loraserve.kernels.grouping import TokenGroups
from vllm_loraserve.kernels.paged import PagedLinear


def linear(
    y: torch.Tensor,
    x: torch.Tensor,
    layer: PagedLinear,
    groups: TokenGroups,
    *,
    add_inputs: bool = True,
) -> None:
    """`y[t, slice s] (+)= x[t] @ A_s.T @ B_s` for grouped tokens, at each adapter's own rank.

    y [tokens, sum(out_sizes)] and x [tokens, in_size], any float dtype; rows of other tokens stay. With
    `add_inputs=False` a grouped row is set to the LoRA part alone, in the slices that its adapter targets.
    """
    ranks = layer.ranks.tolist()
    dtype = layer.arena.dtype
    for slot, rows in groups:
        rows_x, start = x[rows].to(dtype), 0
        for index, size in enumerate(layer.out_sizes):
            rank = ranks[index][slot]
            if rank:
                pages = layer.page_table[slot, : -(-rank // layer.page_rows)].long()
                h = rows_x @ _rank_rows(layer, pages, layer.a_offsets[index], layer.in_size, rank).T
                part = (h @ _rank_rows(layer, pages, layer.b_offsets[index], size, rank)).to(y.dtype)
                if add_inputs:
                    y[rows, start : start + size] += part
                else:
                    y[rows, start : start + size] = part
            start += size


def _rank_rows(layer: PagedLinear, pages: torch.Tensor, offset: int, width: int, rank: int) -> torch.Tensor:
    """[rank, width], gathered from the pages."""
    if layer.page_stride != layer.page_elements:
        return torch.cat([_rows_at(layer, page, offset, width) for page in pages.tolist()])[:rank]
    n_pages = layer.arena.numel() // layer.page_stride
    every = layer.arena.as_strided(
        (n_pages, layer.page_rows, width),
        (layer.page_stride, width, 1),
        layer.arena.storage_offset() + offset,
    )
    return every[pages].view(-1, width)[:rank]


def _rows_at(layer: PagedLinear, page: int, offset: int, width: int) -> torch.Tensor:
    """[page_rows, width] of a page that may lie outside of the arena."""
    item = layer.arena.element_size()
    address = layer.arena.data_ptr() + (page * layer.page_stride + offset) * item
    raw = (ctypes.c_char * (layer.page_rows * width * item)).from_address(address)
    return torch.frombuffer(raw, dtype=layer.arena.dtype).view(layer.page_rows, width)
