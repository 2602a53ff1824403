"""The host tier's memory: how much, and where the KV cache is in the same memory, that both fit."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from vllm_loraserve import cgroup
from vllm_loraserve.adapters.layout import Layout
from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.memory import extension
from vllm_loraserve.memory.host_tier import HostTier
from vllm_loraserve.memory.slab import HostSlab

logger = init_logger("vllm.loraserve.lora_manager")

WARM_ADAPTERS = 2
"""The host tier's memory for so many adapters of --max-lora-rank is touched ahead of use."""


def host_tier_bytes(options: LoRAServeConfig, layout: Layout, lora_config: Any) -> int:
    """Bytes of the host tier: `host_gib`, or as many adapters as `--max-cpu-loras` at the rank that the flags name and
    one of the largest rank."""
    if options.host_gib is not None:
        return int(options.host_gib * 2**30)
    count = lora_config.max_cpu_loras or lora_config.max_loras
    usual = layout.uniform_pages(lora_config.max_lora_rank)
    largest = layout.uniform_pages(options.max_rank)
    return (count + 1) * (layout.size_bytes(usual) + 4096) + layout.size_bytes(largest)


def make_host_tier(options: LoRAServeConfig, layout: Layout, vllm_config: Any, on_cpu: bool) -> HostTier:
    """The worker's host tier; `on_cpu`: its KV cache is host memory too.

    Where vLLM gives the KV cache what this process has not taken, the tier's memory is taken now (and beside a GPU,
    where the extension page-locks it); else page by page, as adapters come. A machine that has less than the two need
    is named in the log, and in the first case in a ValueError.
    """
    lora, cache = vllm_config.lora_config, vllm_config.cache_config
    budget = max(host_tier_bytes(options, layout, lora), 4096)
    measured = on_cpu and cache.kv_cache_memory_bytes is None
    kv_bytes = cache.kv_cache_memory_bytes or 0 if on_cpu else 0
    problem = shortage(budget, kv_bytes, vllm_config.parallel_config.local_world_size, cgroup.available_memory())
    if problem is not None:
        if measured:
            raise ValueError(problem)
        logger.warning("%s", problem)
    tier = HostTier(
        layout, budget, max_adapters=lora.max_cpu_loras, slab=HostSlab(budget, populate=True) if measured else None
    )
    if not on_cpu and not tier.slab.granted & extension.PINNED:
        logger.warning(
            "The host tier is not page-locked (see `vllm-loraserve doctor`): the engine waits for each adapter that it "
            "copies to the GPU in a step."
        )
    if not measured:
        tier.warm(WARM_ADAPTERS * layout.size_bytes(layout.uniform_pages(lora.max_lora_rank)))
    return tier


def shortage(budget: int, kv_bytes: int, workers: int, available: int) -> str | None:
    """Why host tiers of `budget` bytes and KV caches of `kv_bytes` don't fit into `available` bytes of host memory, in
    one sentence; None: they do."""
    needed = workers * (budget + kv_bytes)
    if needed <= available:
        return None
    parts = [f"{workers * budget / 2**30:.2f} GiB of host tier"]
    if kv_bytes:
        parts.append(f"{workers * kv_bytes / 2**30:.2f} GiB of KV cache")
    asked = " and ".join(parts) + (f" ({workers} workers)" if workers > 1 else "")
    return (
        f"{asked} are more than the {available / 2**30:.2f} GiB of host memory that are left; lower "
        f"--loraserve-config.host_gib or --max-cpu-loras{', or the KV cache' if kv_bytes else ''}."
    )
