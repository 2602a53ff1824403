"""engine/stock_layers.py: an empty embedding or lm_head slot is not touched; one that holds weights works as before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.layers import LogitsProcessorWithLoRA

from vllm_loraserve.engine.stock_layers import track_slots

pytestmark = pytest.mark.vllm


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.lora.layers import logits_processor

    monkeypatch.setattr(logits_processor, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(logits_processor, "get_tensor_model_parallel_rank", lambda: 0)
    base = SimpleNamespace(vocab_size=40, logits_as_input=False)
    made = LogitsProcessorWithLoRA(base, 16, torch.float32, torch.device("cpu"), None)  # type: ignore[arg-type]
    config = SimpleNamespace(max_lora_rank=8, lora_dtype=torch.float32)
    made.create_lora_weights(4, config, None)  # type: ignore[arg-type]
    return made


def test_occupied_slots_follow_set_and_reset(layer: Any) -> None:
    shapes = layer.lora_a_stacked.shape, layer.lora_b_stacked.shape
    occupied = track_slots([layer, object()])
    assert (layer.lora_a_stacked.shape, layer.lora_b_stacked.shape) == shapes
    assert not layer.lora_b_stacked.any()
    slots = occupied[layer.lora_b_stacked.data_ptr()]
    layer.lora_b_stacked[0] = 5.0
    layer.reset_lora(0)
    assert (layer.lora_b_stacked[0] == 5).all(), "an empty slot is not zeroed again"
    a, b = torch.randn(8, 16), torch.randn(40, 8)
    layer.set_lora(2, a, b)
    assert slots == {2}
    assert torch.equal(layer.lora_a_stacked[2, 0], a)
    layer.set_lora(2, a[:4], b[:, :4])
    assert slots == {2}
    assert not layer.lora_a_stacked[2, 0, 4:].any(), "what the slot held before is gone"
    assert not layer.lora_b_stacked[2, 0, :, 4:].any()
    layer.reset_lora(2)
    assert slots == set()
    assert not layer.lora_b_stacked[2].any()
