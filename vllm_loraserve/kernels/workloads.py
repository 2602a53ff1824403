"""Model shapes and batches that kernel figures are quoted for, shared by the cost count and the GPU benchmark."""

from __future__ import annotations

from vllm_loraserve.kernels.cost import Batch, LayerShape

MIX16 = (8,) * 8 + (16,) * 4 + (32,) * 2 + (64, 128)
"""Sixteen adapters of mixed ranks, mean 24: many small ones, one of rank 128."""

LLAMA_8B = (
    LayerShape("qkv", 4096, (4096, 1024, 1024), 32),
    LayerShape("o", 4096, (4096,), 32),
    LayerShape("gate_up", 4096, (14336, 14336), 32),
    LayerShape("down", 14336, (4096,), 32),
)
"""Llama-3.1-8B on one device."""

LLAMA_70B_TP8 = (
    LayerShape("qkv", 8192, (1024, 128, 128), 80),
    LayerShape("o", 1024, (8192,), 80),
    LayerShape("gate_up", 8192, (3584, 3584), 80),
    LayerShape("down", 3584, (8192,), 80),
)
"""One of eight tensor-parallel shards of Llama-3-70B; A of the column-parallel layers is replicated."""

MODELS = {"llama-3.1-8b": LLAMA_8B, "llama-3-70b-tp8": LLAMA_70B_TP8}


def spread(tokens: int, adapters: int) -> tuple[int, ...]:
    """Slots of `tokens` tokens dealt out in turn (decode: requests in any order)."""
    return tuple(t % adapters for t in range(tokens))


def runs(tokens: int, adapters: int) -> tuple[int, ...]:
    """Slots of `tokens` tokens in `adapters` equal runs (prefill: a prompt is contiguous)."""
    return tuple(t * adapters // tokens for t in range(tokens))


def padded(ranks: tuple[int, ...], slots: int) -> tuple[int, ...]:
    """Ranks of `slots` slots, of which the last are empty."""
    return ranks + (0,) * (slots - len(ranks))


def batches() -> tuple[Batch, ...]:
    """The cases. Stock pads to rank 128, except in D5, where every adapter has the rank that stock is set to."""
    return (
        Batch("D1 decode 16 tokens, 16 adapters mixed 8..128", spread(16, 16), padded(MIX16, 32), 128),
        Batch("D2 decode 64 tokens, 16 adapters mixed 8..128", spread(64, 16), padded(MIX16, 32), 128),
        Batch("D3 decode 64 tokens, 32 adapters of rank 8", spread(64, 32), (8,) * 32, 128),
        Batch("D4 decode 64 tokens, 1 adapter of rank 8", spread(64, 1), padded((8,), 8), 128),
        Batch("D5 decode 64 tokens, 1 adapter of rank 16, stock at 16", spread(64, 1), (16,), 16),
        Batch("P1 prefill 2048 tokens, 1 adapter of rank 8", runs(2048, 1), padded((8,), 8), 128),
        Batch("P2 prefill 8192 tokens, 16 adapters mixed 8..128", runs(8192, 16), padded(MIX16, 32), 128),
    )


def interference(top: int) -> Batch:
    """Fifteen adapters of rank 8 beside one of rank `top`, 64 decode tokens."""
    ranks = (8,) * 15 + (top,)
    return Batch(f"15 of rank 8 and one of rank {top}", spread(64, 16), padded(ranks, 32), 128)


def slots_sweep(slots: int) -> Batch:
    """Sixteen mixed adapters active out of `slots`, 64 decode tokens."""
    return Batch(f"16 active of {slots} slots", spread(64, 16), padded(MIX16, slots), 128)
