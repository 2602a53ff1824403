"""Block sizes, split-K and grids of the rank-aware kernels: formulas, not tables.

A launch is described by the values below alone, so that the cost count, the tests and the launcher agree. The
formulas come from a roofline model of the H100 and from ahead-of-time compilation (registers, shared memory,
spills). Measured on an H100 before planes were loaded together (docs/kernels.md), **not yet tuned there**:
`benchmarks/gpu_lora_kernels.py --only sweep` prints what to change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GRAPH_BLOCK_M = 16
"""Tokens per tile in the regime that CUDA graphs capture: the least that `tl.dot` takes; decode has few per
adapter."""
GRAPH_BLOCK_R = 16
"""Rank rows per work item in that regime: a rank-8 adapter masks half a block, but reads only its own
rows."""
PREFILL_BLOCK_M = 64
EAGER_BLOCKS = ((GRAPH_BLOCK_M, GRAPH_BLOCK_R), (PREFILL_BLOCK_M, 16), (PREFILL_BLOCK_M, 32), (PREFILL_BLOCK_M, 64))
"""What `prefill_blocks` chooses among."""
SMALL_RANK = 16
"""Batches of ranks up to this take half as wide rank blocks in expand."""
GRAPH_TOKENS = 512
"""Default bound of that regime: vLLM captures batches up to 512 tokens unless told otherwise."""
INVARIANT_SPLIT_K = 8
"""Fixed partition of K when batch invariance is asked for: results must not depend on the size of the
batch."""
MAX_SPLIT_K = 16
ENGINE_MAX_RANK = 256
"""Rank that the engine's page tables have room for unless told otherwise (`LoRAServeConfig.max_rank`). Launches that a
CUDA graph captures follow from it and not from the adapters' ranks, so counts and timings take it too."""
MIN_K_PER_SPLIT = 512
PLANES_AT_ONCE = 8
"""Partial planes that expand loads together in decode; else it waits for them one after the other, each on a trip
through shared memory of its own. 16 take as many registers again."""
TALL_PLANES_AT_ONCE = 2
"""The same with tall tiles, where a plane takes four times the registers."""
PLANE_COLUMNS = 4
"""Rank columns of a partial plane that are written and read together, 16 bytes."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class DeviceShape:
    """What the grid formulas need of a device. The default is an H100 SXM."""

    sms: int = 132
    ctas_per_sm: int = 8

    @property
    def resident(self) -> int:
        """Programs that a persistent grid launches at most."""
        return self.sms * self.ctas_per_sm


@dataclass(frozen=True)
class LaunchConfig:
    """Everything that selects a compiled variant or a grid of shrink and expand for one launch."""

    block_m: int
    block_r: int
    block_k: int
    split_k: int
    """Programs that share K, a power of two."""
    shrink_warps: int
    shrink_stages: int
    block_n: int
    block_rank: int
    expand_warps: int
    expand_stages: int
    expand_planes: int = 1
    """Partial planes that expand loads at once: a power of two, at most `split_k`."""
    expand_early_y: bool = False
    """Expand loads its tile of y before the partial planes instead of after the product: one wait less in a row, for
    the registers that hold the tile meanwhile; not measured yet."""
    dependent_launch: bool = False
    """Programmatic dependent launch (compute capability 9.0 and later): expand starts while shrink still runs and reads
    what does not depend on it (lists, page table, B), then waits for it; not run yet."""

    def __post_init__(self) -> None:
        if self.split_k < 1 or self.split_k & (self.split_k - 1):
            raise ValueError(f"split_k={self.split_k} must be a power of two")
        planes = self.expand_planes
        if planes < 1 or planes & (planes - 1) or self.split_k % planes:
            raise ValueError(f"expand_planes={planes} must be a power of two up to split_k={self.split_k}")


def prefill_blocks(token_slots: npt.NDArray[np.int32], slot_ranks: npt.NDArray[np.int32]) -> tuple[int, int]:
    """(block_m, block_r) for a batch that runs eagerly: tall tiles when adapters have many tokens each, and
    rank blocks as wide as the batch's largest rank (16..64), because x is read once per rank block."""
    used = np.bincount(token_slots[token_slots >= 0], minlength=slot_ranks.size)
    active = used > 0
    if not active.any():
        return GRAPH_BLOCK_M, GRAPH_BLOCK_R
    mean = float(used.sum()) / int(active.sum())
    block_m = PREFILL_BLOCK_M if mean >= PREFILL_BLOCK_M else GRAPH_BLOCK_M
    top = int(slot_ranks[active].max(initial=1))
    block_r = 16 if top <= 16 else 32 if top <= 32 else 64
    return block_m, block_r if block_m == PREFILL_BLOCK_M else GRAPH_BLOCK_R


def split_k_for(k: int, items: int, device: DeviceShape, *, batch_invariant: bool = False) -> int:
    """How many programs share the K dimension of one item: enough to give every SM one, each with at least
    `MIN_K_PER_SPLIT` of K, a power of two (few compiled variants). More would be paid for in expand, which reads
    every plane again for each block of output columns."""
    most = min(MAX_SPLIT_K, max(1, k // MIN_K_PER_SPLIT))
    wanted = INVARIANT_SPLIT_K if batch_invariant else cdiv(device.sms, max(1, items))
    wanted = min(wanted, most)
    return 1 << (wanted.bit_length() - 1)


def choose(
    *,
    k: int,
    n_slices: int,
    block_m: int,
    block_r: int,
    items: int,
    top_rank: int,
    device: DeviceShape,
    aligned: bool = True,
    batch_invariant: bool = False,
) -> LaunchConfig:
    """The launch for a layer with `k` inputs.

    items: work items per slice that the launch expects (for a captured graph: the fewest tiles that a full
    batch can make); top_rank: the largest rank that it must be good at.
    """
    tall = block_m >= PREFILL_BLOCK_M
    split_k = split_k_for(k, items * n_slices, device, batch_invariant=batch_invariant)
    return LaunchConfig(
        block_m=block_m,
        block_r=block_r,
        # Rows off the 16-byte grid are loaded element by element: half the tile, twice the threads, no spills.
        block_k=(64 if aligned else 32) if tall else 128,
        split_k=split_k,
        shrink_warps=8 if tall and not aligned else 4,
        shrink_stages=4 if tall else 3,
        block_n=128,
        block_rank=16 if top_rank <= SMALL_RANK else 32,
        expand_warps=8 if tall else 4,
        # One stage: with the fp32 -> bf16 cast feeding the dot, a pipelined loop is what ptxas before 13.3 is
        # reported to miscompile on sm_90 (triton issue 9433); ranks up to `block_rank` have nothing to
        # overlap anyway.
        expand_stages=1,
        expand_planes=min(split_k, TALL_PLANES_AT_ONCE if tall else PLANES_AT_ONCE),
    )


def shrink_grid(config: LaunchConfig, n_slices: int, items: int, device: DeviceShape) -> int:
    """Programs of the shrink launch: one per (item, slice, split), at most what the device holds at once."""
    return max(1, min(items * n_slices * config.split_k, device.resident))


def expand_grid(column_blocks: int, tiles: int, device: DeviceShape) -> int:
    """Programs of the expand launch: one per (tile, block of output columns), at most what the device holds
    at once."""
    return max(1, min(tiles * column_blocks, device.resident))
