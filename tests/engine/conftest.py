"""Real small things for tests of the engine: a model directory, PEFT adapters with random weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The small real model that tests run on."""
    from vllm_loraserve.launcher import assets

    return assets.model_path(os.environ.get("LORASERVE_TEST_MODEL"))


@pytest.fixture
def make_adapter(tmp_path: Path, model_dir: Path) -> Callable[..., Path]:
    """make(name, rank, seed, strength) -> directory of a PEFT checkpoint whose weights visibly change the answers."""

    def make(name: str, rank: int = 8, seed: int = 0, strength: float = 0.2) -> Path:
        import torch
        from safetensors.torch import save_file

        config = json.loads((model_dir / "config.json").read_text())
        hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
        outputs = {"q_proj": hidden, "v_proj": hidden // heads * kv}
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for layer in range(config["num_hidden_layers"]):
            for module, out in outputs.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                weights[f"{key}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) / hidden**0.5
                weights[f"{key}.lora_B.weight"] = strength * torch.randn(out, rank, generator=generator)
        folder = tmp_path / name
        folder.mkdir()
        save_file(weights, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            json.dumps(
                {
                    "peft_type": "LORA",
                    "base_model_name_or_path": str(model_dir),
                    "r": rank,
                    "lora_alpha": rank,
                    "target_modules": list(outputs),
                    "bias": "none",
                    "task_type": "CAUSAL_LM",
                }
            )
        )
        return folder

    return make
