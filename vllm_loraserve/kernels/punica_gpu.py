"""The Punica wrapper for GPUs: linear layers whose adapters lie in pages go to the rank-aware kernels.

Layers that pages do not cover (embedding, logits, mixture of experts, classifiers) keep vLLM's own path,
which is inherited unchanged. The LoRA manager calls `configure_paged` once, `register_linear` for each layer
it serves, and `set_slot_rank` whenever the adapter in a slot changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm import envs
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.op import register_layer, register_op
from vllm_loraserve.kernels.paged import PagedLinear
from vllm_loraserve.kernels.tuning import GRAPH_TOKENS

QUALNAME = "vllm_loraserve.kernels.punica_gpu.PagedPunicaWrapperGPU"
"""What `current_platform.get_punica_wrapper()` must return to select this wrapper."""


def token_slots(
    index_mapping: Sequence[int], lora_index_to_id: Sequence[int | None]
) -> npt.NDArray[np.int32]:
    """Slot of each token, -1 for the base model, from vLLM's per-token adapter ids (0 and below: base)."""
    ids = np.asarray(index_mapping, dtype=np.int64)
    distinct, inverse = np.unique(ids, return_inverse=True)
    slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
    missing = [int(i) for i in distinct if i > 0 and int(i) not in slot_of]
    if missing:
        raise ValueError(
            f"the batch uses adapters {missing} that hold no slot; activate them before the step"
        )
    slots = np.asarray([slot_of[int(i)] if i > 0 else -1 for i in distinct], dtype=np.int32)
    return slots[inverse] if ids.size else np.zeros(0, np.int32)


class PagedPunicaWrapperGPU(PunicaWrapperGPU):
    """vLLM's GPU wrapper, with `add_lora_linear` on pages of rank rows."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.paged_metadata: StepMetadata | None = None
        self.stock_layers = True
        register_op()

    def configure_paged(
        self, *, max_rank: int, graph_tokens: int = GRAPH_TOKENS, stock_layers: bool = True
    ) -> None:
        """Prepare for paged layers.

        max_rank: the largest rank that any slot may hold; graph_tokens: the largest batch, padding included,
        that is captured in a CUDA graph; stock_layers: False when no layer is left on vLLM's own path, which
        then need not get its metadata (sorting on the device with host synchronisation) at every change of
        batch.
        """
        self.stock_layers = stock_layers
        self.paged_metadata = StepMetadata(
            slots=self.max_loras,
            max_rank=max_rank,
            graph_tokens=graph_tokens,
            device=self.device,
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        )

    def _metadata(self) -> StepMetadata:
        if self.paged_metadata is None:
            raise RuntimeError("configure_paged must be called before paged LoRA layers are used")
        return self.paged_metadata

    def register_linear(self, linear: PagedLinear) -> None:
        """Serve `linear` with the rank-aware kernels; the layer then passes `linear.stacked` as its
        weights."""
        register_layer(linear, self._metadata())

    def set_slot_rank(self, slot: int, rank: int) -> None:
        """See `StepMetadata.set_slot_rank`: the largest rank in any module of the adapter now in `slot`."""
        self._metadata().set_slot_rank(slot, rank)

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """As in vLLM, called whenever the batch's mapping changes."""
        if self.paged_metadata is not None:
            self.paged_metadata.build(token_slots(mapping.index_mapping, lora_index_to_id))
        if self.stock_layers:
            super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        else:
            self.is_prefill = mapping.is_prefill

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """A layer that passes its handle (int64) is paged; any other keeps vLLM's kernels. Traced by
        torch.compile."""
        if lora_a_stacked[0].dtype != torch.int64:
            super().add_lora_linear(
                y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs
            )
            return
        if scale != 1.0:
            raise ValueError(f"paged LoRA layers fold the scaling into B, got scale={scale}")
        torch.ops.vllm.loraserve_lora_linear(y, x, lora_a_stacked[0], kwargs.get("add_inputs", True))

    def add_shrink(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """vLLM's own, for stock layers. Paged layers come here only with `--fully-sharded-loras`."""
        if lora_a_stacked[0].dtype == torch.int64:
            raise NotImplementedError(
                "--fully-sharded-loras is not supported together with paged LoRA layers; start without it"
            )
        super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
