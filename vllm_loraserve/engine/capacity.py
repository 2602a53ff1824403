"""What this instance can hold, from vLLM's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.coordinator.messages import Capacity, PageGroup

_PLAIN_DENSE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("smollm3", "granite", "olmo2", "starcoder2", "cohere"),
)
"""Model types whose decoder layers are q/k/v/o projections and a gated MLP with these names. What a rank row of others
takes is not reckoned here."""


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Modules that vLLM runs as one layer, and whose rank rows so lie in the same pages."""
_ROW_PARALLEL = ("o_proj", "down_proj", "c_proj")

GIB = 1 << 30


def module_shapes(hf_config: Any) -> dict[str, tuple[int, int]]:
    """Module suffix -> (in, out) features, unsharded; empty for model types that are not plain dense decoders."""
    if getattr(hf_config, "model_type", None) not in _PLAIN_DENSE:
        return {}
    hidden, heads = hf_config.hidden_size, hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    head = getattr(hf_config, "head_dim", None) or hidden // heads
    shapes = {
        "q_proj": (hidden, heads * head),
        "k_proj": (hidden, kv_heads * head),
        "v_proj": (hidden, kv_heads * head),
        "o_proj": (heads * head, hidden),
    }
    inner = hf_config.intermediate_size
    if hf_config.model_type == "starcoder2":
        return shapes | {"c_fc": (hidden, inner), "c_proj": (inner, hidden)}
    return shapes | {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}


def page_groups(
    shapes: dict[str, tuple[int, int]], layers: int, element_bytes: int, tp: int, targets: Sequence[str] | None = None
) -> tuple[PageGroup, ...]:
    """The groups of pages of `tp` workers together; empty when the shapes are not known.

    A column-parallel layer has A whole on every worker and its share of B, a row-parallel one the reverse. `targets`:
    vLLM's --lora-target-modules; other layers have no pages.
    """

    def row(suffix: str) -> int:
        inner, outer = shapes[suffix]
        return inner + tp * outer if suffix in _ROW_PARALLEL else tp * inner + outer

    fused = {name: parts for name, parts in _FUSED.items() if shapes.keys() >= set(parts)}
    in_layers = {part for parts in fused.values() for part in parts}
    alone = {suffix: (suffix,) for suffix in shapes if suffix not in in_layers}
    return tuple(
        PageGroup(modules=modules, row_bytes=sum(map(row, modules)) * layers * element_bytes)
        for name, modules in (fused | alone).items()
        if targets is None or not {name, *modules}.isdisjoint(targets)
    )


def capacity_of(vllm_config: Any, config: LoRAServeConfig, shapes: dict[str, tuple[int, int]]) -> Capacity:
    """What to register: the configured memory, else that of `max_loras` (arena) and `max_cpu_loras` (host) adapters
    of `max_lora_rank`."""
    lora, cache, model = vllm_config.lora_config, vllm_config.cache_config, vllm_config.model_config
    scheduler = vllm_config.scheduler_config
    layers = getattr(model.hf_text_config, "num_hidden_layers", 0)
    tp = vllm_config.parallel_config.tensor_parallel_size
    targets = getattr(lora, "target_modules", None)
    groups = page_groups(shapes, layers, getattr(lora.lora_dtype, "itemsize", 2), tp, targets)
    row = sum(group.row_bytes for group in groups)
    rank_rows = lora.max_loras * lora.max_lora_rank
    if config.arena_rank_rows is not None:
        rank_rows = config.arena_rank_rows
    elif config.arena_gib is not None and row:
        rank_rows = int(config.arena_gib * GIB) * tp // row
    # Over several machines the scheduler counts slots alone, so that each adapter has its part of the arena.
    parts = lora.max_loras if getattr(vllm_config.parallel_config, "nnodes", 1) > 1 else 1
    host_bytes = (lora.max_cpu_loras or lora.max_loras) * lora.max_lora_rank * row
    return Capacity(
        slots=lora.max_loras,
        rank_rows=rank_rows,
        host_bytes=host_bytes if config.host_gib is None else int(config.host_gib * GIB) * tp,
        host_adapters=lora.max_cpu_loras or lora.max_loras,
        device=_device_name(vllm_config),
        tensor_parallel=tp,
        kv_tokens=(cache.num_gpu_blocks or 0) * (cache.block_size or 0),
        # Pages know no --max-lora-rank; an adapter only has to fit the arena.
        max_rank=min(config.max_rank, rank_rows // parts),
        max_model_len=model.max_model_len,
        dtype=str(model.dtype).removeprefix("torch."),
        max_batched_tokens=scheduler.max_num_batched_tokens,
        max_seqs=scheduler.max_num_seqs,
        page_rows=config.page_rows,
        page_groups=groups,
        kernels=f"rank-aware {vllm_config.device_config.device_type}",
    )


def with_arena(capacity: Capacity, rank_rows: int) -> Capacity:
    """The same where the workers say that their arena has so many rows: `arena_share` may have left fewer."""
    if rank_rows >= capacity.rank_rows:
        return capacity
    return msgspec.structs.replace(capacity, rank_rows=rank_rows, max_rank=min(capacity.max_rank, rank_rows))


def _device_name(vllm_config: Any) -> str:
    from vllm.platforms import current_platform

    try:
        return str(current_platform.get_device_name())
    except Exception:  # platforms without a name raise what they like
        return str(vllm_config.device_config.device_type)
