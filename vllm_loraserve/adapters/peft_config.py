"""`adapter_config.json` of PEFT: what changes the meaning of an adapter, and which of it is not served.

The fields and the pattern rule follow PEFT's `LoraConfig` (a `rank_pattern` key matches a module whose
dotted name ends in it; the first match wins).
"""

import json
import math
import re
from pathlib import Path
from stat import S_ISREG
from typing import Any

import msgspec

from vllm_loraserve.adapters.errors import AdapterError
from vllm_loraserve.adapters.module_patterns import pattern_problem

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 16 << 20
"""Far more than one that names every module; what is no regular file (a FIFO) could keep its reader for ever."""

# Initialisations that only choose the first weights. Others (PiSSA, OLoRA, CorDA, LoftQ) also change the
# base model, so that the saved A and B are not a delta to the model that is being served.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})


class PeftConfig(msgspec.Struct, frozen=True):
    """The part of `adapter_config.json` that decides the weights' meaning. Unknown fields are ignored."""

    r: int
    lora_alpha: float
    target_modules: list[str] | str | None = None
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str | None = True
    layer_replication: list[Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    use_bdlora: Any = None
    trainable_token_indices: Any = None
    target_parameters: list[str] | None = None

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """Rank and scaling (alpha / r, or alpha / sqrt(r) for rsLoRA) of one module.

        `module` is the name in the checkpoint without `base_model.model.` and without `.lora_A.weight`.
        """
        rank = _match(self.rank_pattern, module, self.r)
        alpha = _match(self.alpha_pattern, module, self.lora_alpha)
        return int(rank), alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def normalised(self) -> bytes:
        """Canonical JSON of the fields that change the weights' meaning: equal bytes, equal adapter."""
        meaning = {
            "r": self.r,
            "lora_alpha": float(self.lora_alpha),
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern or {}),
            "alpha_pattern": {k: float(v) for k, v in (self.alpha_pattern or {}).items()},
        }
        # Patterns stay in their order: the first match wins.
        return json.dumps(meaning, separators=(",", ":")).encode()


def _match(pattern: dict[str, Any] | None, module: str, default: float) -> float:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return default


def read_peft_config(directory: Path, *, allow_modules_to_save: bool = False) -> PeftConfig:
    """Read and check `adapter_config.json` in `directory`.

    `allow_modules_to_save` accepts a saved classification head, which vLLM's own path serves.
    Raises AdapterError: `invalid` (missing, not JSON, a wrong type), `unsupported` (a feature not served).
    """
    path = directory / CONFIG_FILE
    try:
        about = path.stat()
        if not S_ISREG(about.st_mode) or about.st_size > MAX_CONFIG_BYTES:
            raise AdapterError(
                "invalid",
                f"'{path}' is no file of at most {MAX_CONFIG_BYTES >> 20} MiB; save the adapter again with PEFT.",
            )
        raw = path.read_bytes()
    except FileNotFoundError:
        raise AdapterError(
            "invalid", f"'{directory}' has no {CONFIG_FILE}; save the adapter with PEFT's save_pretrained."
        ) from None
    except OSError as error:
        raise AdapterError("invalid", f"'{path}' cannot be read ({error.strerror}); check its permissions.") from None
    try:
        config = msgspec.json.decode(raw, type=PeftConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterError(
            "invalid", f"'{path}' is not a valid PEFT config ({error}); save the adapter again with PEFT."
        ) from None
    _check(config, path, allow_modules_to_save)
    return config


def _check(config: PeftConfig, path: Path, allow_modules_to_save: bool) -> None:
    for name, rank in {"r": config.r, **(config.rank_pattern or {})}.items():
        if rank <= 0:
            raise AdapterError("invalid", f"'{path}' gives rank {rank} for '{name}'; a rank is at least 1.")
    for key in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
        problem = pattern_problem(key)
        if problem:
            raise AdapterError("invalid", f"The pattern '{key[:200]}' of '{path}' {problem}.")
    if not math.isfinite(config.lora_alpha):
        raise AdapterError("invalid", f"'{path}' has lora_alpha {config.lora_alpha}; give a finite number.")
    saved = [] if allow_modules_to_save else list(config.modules_to_save or ())
    init = config.init_lora_weights
    refused = {
        f"peft_type {config.peft_type}": config.peft_type.upper() != "LORA",
        "DoRA (use_dora)": config.use_dora,
        "trained biases (bias)": config.bias != "none",
        "LoRA biases (lora_bias)": config.lora_bias,
        f"fully trained modules {saved} (modules_to_save)": bool(saved),
        f"init_lora_weights '{init}', which changes the base model": (
            isinstance(init, str) and init.lower() not in _PLAIN_INITS
        ),
        "layer_replication": bool(config.layer_replication),
        "Activated LoRA (alora_invocation_tokens)": bool(config.alora_invocation_tokens),
        "QALoRA (use_qalora)": config.use_qalora,
        "block-diagonal LoRA (use_bdlora)": bool(config.use_bdlora),
        "trainable_token_indices": bool(config.trainable_token_indices),
    }
    for feature, present in refused.items():
        if present:
            raise AdapterError(
                "unsupported",
                f"'{path}' uses {feature}, which is not served; convert the adapter to plain LoRA.",
            )
