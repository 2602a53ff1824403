"""What a LoRA linear layer costs, counted from the real launch metadata: programs, bytes, operations.

**A count, not a speed.** It follows every live program of the two launches as they would be made (vLLM's own op code
chooses its grid and block sizes; ours comes from `plan_launch`) and adds up what they read, write and multiply.
It knows nothing of caches, latency, occupancy or overlap. It is exact and the same everywhere, which is what makes
it useful to notice a change.

Counted for both sides alike:

- `launches`: kernels and memsets put on the stream; `programs`: thread blocks launched; `live_programs`: those that do
  work (ours: works taken from the list by persistent programs);
- `weight_bytes`: adapter bytes that must come from memory at least once; `issued_bytes`: all bytes that programs load
  and store, again for every program that asks for them (mostly L2 traffic);
- `flops`: multiply-adds issued, times two, masked lanes included; `useful_flops`: what the adapters' true ranks need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch

from vllm_loraserve.kernels.lora_linear import plan_launch
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.paged import PagedLinear
from vllm_loraserve.kernels.stock_sources import recorded
from vllm_loraserve.kernels.tuning import ENGINE_MAX_RANK, GRAPH_TOKENS, PLANE_COLUMNS, DeviceShape, cdiv

FP32 = 4
Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Cost:
    """See the module docstring; sums over any number of layers."""

    launches: int = 0
    programs: int = 0
    live_programs: int = 0
    weight_bytes: int = 0
    issued_bytes: int = 0
    flops: int = 0
    useful_flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: int) -> Cost:
        return Cost(**{name: value * times for name, value in asdict(self).items()})


@dataclass(frozen=True)
class LayerShape:
    """One LoRA linear layer of a worker's shard: inputs, outputs of each slice, how often the model has it."""

    name: str
    in_size: int
    out_sizes: tuple[int, ...]
    count: int = 1


@dataclass(frozen=True)
class Batch:
    """One step: the slot of each token (-1: base model) and the rank of each slot's adapter, in every module."""

    name: str
    token_slots: tuple[int, ...]
    slot_ranks: tuple[int, ...]
    max_rank: int
    """The rank that stock vLLM pads to."""

    @property
    def tokens_per_slot(self) -> Ints:
        slots = np.asarray(self.token_slots)
        return np.bincount(slots[slots >= 0], minlength=len(self.slot_ranks))

    def useful_flops(self, layer: LayerShape) -> int:
        rows = int((self.tokens_per_slot * np.asarray(self.slot_ranks)).sum())
        return 2 * rows * (layer.in_size * len(layer.out_sizes) + sum(layer.out_sizes))


def layout_only(layer: LayerShape, batch: Batch, *, page_rows: int = 8) -> PagedLinear:
    """The layer with real ranks, page numbers and the engine's room for ranks, but without an arena behind them."""
    offsets, at = [], 0
    for size in layer.out_sizes:
        offsets.append((at, at + page_rows * layer.in_size))
        at += page_rows * (layer.in_size + size)
    slots = len(batch.slot_ranks)
    pages = cdiv(ENGINE_MAX_RANK, page_rows)
    return PagedLinear(
        arena=torch.empty(0, dtype=torch.bfloat16),
        page_table=torch.arange(slots * pages, dtype=torch.int32).view(slots, pages),
        ranks=torch.tensor([batch.slot_ranks] * len(layer.out_sizes), dtype=torch.int32),
        page_stride=at,
        page_rows=page_rows,
        a_offsets=tuple(a for a, _ in offsets),
        b_offsets=tuple(b for _, b in offsets),
        in_size=layer.in_size,
        out_sizes=layer.out_sizes,
        name=layer.name,
    )


def metadata_of(batch: Batch, *, graph_tokens: int = GRAPH_TOKENS) -> StepMetadata:
    """The step metadata that the wrapper would have built for the batch."""
    metadata = StepMetadata(
        slots=len(batch.slot_ranks), max_rank=ENGINE_MAX_RANK, graph_tokens=graph_tokens, device="cpu"
    )
    for slot, rank in enumerate(batch.slot_ranks):
        metadata.set_slot_rank(slot, rank)
    metadata.build(np.asarray(batch.token_slots, np.int32))
    return metadata


def count_ours(layer: LayerShape, batch: Batch, device: DeviceShape, *, element_bytes: int = 2) -> Cost:
    """The rank-aware kernels' cost for one layer and one step."""
    return count_paged(layout_only(layer, batch), metadata_of(batch), len(batch.token_slots), device, element_bytes)


