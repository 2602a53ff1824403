"""Small real PEFT checkpoints on disk, written without torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SHAPES = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "down_proj": (96, 64)}


def write_adapter(
    directory: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    modules: Sequence[str] = tuple(SHAPES),
    layers: int = 2,
    ranks: Mapping[str, int] | None = None,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    dtype: Any = np.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`; `ranks` is a rank per module suffix."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for module in modules:
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            r, (n_in, n_out) = (ranks or {}).get(module, rank), shapes[module]
            tensors[f"{name}.lora_A.weight"] = (rng.standard_normal((r, n_in)) * 0.1).astype(dtype)
            tensors[f"{name}.lora_B.weight"] = (rng.standard_normal((n_out, r)) * 0.1).astype(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    written = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        "base_model_name_or_path": "base",
        **({"rank_pattern": dict(ranks)} if ranks else {}),
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(written))
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
