"""Converts a GGUF file into a Hugging Face model directory (bfloat16 safetensors, tokenizer, chat template).

Run as `python -m vllm_loraserve.launcher.convert FILE.gguf OUT`; `assets.py` does, once.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf: Path, out: Path) -> None:
    """Writes `out`. The quantised weights are expanded: what is saved is an ordinary bfloat16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        # Left in place it would make the saved, plain checkpoint claim to be quantised.
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
