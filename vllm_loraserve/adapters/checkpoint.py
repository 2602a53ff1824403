"""Look at a PEFT checkpoint: what it is, what it costs, whether it can be served; without torch.

The coordinator, the resolver and the worker all ask here first, so that a bad adapter is refused with one
clear sentence before any memory is taken for it. Converting the weights is `adapters/convert.py`.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

import msgspec

from vllm_loraserve.adapters.errors import AdapterError, AdapterErrorKind
from vllm_loraserve.adapters.module_patterns import MAX_MODULE_CHARS
from vllm_loraserve.adapters.peft_config import CONFIG_FILE, PeftConfig, read_peft_config
from vllm_loraserve.adapters.safetensors_header import (
    TensorEntry,
    non_finite_tensor,
    read_header,
    readable_file,
)
from vllm_loraserve.adapters.shapes import ModuleShapes, check_shapes
from vllm_loraserve.adapters.source import resolve_source

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "AdapterError",
    "AdapterErrorKind",
    "AdapterInfo",
    "Checkpoint",
    "LoRATensors",
    "inspect_checkpoint",
    "open_checkpoint",
    "resolve_source",
]

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
}
# PEFT saves the base embedding beside an adapter that resized it; it is no part of the delta.
_BASE_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


class AdapterInfo(msgspec.Struct, frozen=True):
    """What a checkpoint holds. `rank` is the largest of its modules; `sha256` covers the weights and
    the config fields that change their meaning, so equal hashes are equal adapters."""

    path: str
    rank: int
    target_modules: tuple[str, ...]
    """Suffixes of the modules that the file really holds, such as `q_proj`, sorted."""
    module_ranks: tuple[tuple[int, int], ...]
    """(rank, number of modules with it), ascending."""
    size_bytes: int
    """Size of the weights file."""
    sha256: str
    base_model: str | None
    alpha: float
    use_rslora: bool
    dtype: str
    """safetensors name of the weights' dtype (`BF16`); several are joined with `+`."""


class LoRATensors(msgspec.Struct, frozen=True):
    """Where A `[rank, in]` and B `[out, rank]` of one module lie in the file, and its scaling."""

    name: str
    """Module name without `base_model.model.`."""
    rank: int
    scaling: float
    a: TensorEntry
    b: TensorEntry
    is_embedding: bool = False

    @property
    def suffix(self) -> str:
        return self.name.rsplit(".", 1)[-1]


class Checkpoint(msgspec.Struct, frozen=True):
    """A checked checkpoint directory: its config and the place of every LoRA tensor."""

    directory: Path
    config: PeftConfig
    modules: tuple[LoRATensors, ...]
    full_tensors: tuple[str, ...]
    """Fully trained tensors (a classification head); empty unless they were allowed."""
    entries: dict[str, TensorEntry]

    @property
    def weights_path(self) -> Path:
        return self.directory / WEIGHTS_FILE

    @property
    def rank(self) -> int:
        return max(module.rank for module in self.modules) if self.modules else 0


def open_checkpoint(path: str | Path, *, max_rank: int = 256, allow_modules_to_save: bool = False) -> Checkpoint:
    """Read the config and the safetensors header of `path` and check that they agree.

    Reads no weights. Raises AdapterError, see `inspect_checkpoint`.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise AdapterError(
            "not_found", f"There is no adapter directory '{directory}'; check the path given as its source."
        )
    config = read_peft_config(directory, allow_modules_to_save=allow_modules_to_save)
    weights = directory / WEIGHTS_FILE
    if not readable_file(weights):
        pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if (directory / name).exists()]
        if pickles:
            raise AdapterError(
                "unsupported",
                f"'{directory}' has only {pickles[0]}, a pickle that could run code; save it again with "
                "PEFT's safe_serialization=True.",
            )
        raise AdapterError("invalid", f"'{directory}' has no readable {WEIGHTS_FILE}; save the adapter with PEFT.")
    entries = read_header(weights)
    modules, full = _pair_tensors(weights, entries, config, allow_modules_to_save)
    for module in modules:
        if module.rank > max_rank:
            raise AdapterError(
                "too_large",
                f"'{directory}' has rank {module.rank} in '{module.name}', over the limit of {max_rank}, the smaller "
                "of --loraserve-config.max_rank and what the arena holds (.arena_rank_rows, .arena_gib); raise it or "
                "train a smaller rank.",
            )
    return Checkpoint(directory, config, modules, full, entries)


def inspect_checkpoint(
    path: str | Path,
    *,
    max_rank: int = 256,
    module_shapes: ModuleShapes | None = None,
    check_values: bool = False,
) -> AdapterInfo:
    """Check the adapter in directory `path` and say what it is.

    With `module_shapes` every module must be one of the base model's and fit it, see `check_shapes`. `check_values`
    also refuses NaN and Inf (reads all weights).
    The weights are read once for the hash.
    Raises AdapterError: `not_found`, `invalid`, `unsupported`, `too_large` (rank), `mismatch` (shapes).
    """
    checkpoint = open_checkpoint(path, max_rank=max_rank)
    if module_shapes is not None:
        check_shapes(checkpoint, module_shapes)
    if check_values:
        check_finite(checkpoint)
    used = [entry for module in checkpoint.modules for entry in (module.a, module.b)]
    return AdapterInfo(
        path=str(checkpoint.directory),
        rank=checkpoint.rank,
        target_modules=tuple(sorted({module.suffix for module in checkpoint.modules})),
        module_ranks=tuple(sorted(Counter(module.rank for module in checkpoint.modules).items())),
        size_bytes=checkpoint.weights_path.stat().st_size,
        sha256=content_hash(checkpoint),
        base_model=checkpoint.config.base_model_name_or_path,
        alpha=checkpoint.config.lora_alpha,
        use_rslora=checkpoint.config.use_rslora,
        dtype="+".join(sorted({entry.dtype for entry in used})),
    )


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise AdapterError `invalid` if a weight is NaN or Inf."""
    bad = non_finite_tensor(checkpoint.weights_path, checkpoint.entries)
    if bad is not None:
        raise AdapterError(
            "invalid",
            f"'{checkpoint.directory}' has NaN or Inf in '{bad}'; use an earlier checkpoint of its training.",
        )


