"""The Punica wrapper for GPUs: linear layers whose adapters lie in pages go to the rank-aware kernels.

Layers that pages do not cover (embedding, logits, mixture of experts, classifiers) keep vLLM's own path,
which is inherited unchanged. The LoRA manager calls `configure_paged` once, `register_linear` for each layer
it serves, and `set_slot_rank` whenever the adapter in a slot changes.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU as StockPunicaWrapperGPU

from vllm_loraserve.kernels.grouping import slots_of
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.op import layers_of, register_layer, register_op
from vllm_loraserve.kernels.paged import PagedLinear
from vllm_loraserve.kernels.tuning import GRAPH_TOKENS
from vllm_loraserve.kernels.warm_up import warm_up

logger = init_logger("vllm.loraserve.punica_gpu")


def largest_captured_batch() -> int:
    """Tokens of the largest CUDA graph that the engine under construction captures."""
    config = get_current_vllm_config_or_none()
    size = config.compilation_config.max_cudagraph_capture_size if config is not None else None
    return max(size or 0, GRAPH_TOKENS)


class PunicaWrapperGPU(StockPunicaWrapperGPU):
    """vLLM's GPU wrapper, with `add_lora_linear` on pages of rank rows."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.paged_metadata: StepMetadata | None = None
        self.stock_layers = True
        register_op()

    def configure_paged(self, *, max_rank: int, graph_tokens: int | None = None, stock_layers: bool = True) -> None:
        """Prepare for paged layers.

        max_rank: the largest rank that any slot may hold; graph_tokens: the largest batch, padding included,
        that is captured in a CUDA graph (default: what the engine is configured for); stock_layers: False
        when no layer is left on vLLM's own path, which then need not get its metadata (sorting on the device
        with host synchronisation) at every change of batch.
        """
        self.stock_layers = stock_layers
        self.paged_metadata = StepMetadata(
            slots=self.max_loras,
            max_rank=max_rank,
            graph_tokens=graph_tokens or largest_captured_batch(),
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

    def warm_up(self) -> None:
        """Compile what batches larger than the captured ones launch, before the first request."""
        began = time.monotonic()
        logger.info("Compiling the LoRA kernels: up to a minute, where Triton's cache does not have them")
        try:
            # On two streams vLLM adds the LoRA part itself, but not outside of a forward context.
            ways = (True, not envs.VLLM_LORA_ENABLE_DUAL_STREAM)
            launches = warm_up(layers_of(self._metadata()), self._metadata(), add_inputs=ways)
        except Exception:
            # A variant that does not compile here may never be asked for.
            logger.exception("Not all LoRA kernels could be compiled beforehand; steps that want them will do it")
            return
        logger.info("The LoRA kernels are compiled: %d launches in %.1f s", launches, time.monotonic() - began)

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
            slot_of_id = {lora: slot for slot, lora in enumerate(lora_index_to_id) if lora is not None}
            self.paged_metadata.build(slots_of(mapping.index_mapping, slot_of_id))
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
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs)
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
