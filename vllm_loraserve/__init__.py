"""vllm-loraserve: rank-aware serving of many LoRA adapters over several vLLM instances."""

__version__ = "0.1.0"
SUPPORTED_VLLM = ">=0.32,<0.33"
"""The vLLM versions this package is tested with; `plugin.py` refuses others by name."""