def content_hash(checkpoint: Checkpoint, file: BufferedReader | None = None) -> str:
    """SHA-256, in hex, of the weights file followed by the normalised config. Reads the file once; `file`: the same,
    open already."""
    if file is None:
        with checkpoint.weights_path.open("rb") as opened:
            return content_hash(checkpoint, opened)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    digest.update(checkpoint.config.normalised())
    return digest.hexdigest()


def _pair_tensors(
    weights: Path, entries: Mapping[str, TensorEntry], config: PeftConfig, allow_full: bool
) -> tuple[tuple[LoRATensors, ...], tuple[str, ...]]:
    halves: dict[str, dict[str, TensorEntry]] = {}
    full: list[str] = []
    for tensor, entry in entries.items():
        if tensor.endswith(_BASE_COPIES):
            continue
        part = next((suffix for suffix in _SUFFIXES if tensor.endswith(suffix)), None)
        if part is not None:
            name = tensor.removeprefix(_PREFIX).removesuffix(part)
            if len(name) > MAX_MODULE_CHARS:
                raise AdapterError(
                    "invalid",
                    f"'{weights}' names a module with {len(name)} characters, over the limit of {MAX_MODULE_CHARS}; "
                    "save the adapter with PEFT.",
                )
            halves.setdefault(name, {})[_SUFFIXES[part]] = entry
        elif allow_full and tensor.rsplit(".", 1)[0].rsplit(".", 1)[-1] in (config.modules_to_save or ()):
            full.append(tensor)
        else:
            raise AdapterError(
                "unsupported",
                f"'{weights}' holds '{tensor}', which is no LoRA A or B; save the adapter as plain LoRA.",
            )
    modules = tuple(_module(weights, name, parts, config) for name, parts in sorted(halves.items()))
    if not modules and not full:
        raise AdapterError("invalid", f"'{weights}' holds no LoRA weights; check target_modules in its {CONFIG_FILE}.")
    return modules, tuple(full)


def _module(weights: Path, name: str, parts: Mapping[str, TensorEntry], config: PeftConfig) -> LoRATensors:
    embedding = "embedding_A" in parts or "embedding_B" in parts
    a, b = (parts.get(f"embedding_{half}" if embedding else half) for half in "AB")
    if a is None or b is None:
        raise AdapterError("invalid", f"'{weights}' has only one of A and B for '{name}'; save the adapter again.")
    rank, scaling = config.rank_and_scaling(name)
    # Stacked experts of a fused MoE layer keep rank x experts rows; vLLM's own path knows their layout.
    stacked = ".experts" in name and (len(a.shape) != 2 or a.shape[0] != rank)
    if not stacked and (len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]):
        raise AdapterError(
            "mismatch",
            f"'{weights}' has A {list(a.shape)} and B {list(b.shape)} for '{name}', which are no "
            "[rank, in] and [out, rank]; save the adapter again.",
        )
    if not stacked and a.shape[0] != rank:
        raise AdapterError(
            "mismatch",
            f"'{weights}' has rank {a.shape[0]} for '{name}' but {CONFIG_FILE} says {rank}; correct r or "
            "rank_pattern, which also decide the scaling.",
        )
    return LoRATensors(name, rank, scaling, a, b, embedding)
