"""One LoRA linear layer on the GPU: plan the two launches, then run shrink and expand back to back.

`plan_launch` is pure and is what the cost count reads; `lora_linear` runs it. Triton is imported on first
use, so that this module loads on an installation without Triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vllm_loraserve.kernels.metadata import StepMetadata, StepPlan, tile_bound
from vllm_loraserve.kernels.paged import PagedLinear
from vllm_loraserve.kernels.tuning import (
    DeviceShape,
    LaunchConfig,
    cdiv,
    choose,
    expand_grid,
    shrink_grid,
)


@dataclass(frozen=True)
class Launch:
    """Both launches of one layer: variants, grids and the shape of the fp32 planes between them."""

    config: LaunchConfig
    shrink_programs: int
    expand_programs: int
    column_blocks: int
    planes: tuple[int, int, int, int]
    """[slices, split_k, rows, rank columns] of the partial sums."""


@functools.cache
def device_shape(device: torch.device) -> DeviceShape:
    """SM count of a CUDA device; elsewhere (interpreter tests) a device so small that every program has
    several works."""
    if device.type == "cuda":
        return DeviceShape(sms=torch.cuda.get_device_properties(device).multi_processor_count)
    return DeviceShape(sms=2, ctas_per_sm=2)


def plan_launch(
    linear: PagedLinear,
    plan: StepPlan,
    tokens: int,
    device: DeviceShape,
    *,
    graph_tokens: int,
    batch_invariant: bool = False,
    config: LaunchConfig | None = None,
) -> Launch:
    """Choose variants and grids for `tokens` rows of x.

    Up to `graph_tokens` rows everything follows from `tokens` and from capacities alone, since a CUDA graph
    captured now serves other batches later. Above, the launch is made to measure. `config` overrides the
    choice (tuning).
    """
    fixed = tokens <= graph_tokens
    if fixed:
        tiles = tile_bound(tokens, linear.slots, plan.block_m)
        items = tiles * cdiv(linear.max_rank, plan.block_r)
        expected = cdiv(tokens, plan.block_m)
        top_rank, rows = linear.max_rank, tokens
    else:
        tiles, items = plan.n_tiles, plan.n_items
        expected, top_rank, rows = items, plan.top_rank, plan.n_sorted
    if batch_invariant:
        top_rank = linear.max_rank
    if config is None:
        config = choose(
            k=linear.in_size,
            n_slices=linear.n_slices,
            block_m=plan.block_m,
            block_r=plan.block_r,
            items=expected,
            top_rank=top_rank,
            device=device,
            aligned=linear.aligned,
            batch_invariant=batch_invariant,
        )
    elif (config.block_m, config.block_r) != (plan.block_m, plan.block_r):
        raise ValueError(
            f"the plan was made for blocks of {plan.block_m} tokens x {plan.block_r} rank rows, "
            f"the given configuration has {config.block_m} x {config.block_r}"
        )
    column_blocks = linear.column_blocks[config.block_n].shape[0]
    return Launch(
        config=config,
        shrink_programs=shrink_grid(config, linear.n_slices, items, device),
        expand_programs=expand_grid(column_blocks, tiles, device),
        column_blocks=column_blocks,
        planes=(linear.n_slices, config.split_k, rows, cdiv(top_rank, 16) * 16),
    )


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    linear: PagedLinear,
    metadata: StepMetadata,
    *,
    add_inputs: bool = True,
    config: LaunchConfig | None = None,
    planes: torch.Tensor | None = None,
) -> None:
    """y[t, slice] += x[t] @ A^T @ B^T with the adapter of token t, for every token that has one; in place.

    y [tokens, sum(out_sizes)] and x [tokens, in_size] of the arena's dtype, last dimension contiguous. Rows
    beyond the batch that `metadata` describes (padding of a CUDA graph), base-model rows and slices that an
    adapter lacks are not touched. With `add_inputs=False` the LoRA part alone is written to the rows and
    slices that have one. `config` and `planes` (a buffer for the partial sums) are for tuning and tests.
    """
    plan = metadata.plan
    # A batch without any adapter launches nothing, as in vLLM. In the captured regime a batch whose adapters
    # are merely empty (the dummies of the warm-up) must launch: the graph recorded now serves real adapters
    # later.
    if plan.n_sorted == 0 or (plan.n_items == 0 and x.shape[0] > metadata.graph_tokens):
        return
    _check(y, x, linear, metadata)
    launch = plan_launch(
        linear,
        plan,
        x.shape[0],
        device_shape(x.device),
        graph_tokens=metadata.graph_tokens,
        batch_invariant=metadata.batch_invariant,
        config=config,
    )
    if planes is None:
        planes = torch.empty(launch.planes, dtype=torch.float32, device=x.device)
    run_shrink(planes, x, linear, plan, launch)
    run_expand(y, planes, linear, plan, launch, add_inputs=add_inputs)


def _check(y: torch.Tensor, x: torch.Tensor, linear: PagedLinear, metadata: StepMetadata) -> None:
    plan, tokens = metadata.plan, x.shape[0]
    if x.shape[1:] != (linear.in_size,) or y.shape != (tokens, sum(linear.out_sizes)):
        raise ValueError(
            f"LoRA layer {linear.name!r} takes x [tokens, {linear.in_size}] and "
            f"y [tokens, {sum(linear.out_sizes)}], got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.dtype != linear.arena.dtype or y.dtype != linear.arena.dtype:
        raise ValueError(
            f"LoRA layer {linear.name!r} holds {linear.arena.dtype} pages, got x of {x.dtype} and y of {y.dtype}"
        )
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"LoRA layer {linear.name!r} needs x and y with a contiguous last dimension")
    if tokens < plan.n_tokens:
        raise ValueError(
            f"LoRA layer {linear.name!r} got {tokens} rows, but the step's mapping has {plan.n_tokens} tokens"
        )
    if tokens > metadata.graph_tokens and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"cannot capture a CUDA graph of {tokens} tokens: the LoRA step metadata was laid out for graphs "
            f"of up to {metadata.graph_tokens}; give it the largest capture size as graph_tokens"
        )


def run_shrink(planes: torch.Tensor, x: torch.Tensor, linear: PagedLinear, plan: StepPlan, launch: Launch) -> None:
    """planes[slice, split, position, n] = the split's part of x @ A^T; live positions and rank rows only."""
    from vllm_loraserve.kernels.triton_shrink import shrink_kernel

    config = launch.config
    shrink_kernel[(launch.shrink_programs,)](
        x,
        linear.arena,
        linear.page_table,
        linear.ranks,
        linear.handle,
        plan.header,
        plan.perm,
        plan.items,
        planes,
        linear.in_size,
        x.stride(0),
        linear.page_stride,
        linear.page_table.stride(0),
        linear.ranks.stride(0),
        planes.shape[2],
        planes.shape[3],
        config.split_k.bit_length() - 1,
        N_SLICES=linear.n_slices,
        PAGE_ROWS=linear.page_rows,
        BLOCK_M=config.block_m,
        BLOCK_R=config.block_r,
        BLOCK_K=config.block_k,
        EVEN_K=linear.in_size % config.block_k == 0,
        ALIGNED=linear.aligned,
        DEPENDENT_LAUNCH=config.dependent_launch,
        num_warps=config.shrink_warps,
        num_stages=config.shrink_stages,
    )


