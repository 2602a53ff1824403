"""Which LoRA layers of a model live in pages, and how a layer's own rules shard an adapter for it.

Paged: every dense linear layer (column, row, merged, QKV, variable slices, replicated), in the classes that
are not fully sharded. Embedding, lm_head, mixture of experts, classifiers and fully sharded layers keep
vLLM's storage and kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from vllm_loraserve.adapters.checkpoint import LoRATensors
from vllm_loraserve.adapters.convert import ModulePlan, Pair
from vllm_loraserve.adapters.errors import AdapterError
from vllm_loraserve.adapters.layout import Layout, ModuleShape
from vllm_loraserve.kernels.paged import PagedLinear
from vllm_loraserve.memory.arena import Arena

PAGED_CLASSES = frozenset(
    {
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearVariableSliceWithLoRA,
        QKVParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
        ReplicatedLinearWithLoRA,
    }
)


def is_paged(layer: BaseLayerWithLoRA) -> bool:
    return type(layer) in PAGED_CLASSES


_without_stacked = False


@contextmanager
def without_stacked_weights() -> Iterator[None]:
    """While the block runs, a paged layer that vLLM makes gets its stacked weights on the meta device.

    vLLM's own code still decides their shapes, which is how we know, exactly, what stock would take.
    """
    global _without_stacked
    _without_stacked = True
    try:
        yield
    finally:
        _without_stacked = False


def wrap_create_lora_weights(original: Callable[..., None]) -> Callable[..., None]:
    """A linear layer's `create_lora_weights`; what it does otherwise only `without_stacked_weights` decides."""

    @functools.wraps(original)
    def create_lora_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _without_stacked or not is_paged(self):
            original(self, *args, **kwargs)
            return
        device = self.device
        self.device = torch.device("meta")
        try:
            original(self, *args, **kwargs)
        finally:
            self.device = device

    return create_lora_weights


def stacked_bytes(layer: Any) -> int:
    """Bytes of a linear layer's stacked weights as vLLM shapes them."""
    return sum(tensor.nbytes for tensor in (*layer.lora_a_stacked, *layer.lora_b_stacked))


def module_shape(name: str, layer: Any, group: str) -> ModuleShape:
    """Sizes of a paged layer on this worker, from the stacked weights that vLLM shaped."""
    return ModuleShape(
        name=name,
        group=group,
        in_size=layer.lora_a_stacked[0].shape[-1],
        out_sizes=tuple(tensor.shape[-2] for tensor in layer.lora_b_stacked),
    )


def slice_parts(layer: Any, parts: Sequence[LoRATensors | None]) -> list[int]:
    """For each slice of the layer, which of the adapter's parts it is made from.

    Usually part i is slice i. One part for several slices, or parts that span some of them (vLLM's
    `expand_packed_lora`: in_proj_qkv and in_proj_z of a four-slice layer) are told apart by B's rows.
    """
    if len(parts) == layer.n_slices:
        return list(range(layer.n_slices))
    if len(parts) == 1:
        return [0] * layer.n_slices
    owners: list[int] = []
    for index, part in enumerate(parts):
        if part is None:
            owners += [index] * (layer.n_slices - len(owners))
            continue
        rows = part.b.shape[0]
        while rows > 0 and len(owners) < layer.n_slices:
            rows -= layer.output_sizes[len(owners)]
            owners.append(index)
    return owners


def whole_sizes(layer: Any) -> tuple[int, tuple[int, ...]]:
    """Input features and output features by slice of the layer as a whole, not of this worker's shard."""
    base = layer.base_layer
    if isinstance(layer, QKVParallelLinearWithLoRA | MergedQKVParallelLinearWithLoRA):
        # Not its `output_sizes`: they count a KV head once for every worker that holds a copy of it.
        outs = tuple(heads * base.head_size for heads in (base.total_num_heads, *(base.total_num_kv_heads,) * 2))
    elif isinstance(layer, MergedColumnParallelLinearWithLoRA):
        outs = tuple(layer.output_sizes)
    else:
        outs = (base.output_size,)
    return base.input_size, outs if len(outs) == layer.n_slices else (sum(outs),)


def shard(name: str, layer: Any, parts: Sequence[Pair | None]) -> Sequence[Pair | None]:
    """This worker's A and B of every slice, by the layer's own `slice_lora_a` and `slice_lora_b`.

    Raises AdapterError `mismatch` for parts of another layer: a cut through a matrix that is too large would fit.
    """
    if not isinstance(layer, MergedColumnParallelLinearWithLoRA):
        assert parts[0] is not None
        if layer.tp_size == 1:
            return parts
        _check_whole(name, layer, parts)
        a, b = parts[0]
        return [(layer.slice_lora_a(a), layer.slice_lora_b(b))]
    slices = _by_slice(name, layer, parts)
    if layer.tp_size == 1:
        return slices
    _check_whole(name, layer, slices)
    a_list = layer.slice_lora_a([None if pair is None else pair[0] for pair in slices])
    b_list = layer.slice_lora_b([None if pair is None else pair[1] for pair in slices])
    return [None if a is None or b is None else (a, b) for a, b in zip(a_list, b_list, strict=True)]


