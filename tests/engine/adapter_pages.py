"""A checkpoint of one layer, and the layer's slices as its pages hold them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_loraserve.adapters.checkpoint import Checkpoint, LoRATensors, open_checkpoint
from vllm_loraserve.adapters.convert import Pair, WeightsReader, slice_ranks, write_pages
from vllm_loraserve.adapters.layout import build_layout
from vllm_loraserve.engine.paged_layers import module_shape, plan_module, slice_parts

LAYER = "model.layers.0.layer"


def write_parts(folder: Path, parts: Sequence[Pair | None]) -> tuple[Checkpoint, list[LoRATensors | None]]:
    """A PEFT checkpoint of a layer's parts, and where each of them lies in it."""
    names = [f"part_{index}" for index, part in enumerate(parts) if part is not None]
    tensors = {}
    for index, part in enumerate(parts):
        for half, tensor in zip("AB", part or (), strict=False):
            tensors[f"base_model.model.part_{index}.lora_{half}.weight"] = tensor.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(part[0].shape[0] for part in parts if part is not None)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    found = {module.name: module for module in checkpoint.modules}
    return checkpoint, [found.get(f"part_{index}") for index in range(len(parts))]


def pages_of(layer: Any, written: tuple[Checkpoint, Sequence[LoRATensors | None]]) -> list[Pair | None]:
    """(A, B) of every slice of the layer, read from the pages that are made of a checkpoint; None: not targeted."""
    checkpoint, parts = written
    layout = build_layout(
        [module_shape(LAYER, layer, "layer")],
        model="one",
        dtype="float32",
        page_rows=4,
        tp_rank=layer.tp_rank,
        tp_size=layer.tp_size,
    )
    plan = plan_module(LAYER, layer, parts)
    ranks = slice_ranks(layout, [plan], {LAYER: slice_parts(layer, parts)})
    (count,) = layout.pages_for(ranks)
    pages = torch.full((count, layout.groups[0].page_elements), float("nan"))
    write_pages(WeightsReader(checkpoint), layout, [plan], ranks, [pages])
    slices: list[Pair | None] = []
    for place, rank in zip(layout.groups[0].places, ranks, strict=True):
        a, b = (
            pages[:, offset : offset + layout.page_rows * width].reshape(-1, width)[:rank]
            for offset, width in ((place.a_offset, place.in_size), (place.b_offset, place.out_size))
        )
        slices.append((a, b.T) if rank else None)
    return slices