def run_expand(
    y: torch.Tensor,
    planes: torch.Tensor,
    linear: PagedLinear,
    plan: StepPlan,
    launch: Launch,
    *,
    add_inputs: bool,
) -> None:
    """y (+)= sum over splits of planes @ B^T; live tokens and slices of rank > 0 only."""
    from vllm_loraserve.kernels.triton_expand import expand_kernel

    config = launch.config
    expand_kernel[(launch.expand_programs,)](
        y,
        planes,
        linear.arena,
        linear.page_table,
        linear.ranks,
        linear.handle,
        linear.column_blocks[config.block_n],
        plan.header,
        plan.perm,
        plan.tiles,
        launch.column_blocks,
        y.stride(0),
        linear.page_stride,
        linear.page_table.stride(0),
        linear.ranks.stride(0),
        planes.shape[2],
        planes.shape[3],
        PAGE_ROWS=linear.page_rows,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_RANK=config.block_rank,
        SPLIT_K=config.split_k,
        PLANES=config.expand_planes,
        ADD_INPUTS=add_inputs,
        ALIGNED=linear.aligned,
        EARLY_Y=config.expand_early_y,
        DEPENDENT_LAUNCH=config.dependent_launch,
        num_warps=config.expand_warps,
        num_stages=config.expand_stages,
        # Not every backend of Triton knows the option.
        **({"launch_pdl": True} if config.dependent_launch else {}),
    )