def _by_slice(name: str, layer: Any, parts: Sequence[Pair | None]) -> Sequence[Pair | None]:
    """The whole A and B of every slice of a merged layer; see `slice_parts`."""
    if len(parts) == layer.n_slices:
        return parts
    a_list = [None if part is None else part[0] for part in parts]
    b_list = [None if part is None else part[1] for part in parts]
    if len(parts) == 1:
        assert parts[0] is not None
        a, b = parts[0]
        _, outs = whole_sizes(layer)
        if b.shape[0] != sum(outs):
            raise _mismatch(name, f"B has {b.shape[0]} rows", f"{sum(outs)}")
        return [(a, part) for part in torch.split(b, outs)]
    try:
        a_list, b_list = layer.expand_packed_lora(a_list, b_list)
    except ValueError as error:
        raise AdapterError("mismatch", f"The adapter's '{name}' is not a part of this model's: {error}") from None
    return [None if a is None or b is None else (a, b) for a, b in zip(a_list, b_list, strict=True)]


def _check_whole(name: str, layer: Any, slices: Sequence[Pair | None]) -> None:
    in_size, outs = whole_sizes(layer)
    for pair, out in zip(slices, outs, strict=True):
        if pair is not None and (pair[0].shape[1], pair[1].shape[0]) != (in_size, out):
            raise _mismatch(
                name, f"{pair[0].shape[1]} input and {pair[1].shape[0]} output features", f"{in_size} and {out}"
            )


def _mismatch(name: str, has: str, needs: str) -> AdapterError:
    return AdapterError(
        "mismatch", f"The adapter's '{name}' has {has}, but this model needs {needs}; train it on this base model."
    )


def plan_module(name: str, layer: Any, parts: Sequence[LoRATensors | None]) -> ModulePlan:
    return ModulePlan(name, parts, lambda pairs: shard(name, layer, pairs))


class SlotTables:
    """Per-slot metadata on the device: which pages hold slot s's rank rows, and its rank in every slice.

    page_tables[g]: int32 [slots, max_pages], in the numbers of `Arena.numbers`. ranks: int32 [slices of the layout,
    slots].
    """

    def __init__(self, layout: Layout, slots: int, max_rank: int, device: torch.device) -> None:
        max_pages = -(-max_rank // layout.page_rows)
        self.page_tables = [torch.zeros((slots, max_pages), dtype=torch.int32, device=device) for _ in layout.groups]
        # Layers take rows of it. Triton compiles anew for rows that do not begin on 16 bytes, four int32.
        padded = -(-slots // 4) * 4
        self.ranks = torch.zeros((len(layout.slice_index), padded), dtype=torch.int32, device=device)[:, :slots]

    def set(self, slot: int, numbers: Sequence[Sequence[int]], ranks: Sequence[int]) -> None:
        """The adapter in `slot` has the pages of these numbers in each group, and these ranks. Queued on the current
        stream."""
        self.set_pages(slot, numbers)
        self.ranks[:, slot].copy_(torch.tensor(ranks, dtype=torch.int32), non_blocking=True)

    def set_pages(self, slot: int, numbers: Sequence[Sequence[int]]) -> None:
        """Its pages are elsewhere now, with the same content."""
        for table, owned in zip(self.page_tables, numbers, strict=True):
            if owned:
                table[slot, : len(owned)].copy_(torch.tensor(owned, dtype=torch.int32), non_blocking=True)

    def clear(self, slot: int) -> None:
        """No adapter is in `slot`: rank 0 everywhere, so that no kernel reads its pages."""
        self.ranks[:, slot].zero_()

    def reset(self) -> None:
        """No adapter is in any slot, whatever has become of the memory."""
        for table in (*self.page_tables, self.ranks):
            table.zero_()


def attach(layers: Mapping[str, Any], layout: Layout, arena: Arena, tables: SlotTables) -> list[PagedLinear]:
    """Give every paged layer its view of the arena; its stacked weights become the view's handle."""
    linears = []
    at = 0
    for index, group in enumerate(layout.groups):
        flat, table = arena.group_flat(index), tables.page_tables[index]
        by_module: dict[str, list[Any]] = {}
        for place in group.places:
            by_module.setdefault(place.module, []).append(place)
        for module, places in by_module.items():
            linear = PagedLinear(
                arena=flat,
                page_table=table,
                ranks=tables.ranks[at : at + len(places)],
                page_stride=arena.stride(index),
                page_elements=group.page_elements,
                page_rows=layout.page_rows,
                a_offsets=tuple(place.a_offset for place in places),
                b_offsets=tuple(place.b_offset for place in places),
                in_size=places[0].in_size,
                out_sizes=tuple(place.out_size for place in places),
                name=module,
            )
            at += len(places)
            layer = layers[module]
            layer.paged_linear = linear
            layer.lora_a_stacked = layer.lora_b_stacked = (linear.handle,)
            layer.set_lora = layer.reset_lora = _not_stacked
            linears.append(linear)
    return linears


def _not_stacked(*_: Any) -> None:
    raise RuntimeError("a paged LoRA layer has no stacked weights; its adapters are activated by pages")
