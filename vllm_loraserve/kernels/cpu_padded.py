"""Grouped LoRA operations over vLLM's padded, stacked tensors, in plain torch.

For the layers that keep vLLM's own storage (embedding, lm_head, fully sharded layers) on a CPU. vLLM's
versions gather a padded matrix for every token, and index -1 (base model) selects the last slot; these visit
each adapter once and never a base token.
"""

from collections.abc import Sequence

import torch

from vllm_loraserve.kernels.grouping import TokenGroups


def _matrix(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    """The matrix of `slot` in `[slots, rows, columns]` or `[slots, 1, rows, columns]`."""
    matrix = stacked[slot]
    return matrix[0] if matrix.dim() == 3 else matrix


def shrink(
    out: torch.Tensor, x: torch.Tensor, a_stacked: torch.Tensor, groups: TokenGroups, scale: float = 1.0
) -> None:
    """`out[t, :R] = scale * x[t] @ A[slot(t)].T` for grouped tokens; other rows of `out` stay.

    out fp32 [tokens, >= R], x [tokens, in], a_stacked [slots, 1, R, in].
    """
    for slot, rows in groups:
        a = _matrix(a_stacked, slot)
        part = x[rows].to(a.dtype) @ a.T
        out[rows, : a.shape[0]] = part.to(out.dtype) * scale if scale != 1.0 else part.to(out.dtype)


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    b_stacked: torch.Tensor,
    groups: TokenGroups,
    *,
    start: int = 0,
    size: int | None = None,
    add_inputs: bool = True,
) -> None:
    """`y[t, start:start + size] (+)= h[t] @ B[slot(t)].T` for grouped tokens; other rows of `y` stay.

    y [tokens, >= start + size], h [tokens, R], b_stacked [slots, 1, out, R]. Without `size` the narrower of
    y and B decides: adapter and model may pad the vocabulary differently.
    """
    for slot, rows in groups:
        b = _matrix(b_stacked, slot)
        width = min(b.shape[0], y.shape[1] - start) if size is None else size
        part = (h[rows].to(b.dtype) @ b[:width].T).to(y.dtype)
        if add_inputs:
            y[rows, start : start + width] += part
        else:
            y[rows, start : start + width] = part


def linear(
    y: torch.Tensor,
    x: torch.Tensor,
    a_stacked: Sequence[torch.Tensor],
    b_stacked: Sequence[torch.Tensor],
    output_slices: Sequence[int],
    groups: TokenGroups,
    *,
    scale: float = 1.0,
    add_inputs: bool = True,
) -> None:
    """Shrink and expand of every slice: `y[t, slice] (+)= scale * x[t] @ A.T @ B.T` for grouped tokens."""
    for slot, rows in groups:
        rows_x, start = x[rows], 0
        for a_all, b_all, size in zip(a_stacked, b_stacked, output_slices, strict=True):
            a, b = _matrix(a_all, slot), _matrix(b_all, slot)
            part = (rows_x.to(a.dtype) @ a.T @ b.T).to(y.dtype)
            part = part * scale if scale != 1.0 else part
            if add_inputs:
                y[rows, start : start + size] += part
            else:
                y[rows, start : start + size] = part
            start += size
