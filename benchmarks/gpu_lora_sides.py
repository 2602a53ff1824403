"""The compared sides of the GPU kernel benchmark: vLLM's own Triton kernels and ours, on the same adapters and batch.

A side owns several distinct sets of weights, as a model has many layers, so that a timed run over all sets finds its
weights in device memory and not in the L2 cache. Nothing here depends on a GPU: on CPU tensors the same code runs
interpreted, which is how its logic is tested.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_loraserve.kernels.cost import Batch, LayerShape
from vllm_loraserve.kernels.lora_linear import device_shape, plan_launch, run_expand, run_shrink
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.paged import PagedLinear
from vllm_loraserve.kernels.stock_sources import configured
from vllm_loraserve.kernels.synthetic import padded_weights, synthetic_linear
from vllm_loraserve.kernels.tuning import ENGINE_MAX_RANK, GRAPH_TOKENS, LaunchConfig

STOCK_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` takes."""


def inputs(
    layer: LayerShape, batch: Batch, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of one step; y stays in the L2 cache, as behind a base GEMM."""
    generator = torch.Generator(device=device).manual_seed(1)
    tokens = len(batch.token_slots)
    x = torch.randn(tokens, layer.in_size, generator=generator, device=device).to(dtype)
    y = torch.randn(tokens, sum(layer.out_sizes), generator=generator, device=device).to(dtype)
    return x, y


def weight_sets(layer: LayerShape, batch: Batch, stock_slots: int, *, most: int, budget_bytes: float) -> int:
    """How many sets of stock weights fit the budget: `most` when they do, at least 2."""
    stock = stock_slots * batch.max_rank * sum(layer.in_size + size for size in layer.out_sizes) * 2
    return max(2, min(most, int(budget_bytes // stock)))


class Ours:
    """The rank-aware kernels. `config` and `blocks` override the formulas (sweep)."""

    name = "ours"

    def __init__(
        self,
        layer: LayerShape,
        batch: Batch,
        sets: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        linears: list[PagedLinear] | None = None,
        config: LaunchConfig | None = None,
        blocks: tuple[int, int] | None = None,
        graph_tokens: int = GRAPH_TOKENS,
    ) -> None:
        self.linears = linears or [make_linear(layer, batch, device, dtype, seed) for seed in range(sets)]
        self.metadata = StepMetadata(
            slots=len(batch.slot_ranks),
            max_rank=self.linears[0].max_rank,
            graph_tokens=graph_tokens,
            device=device,
            blocks=blocks,
        )
        for slot, rank in enumerate(batch.slot_ranks):
            self.metadata.set_slot_rank(slot, rank)
        self.plan = self.metadata.build(np.asarray(batch.token_slots, np.int32))
        self.launch = plan_launch(
            self.linears[0],
            self.plan,
            len(batch.token_slots),
            device_shape(device),
            graph_tokens=graph_tokens,
            config=config,
        )

    def call(self, index: int, y: torch.Tensor, x: torch.Tensor) -> None:
        linear = self.linears[index]
        planes = torch.empty(self.launch.planes, dtype=torch.float32, device=x.device)
        run_shrink(planes, x, linear, self.plan, self.launch)
        run_expand(y, planes, linear, self.plan, self.launch, add_inputs=True)


class Stock:
    """vLLM's lora_shrink and lora_expand, zero-padded to `rank`; `shrink` and `expand` override block sizes."""

    def __init__(
        self,
        stock: SimpleNamespace,
        layer: LayerShape,
        batch: Batch,
        sets: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        name: str,
        specialised: bool = False,
        rank: int | None = None,
        weights: list[tuple[list[torch.Tensor], list[torch.Tensor]]] | None = None,
        shrink: dict[str, int] | None = None,
        expand: dict[str, int] | None = None,
    ) -> None:
        self.name, self.stock, self.rank = name, stock, rank or batch.max_rank
        self.overrides = {"shrink": shrink or {}, "expand": expand or {}}
        self.weights = weights or [
            random_weights(layer, len(batch.slot_ranks), self.rank, device, dtype) for _ in range(sets)
        ]
        tokens = len(batch.token_slots)
        meta = stock.LoRAKernelMeta.make(len(batch.slot_ranks), tokens, device=device)
        meta.prepare_tensors(torch.tensor(batch.token_slots, device=device))
        self.args = meta.meta_args(tokens, specialised)
        self.n_slices = len(layer.out_sizes)

    def call(self, index: int, y: torch.Tensor, x: torch.Tensor) -> None:
        buffer = torch.empty((self.n_slices, x.shape[0], self.rank), dtype=torch.float32, device=x.device)
        with configured(self.stock, lambda op, config: config | self.overrides[op]):
            self.shrink(index, buffer, x)
            self.expand(index, y, buffer)

    def shrink(self, index: int, buffer: torch.Tensor, x: torch.Tensor) -> None:
        self.stock.lora_shrink(x, self.weights[index][0], buffer, *self.args, 1.0)

    def expand(self, index: int, y: torch.Tensor, buffer: torch.Tensor) -> None:
        self.stock.lora_expand(buffer, self.weights[index][1], y, *self.args, offset_start=0, add_inputs=True)

    def with_blocks(self, name: str, shrink: dict[str, int], expand: dict[str, int]) -> Stock:
        """The same weights and metadata with other block sizes."""
        other = object.__new__(Stock)
        other.__dict__ = self.__dict__ | {"name": name, "overrides": {"shrink": shrink, "expand": expand}}
        return other


def make_linear(
    layer: LayerShape, batch: Batch, device: torch.device, dtype: torch.dtype, seed: int, *, poison: bool = False
) -> PagedLinear:
    return synthetic_linear(
        in_size=layer.in_size,
        out_sizes=layer.out_sizes,
        ranks=[list(batch.slot_ranks)] * len(layer.out_sizes),
        max_rank=ENGINE_MAX_RANK,
        dtype=dtype,
        device=device,
        seed=seed,
        poison=poison,
        name=layer.name,
    )


def random_weights(
    layer: LayerShape, slots: int, rank: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Stock's stacked A [slots, 1, rank, in] and B [slots, 1, out, rank] of every slice (for timing: no zeros)."""

    def fill(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_().mul_(layer.in_size**-0.5)

    a = [fill(slots, 1, rank, layer.in_size) for _ in layer.out_sizes]
    return a, [fill(slots, 1, size, rank) for size in layer.out_sizes]


def stock_rank_for(batch: Batch) -> int:
    """The smallest `--max-lora-rank` that takes the adapters of this batch."""
    used = max(rank for slot, rank in enumerate(batch.slot_ranks) if slot in batch.token_slots)
    return min(rank for rank in STOCK_RANKS if rank >= used)


def shrink_sweep(tokens: int) -> Iterator[dict[str, int]]:
    """A small sweep of stock's shrink blocks around those that its tuned tables use."""
    decode = tokens < 128
    for block_k, split_k in (
        ((256, 4), (128, 8), (256, 8), (256, 16)) if decode else ((64, 1), (64, 2), (64, 4), (128, 2))
    ):
        for block_n, warps in ((16, 4), (32, 4), (64, 4)):
            yield {
                "block_m": 16 if decode else 64,
                "block_n": block_n,
                "block_k": block_k,
                "split_k": split_k,
                "num_warps": warps,
                "num_stages": 3,
            }


def expand_sweep(tokens: int, rank: int) -> Iterator[dict[str, int]]:
    """The same for expand."""
    block_k = max(16, min(64, rank))
    heights = (16, 32) if tokens < 128 else (64, 128)
    for (block_m, warps), block_n in itertools.product(zip(heights, (4, 8), strict=True), (64, 128, 256)):
        yield {"block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps, "num_stages": 2}


Axis = Callable[[LaunchConfig], list[LaunchConfig]]
"""Candidates around a configuration that differ from it in one group of sizes."""


def sweep_axes(in_size: int, tokens: int, *, dependent_launch: bool) -> tuple[Axis, ...]:
    """Sizes to try for ours, group by group, in this order: the groups hang together only loosely, and all combinations
    would take hours. `dependent_launch`: the device can do it."""
    decode = tokens <= GRAPH_TOKENS
    blocks = ((16, 16), (32, 16), (16, 32)) if decode else ((64, 64), (64, 32), (128, 64), (32, 32))

    def vary(config: LaunchConfig, names: tuple[str, ...], choices: Iterable[tuple[int, ...]]) -> list[LaunchConfig]:
        return [dataclasses.replace(config, **dict(zip(names, choice, strict=True))) for choice in choices]

    def tile(config: LaunchConfig) -> list[LaunchConfig]:
        return vary(config, ("block_m", "block_r"), blocks)

    def shrink_loop(config: LaunchConfig) -> list[LaunchConfig]:
        steps = ((64, 4), (64, 6), (128, 3), (128, 4), (128, 6), (128, 8), (256, 2), (256, 3), (256, 4))
        return vary(config, ("block_k", "shrink_stages"), steps)

    def splits(config: LaunchConfig) -> list[LaunchConfig]:
        most = max(1, in_size // config.block_k)
        around = {1, config.split_k // 2, config.split_k, config.split_k * 2} | ({32} if decode else set())
        pairs = [(split, planes) for split in sorted(around) for planes in (1, 4, 8, 16) if planes <= split <= most]
        return vary(config, ("split_k", "expand_planes"), pairs)

    def expand_tile(config: LaunchConfig) -> list[LaunchConfig]:
        return vary(
            config, ("block_n", "block_rank", "expand_warps"), itertools.product((64, 128, 256), (16, 32, 64), (4, 8))
        )

    def overlap(config: LaunchConfig) -> list[LaunchConfig]:
        both = itertools.product((False, True), (False, True) if dependent_launch else (False,))
        return vary(config, ("expand_early_y", "dependent_launch"), both)

    return tile, shrink_loop, splits, expand_tile, overlap


def errors_against_reference(
    stock: SimpleNamespace,
    layer: LayerShape,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    graph_tokens: int = GRAPH_TOKENS,
) -> dict[str, Any]:
    """Largest error of both sides against float64 on NaN-poisoned pages, relative to the largest output."""
    from vllm_loraserve.kernels.paged import reference_linear

    linear = make_linear(layer, batch, device, dtype, seed=3, poison=True)
    x, y = inputs(layer, batch, device, dtype)
    slots = torch.tensor(batch.token_slots)
    expected = reference_linear(y, x, linear, slots)
    scale = float(expected.abs().max())
    ours, theirs = y.clone(), y.clone()
    Ours(layer, batch, 1, device, dtype, linears=[linear], graph_tokens=graph_tokens).call(0, ours, x)
    stock.forget_addresses()
    weights = [padded_weights(linear, batch.max_rank)]
    Stock(stock, layer, batch, 1, device, dtype, name="stock", weights=weights).call(0, theirs, x)
    base = slots < 0
    return {
        "layer": layer.name,
        "batch": batch.name,
        "dtype": str(dtype).removeprefix("torch."),
        "ours": float((ours.cpu().double() - expected).abs().max()) / scale,
        "stock": float((theirs.cpu().double() - expected).abs().max()) / scale,
        "base_rows_unchanged": bool(torch.equal(ours.cpu()[base], y.cpu()[base])),
    }
