"""The Punica wrapper of an engine on a CPU: vLLM's seam between LoRA layers and kernels.

Tokens are grouped by adapter once per step; every LoRA operation then visits each adapter of the batch once.
A base-model token is in no group: its rows are never read or written, so base requests answer bit for bit as
without LoRA.
"""

from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as StockPunicaWrapperCPU

from vllm_loraserve.kernels import cpu_native, cpu_padded, cpu_paged
from vllm_loraserve.kernels.grouping import NO_GROUPS, TokenGroups, group_by_slot, slots_of
from vllm_loraserve.kernels.paged import PagedLinear


class PunicaWrapperCPU(StockPunicaWrapperCPU):
    """Rank-aware, grouped LoRA operations; MoE and classifier operations are inherited."""

    token_groups: TokenGroups = NO_GROUPS
    """Groups of the tokens of this step."""
    sampler_groups: TokenGroups = NO_GROUPS
    """Groups of the rows that the logits are computed for."""
    stock_layers: bool = True
    occupied_slots: Mapping[int, Set[int]] = MappingProxyType({})
    """Slots that hold weights, by address of a stacked B; a layer that is not listed may use every slot."""

    def configure_paged(self, *, max_rank: int, stock_layers: bool = True, **_: Any) -> None:
        """Prepare for paged layers (the same call as on a GPU). `stock_layers`: some layers are not paged."""
        self.stock_layers = stock_layers
        self._max_rank = max_rank
        self._native = cpu_native.load()
        self._layers: dict[int, tuple[PagedLinear, cpu_native.NativeLayer | None]] = {}
        self._batch = cpu_native.NativeBatch(self.token_groups)

    def register_linear(self, linear: PagedLinear) -> None:
        """Serve `linear` from pages; the layer then passes `(linear.handle,)` as its weights."""
        native = None
        if self._native is not None:
            native = cpu_native.NativeLayer(linear)
            # The largest step that there can be, so that its memory is taken before vLLM looks what is left for the KV
            # cache. This thread is the one that runs the steps.
            rank = min(self._max_rank, linear.arena.numel() // linear.page_elements * linear.page_rows)
            self._native.reserve(self._token_lora_indices.shape[0] * rank * linear.n_slices)
        self._layers[linear.handle.data_ptr()] = (linear, native)

    def warm_up(self) -> None:
        """Nothing is compiled when it is first used (the same call as on a GPU)."""

    def set_slot_rank(self, slot: int, rank: int) -> None:
        """The largest rank of the adapter now in `slot`; the ranks are read when they are used."""

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slot_of_id = {lora: slot for slot, lora in enumerate(lora_index_to_id) if lora is not None}
        self.token_groups = group_by_slot(slots_of(mapping.index_mapping, slot_of_id))
        self.sampler_groups = group_by_slot(slots_of(mapping.prompt_mapping, slot_of_id))

    def _update_prefill_metadata(self, token_lora_tensor: torch.Tensor) -> None:
        """Not needed: the groups say the same, and no operation here reads vLLM's segments."""

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        x = x.view(-1, x.shape[-1])
        for index, a_stacked in enumerate(lora_a_stacked):
            cpu_padded.shrink(y[index], x, a_stacked, self.token_groups, scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        y, start = y.view(-1, y.shape[-1]), offset_start
        for index, (b_stacked, size) in enumerate(zip(lora_b_stacked, output_slices, strict=True)):
            cpu_padded.expand(y, x[index], b_stacked, self.token_groups, start=start, size=size, add_inputs=add_inputs)
            start += size

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        groups = self._occupied(self.token_groups, lora_b_stacked)
        cpu_padded.expand(y, x, lora_b_stacked, groups, add_inputs=add_inputs)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        if not len(self.token_groups.slots):
            return
        if lora_a_stacked[0].dtype == torch.int64:
            self._paged_linear(y, x, lora_a_stacked[0], add_inputs)
        else:
            cpu_padded.linear(
                y.view(-1, y.shape[-1]),
                x.view(-1, x.shape[-1]),
                lora_a_stacked,
                lora_b_stacked,
                output_slices,
                self.token_groups,
                scale=scale,
                add_inputs=add_inputs,
            )

    def _occupied(self, groups: TokenGroups, b_stacked: torch.Tensor) -> TokenGroups:
        slots = self.occupied_slots.get(b_stacked.data_ptr())
        return groups if slots is None else groups.only(slots)

    def _paged_linear(self, y: torch.Tensor, x: torch.Tensor, handle: torch.Tensor, add_inputs: bool) -> None:
        linear, native = self._layers[handle.data_ptr()]
        if y.dim() != 2:
            y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if native is not None and self._native is not None:
            if self._batch.groups is not self.token_groups:
                self._batch = cpu_native.NativeBatch(self.token_groups)
            if self._native.linear(y, x, native, self._batch, add_inputs):
                return
            with self._native.reading():
                cpu_paged.linear(y, x, linear, self.token_groups, add_inputs=add_inputs)
            return
        cpu_paged.linear(y, x, linear, self.token_groups, add_inputs=add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        groups = self._occupied(self.sampler_groups, lora_b_stacked)
        if not len(groups.slots):
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        h = torch.zeros((x.shape[0], lora_b_stacked.shape[-1]), dtype=torch.float32)
        cpu_padded.shrink(h, x, lora_a_stacked, groups, scale)
        cpu_padded.expand(y, h, lora_b_stacked, groups)
