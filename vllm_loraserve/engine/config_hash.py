"""What of the options takes part in vLLM's hash of a configuration.

vLLM names what it compiled, tuned and measured after that hash, and `additional_config` is in it as a whole. Instances
of one cluster differ in names and addresses, which change nothing of what is compiled: with those in the hash each
would compile for itself, and so would an instance that comes back under another name.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import vllm_loraserve
from vllm_loraserve.config import ADDITIONAL_CONFIG_KEY
from vllm_loraserve.engine.engine_config import config_of

COMPUTED_FROM = ("max_rank", "page_rows", "arena_gib", "arena_rank_rows", "arena_share", "host_gib")
"""Options that change what a worker allocates or computes; all others are about names, places, loads and turns."""


def wrap_compute_hash(original: Callable[..., str]) -> Callable[..., str]:
    """VllmConfig.compute_hash by `COMPUTED_FROM` alone; without the flag the original runs on what it was given."""

    @functools.wraps(original)
    def compute_hash(self: Any, include_version: bool = True) -> str:
        config = config_of(self)
        if config is None:
            return original(self, include_version)
        hashed = copy.copy(self)
        hashed.additional_config = {
            **self.additional_config,
            # The version stands for what this code makes of the options.
            ADDITIONAL_CONFIG_KEY: {name: getattr(config, name) for name in COMPUTED_FROM}
            | {"version": vllm_loraserve.__version__},
        }
        return original(hashed, include_version)

    return compute_hash
