"""The custom op `torch.ops.vllm.loraserve_lora_linear`: shrink and expand of one linear layer as one opaque
node.

torch.compile sees four arguments. What else the kernels need (arena, page table, ranks, the step's lists) is
looked up when the op runs, by the address of the layer's handle tensor, so that nothing of it is traced and
equal layers compile to equal graphs.
"""

from __future__ import annotations

import torch

from vllm_loraserve.kernels.lora_linear import lora_linear
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.paged import PagedLinear

_LAYERS: dict[int, tuple[PagedLinear, StepMetadata]] = {}


def register_layer(linear: PagedLinear, metadata: StepMetadata) -> None:
    """Make `linear` known to the op under the address of its handle; `metadata` is its Punica wrapper's."""
    if linear.slots < metadata.slots or linear.max_rank < metadata.max_rank:
        raise ValueError(
            f"LoRA layer {linear.name!r} has a page table for {linear.slots} slots of rank "
            f"{linear.max_rank}, the step metadata needs {metadata.slots} slots of rank {metadata.max_rank}"
        )
    _LAYERS[linear.handle.data_ptr()] = (linear, metadata)


def layers_of(metadata: StepMetadata) -> list[PagedLinear]:
    """The layers that were registered with this metadata."""
    return [linear for linear, registered_with in _LAYERS.values() if registered_with is metadata]


def unregister_layer(linear: PagedLinear) -> None:
    """Forget a layer; its handle must no longer be in use by any compiled or captured graph."""
    _LAYERS.pop(linear.handle.data_ptr(), None)


def _lora_linear(y: torch.Tensor, x: torch.Tensor, handle: torch.Tensor, add_inputs: bool) -> None:
    entry = _LAYERS.get(handle.data_ptr())
    if entry is None:
        raise RuntimeError("this LoRA layer was not registered with the rank-aware kernels (register_layer)")
    linear, metadata = entry
    x = x.view(-1, x.shape[-1])
    lora_linear(
        y.view(-1, y.shape[-1]),
        x if x.stride(-1) == 1 else x.contiguous(),
        linear,
        metadata,
        add_inputs=add_inputs,
    )


def _lora_linear_fake(y: torch.Tensor, x: torch.Tensor, handle: torch.Tensor, add_inputs: bool) -> None:
    return None


def register_op() -> None:
    """Register the op with vLLM's library; safe to call more than once."""
    if hasattr(torch.ops.vllm, "loraserve_lora_linear"):
        return
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(
        op_name="loraserve_lora_linear",
        op_func=_lora_linear,
        mutates_args=["y"],
        fake_impl=_lora_linear_fake,
    )
