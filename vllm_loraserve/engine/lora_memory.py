"""What LoRA takes of this worker's memory, from vLLM's own shapes and flags: layout, scratch, and the log line.

The layers' stacked weights are shaped by vLLM's code (on the meta device, see `paged_layers.py`), so the comparison
with stock is exact and not a formula of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_loraserve.adapters.layout import Layout, build_layout
from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine.paged_layers import module_shape
from vllm_loraserve.memory.arena import Arena

logger = init_logger("vllm.loraserve.lora_manager")


def worker_layout(
    paged: Mapping[str, Any], wrappers: Mapping[str, Any], vllm_config: VllmConfig, page_rows: int
) -> Layout:
    """The pages' layout for these layers (runtime name -> layer) as this worker shards them.

    `wrappers`: prefix -> Punica wrapper. Layers of different wrappers (a language model and its vision tower) see
    different tokens in a step, so they never share a group.
    """
    some = next(iter(paged.values()), None)
    prefixes = {id(wrapper): prefix for prefix, wrapper in wrappers.items()}
    shapes = []
    for name, layer in paged.items():
        group = name.rsplit(".", 1)[-1]
        if len(prefixes) > 1:
            group = f"{prefixes[id(layer.punica_wrapper)]}:{group}"
        shapes.append(module_shape(name, layer, group))
    architectures = getattr(vllm_config.model_config, "architectures", None) or []
    assert vllm_config.lora_config is not None
    return build_layout(
        shapes,
        model="+".join(architectures),
        dtype=str(vllm_config.lora_config.lora_dtype).removeprefix("torch."),
        page_rows=page_rows,
        tp_rank=some.tp_rank if some is not None else 0,
        tp_size=some.tp_size if some is not None else 1,
    )


def most_arena_bytes(options: LoRAServeConfig, device: torch.device) -> int | None:
    """What `arena_share` leaves an arena of `arena_rank_rows`; None: no bound."""
    if options.arena_share is None or device.type != "cuda":
        return None
    return int(options.arena_share * torch.cuda.get_device_properties(device).total_memory)


class ScratchReserve:
    """On a GPU: the memory of the largest LoRA step, held while vLLM measures what the model takes.

    vLLM measures with dummy adapters of rank 8, or without any, so that the fp32 results between shrink and expand of a
    prefill at `max_rank` would come out of what it then gives to the KV cache. Held in the first warm-up only, which is
    that measurement; later ones find the KV cache in place.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.device = nbytes, device
        self.held: torch.Tensor | None = None
        self._done = False

    def hold(self) -> None:
        if not self._done:
            self._done = True
            self.held = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)

    def release(self) -> None:
        self.held = None


def scratch_bytes(layout: Layout, max_rank: int, arena_rows: int, max_tokens: int) -> int:
    """Bytes of the fp32 results between shrink and expand in the largest step: all tokens at the largest rank that the
    arena can hold (in whole blocks of 16), in the layer of most slices. Large batches are not split along K."""
    slices = Counter(place.module for group in layout.groups for place in group.places)
    rank = -(-min(max_rank, arena_rows) // 16) * 16
    return max(slices.values(), default=0) * max_tokens * rank * 4


def log_arena(arena: Arena, slots: int, stock_bytes: int, lora_config: Any) -> None:
    """Says what the arena takes, and what stock takes for the same flags."""
    if not arena.layout.groups:
        logger.warning(
            "No LoRA layer of this model lies in pages%s: all of them keep vLLM's stacks, padded to --max-lora-rank %d",
            " because of --fully-sharded-loras" if lora_config.fully_sharded_loras else "",
            lora_config.max_lora_rank,
        )
        return
    logger.info(
        "LoRA arena: %.3f GiB for %d rank rows (%d pages of %d rows in %d module groups) and %d slots; stock "
        "vLLM takes %.3f GiB for --max-loras %d --max-lora-rank %d",
        arena.nbytes / 2**30,
        arena.rank_rows,
        arena.pages_per_group,
        arena.layout.page_rows,
        len(arena.layout.groups),
        slots,
        stock_bytes / 2**30,
        slots,
        lora_config.max_lora_rank,
    )
