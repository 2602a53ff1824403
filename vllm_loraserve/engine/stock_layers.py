"""Embedding and lm_head LoRA stay in vLLM's padded stacks, but a slot that holds no such weights should cost nothing.

Most adapters have none, and there may be many slots. So each layer's occupied slots are known: an empty slot is not
zeroed again, is not computed by the CPU kernels, and on a CPU its memory is only taken when it is first written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA

_TRACKED = (LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA)


def track_slots(layers: Iterable[Any]) -> dict[int, set[int]]:
    """Occupied slots of each tracked layer, kept up to date, by the address of its `lora_b_stacked`."""
    occupied: dict[int, set[int]] = {}
    for layer in layers:
        if isinstance(layer, _TRACKED):
            if layer.lora_b_stacked.device.type == "cpu":
                _make_lazy(layer)
            occupied[layer.lora_b_stacked.data_ptr()] = _SlotTracker(layer).slots
    return occupied


class _SlotTracker:
    """Stands in for a layer's `set_lora` and `reset_lora`."""

    def __init__(self, layer: Any) -> None:
        self.slots: set[int] = set()
        self._set, self._reset = layer.set_lora, layer.reset_lora
        self._setting = False
        layer.set_lora, layer.reset_lora = self.set_lora, self.reset_lora

    def set_lora(self, index: int, *weights: Any, **named: Any) -> None:
        # vLLM's set_lora calls the layer's reset_lora first: what the slot held before has to go.
        self._setting = True
        try:
            self._set(index, *weights, **named)
        finally:
            self._setting = False
        self.slots.add(index)

    def reset_lora(self, index: int) -> None:
        if index in self.slots:
            self._reset(index)
            if not self._setting:
                self.slots.discard(index)


def _make_lazy(layer: Any) -> None:
    """Zeros that the system only backs with memory where they are written."""
    layer.lora_a_stacked = _lazy_zeros(layer.lora_a_stacked)
    layer.lora_b_stacked = _lazy_zeros(layer.lora_b_stacked)
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        layer.lora_a_stacked_2d = layer.lora_a_stacked.view(-1, layer.lora_a_stacked.shape[2])


def _lazy_zeros(like: torch.Tensor) -> torch.Tensor:
    # numpy takes zeroed memory from calloc, which the system hands out untouched; torch.zeros writes it.
    return torch.from_numpy(np.zeros(like.nbytes, np.uint8)).view(like.dtype).view(like.shape)