def count_paged(
    linear: PagedLinear, metadata: StepMetadata, tokens: int, device: DeviceShape, element_bytes: int = 2
) -> Cost:
    """Follow every work of both launches through the lists that the kernels walk."""
    plan = metadata.plan
    if plan.n_items == 0:
        return Cost()
    launch = plan_launch(linear, plan, tokens, device, graph_tokens=metadata.graph_tokens)
    config, k = launch.config, linear.in_size
    ranks = linear.ranks.cpu().numpy()
    items = plan.items[: plan.n_items].cpu().numpy().astype(np.int64)
    tiles = plan.tiles[: plan.n_tiles].cpu().numpy().astype(np.int64)
    k_issued = cdiv(k, config.block_k) * config.block_k
    cost = Cost(launches=2, programs=launch.shrink_programs + launch.expand_programs)
    for s, size in enumerate(linear.out_sizes):
        live = np.clip(ranks[s][items[:, 0]] - items[:, 3] * config.block_r, 0, config.block_r).astype(np.int64)
        some, length = live > 0, items[:, 2]
        loaded = (length[some].sum() + live[some].sum()) * k * element_bytes
        stored = config.split_k * (length * _plane_columns(live)).sum() * FP32
        works = int(some.sum())
        cost += Cost(
            live_programs=works * config.split_k,
            issued_bytes=int(loaded + stored),
            flops=2 * works * config.block_m * config.block_r * k_issued,
        )
        rank = ranks[s][tiles[:, 0]].astype(np.int64)
        some, length, blocks = rank > 0, tiles[:, 2], cdiv(size, config.block_n)
        weights = (rank * size).sum() * element_bytes
        partials = blocks * config.split_k * (_plane_columns(rank) * length).sum() * FP32
        outputs = 2 * length[some].sum() * size * element_bytes
        rank_issued = -(-rank[some] // config.block_rank) * config.block_rank
        cost += Cost(
            live_programs=int(some.sum()) * blocks,
            issued_bytes=int(weights + partials + outputs),
            flops=int(2 * blocks * config.block_m * config.block_n * rank_issued.sum()),
        )
        used = np.unique(tiles[:, 0])
        counts = np.bincount(tiles[:, 0], weights=tiles[:, 2], minlength=ranks.shape[1])[used].astype(np.int64)
        cost += Cost(
            weight_bytes=int(ranks[s][used].sum()) * (k + size) * element_bytes,
            useful_flops=int(2 * (counts * ranks[s][used]).sum() * (k + size)),
        )
    return cost


def _plane_columns(ranks: Ints) -> Ints:
    """Columns of a partial plane that these ranks write and read."""
    return -(-ranks // PLANE_COLUMNS) * PLANE_COLUMNS


def count_stock(
    stock: SimpleNamespace, layer: LayerShape, batch: Batch, *, specialised: bool = False, element_bytes: int = 2
) -> Cost:
    """vLLM's cost for the same step: its own op code is run up to the launch, and the launch is followed.

    specialised: vLLM's `specialize_active_lora`, which launches for the adapters present instead of `max_loras + 1`.
    """
    tokens, rank, slots = len(batch.token_slots), batch.max_rank, len(batch.slot_ranks)
    n_slices, k = len(layer.out_sizes), layer.in_size
    meta = stock.LoRAKernelMeta.make(slots, tokens, device="cpu")
    meta.prepare_tensors(torch.tensor(batch.token_slots))
    if bool(meta.no_lora_flag_cpu):
        return Cost()
    args = meta.meta_args(tokens, specialised)
    x, y = torch.empty(tokens, k, dtype=torch.bfloat16), torch.empty(tokens, sum(layer.out_sizes), dtype=torch.bfloat16)
    a = [torch.empty(slots, 1, rank, k, dtype=torch.bfloat16) for _ in layer.out_sizes]
    b = [torch.empty(slots, 1, size, rank, dtype=torch.bfloat16) for size in layer.out_sizes]
    buffer = torch.empty(n_slices, tokens, rank)
    with recorded(stock) as launches:
        stock.lora_shrink(x, a, buffer, *args, 1.0)
        stock.lora_expand(buffer, b, y, *args, offset_start=0, add_inputs=True)
    shrink, expand = launches
    ids = meta.active_lora_ids.numpy()
    active = ids >= 0
    counts = meta.num_tokens_per_lora.numpy()[active].astype(np.int64)
    memset = n_slices * tokens * rank * FP32
    cost = Cost(
        launches=3,
        programs=shrink.programs + expand.programs,
        issued_bytes=memset,
        weight_bytes=sum(int(active.sum()) * rank * (k + size) * element_bytes for size in layer.out_sizes),
        useful_flops=batch.useful_flops(layer),
    )
    cost += _stock_shrink(shrink.arguments, counts, k, rank, n_slices, element_bytes)
    return cost + _stock_expand(expand.arguments, counts, layer.out_sizes, rank, element_bytes)


def _stock_shrink(config: dict[str, int], counts: Ints, k: int, rank: int, n_slices: int, element_bytes: int) -> Cost:
    block_m, block_n, block_k, split = (config[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    tiles, rank_blocks = int((-(-counts // block_m)).sum()), cdiv(rank, block_n)
    works = tiles * rank_blocks * n_slices
    loaded = n_slices * (rank_blocks * int(counts.sum()) + tiles * rank) * k * element_bytes
    # Each split adds its tile atomically (a read and a write), also a split that owns no part of K.
    stored = 2 * n_slices * split * int(counts.sum()) * rank * FP32
    flops = 2 * works * block_m * block_n * cdiv(k, block_k) * block_k
    return Cost(live_programs=works * split, issued_bytes=loaded + stored, flops=flops)


def _stock_expand(
    config: dict[str, int], counts: Ints, out_sizes: Sequence[int], rank: int, element_bytes: int
) -> Cost:
    block_m, block_n, block_k = (config[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles, tokens, cost = int((-(-counts // block_m)).sum()), int(counts.sum()), Cost()
    for size in out_sizes:
        blocks = cdiv(size, block_n)
        cost += Cost(
            live_programs=tiles * blocks,
            issued_bytes=tiles * rank * size * element_bytes
            + blocks * tokens * rank * FP32
            + 2 * tokens * size * element_bytes,
            flops=2 * tiles * blocks * block_m * block_n * cdiv(rank, block_k) * block_k,
        )
    return cost
