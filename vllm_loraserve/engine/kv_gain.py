"""What the arena leaves to the KV cache that stock vLLM's stacks would take, in tokens as vLLM itself counts them."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.loraserve.lora_manager")


def kv_cache_tokens(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, nbytes: int) -> int:
    """Tokens of KV cache in so many bytes of this worker's memory (below 0: that they cost), at the tokens per byte of
    the cache that vLLM has laid out: whatever its attention layers keep, and at requests of --max-model-len."""
    device = [tensor.size for tensor in kv_cache_config.kv_cache_tensors if not tensor.host_resident]
    if not device:
        return 0
    tokens, _ = get_kv_cache_capacity(vllm_config, kv_cache_config)
    # Every tensor names the size of the one allocation that all of them share.
    return nbytes * tokens // max(device)


def log_kv_gain(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, arena_bytes: int, stock_bytes: int) -> None:
    """Says how many tokens of the KV cache stock vLLM would not have for the same slots of the same rank."""
    saved = stock_bytes - arena_bytes
    taken = f"LoRA takes {abs(saved) / 2**30:.3f} GiB {'less' if saved >= 0 else 'more'}"
    fixed = _fixed_by(vllm_config.cache_config)
    if fixed is not None:
        logger.info("The KV cache has the size that %s gives it, as in stock vLLM; %s than there", fixed, taken)
        return
    logger.info(
        "%+d KV cache tokens against stock vLLM with --max-loras %d --max-lora-rank %d: %s",
        kv_cache_tokens(vllm_config, kv_cache_config, saved),
        vllm_config.lora_config.max_loras,
        vllm_config.lora_config.max_lora_rank,
        taken,
    )


def _fixed_by(cache: Any) -> str | None:
    """The option that sizes the KV cache whatever else takes memory; None: it takes what is left."""
    if cache.num_gpu_blocks_override is not None:
        return "--num-gpu-blocks-override"
    if cache.kv_cache_memory_bytes is not None:
        return "--kv-cache-memory-bytes (or VLLM_CPU_KVCACHE_SPACE)"
    return None
