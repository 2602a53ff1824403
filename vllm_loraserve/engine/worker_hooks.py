"""The worker process: which LoRA manager and which kernels an engine with the flag uses.

The choice is made from the engine's own VllmConfig, at the moment its LoRA manager is made; an engine without the flag,
even in the same process, gets vLLM's classes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine.engine_config import config_of

MANAGER = "vllm_loraserve.engine.lora_manager.LoRAServeWorkerManager"
PUNICA_WRAPPERS = {
    "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU": "vllm_loraserve.kernels.punica_cpu.PunicaWrapperCPU",
    "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU": "vllm_loraserve.kernels.punica_gpu.PunicaWrapperGPU",
}
"""vLLM's wrapper -> ours, as qualified names."""

_current: LoRAServeConfig | None = None
"""Options of the engine whose LoRA manager this process made last; a manager asks for its kernels right after."""


def offered(qualname: str) -> bool:
    """True when `qualname` can be imported; an error inside an existing module is raised, not hidden."""
    module, _, name = qualname.rpartition(".")
    return importlib.util.find_spec(module) is not None and hasattr(importlib.import_module(module), name)


def wrap_lora_manager(original: Callable[..., Any]) -> Callable[..., Any]:
    """A factory in place of vLLM's worker LoRA manager class; same arguments, one of two classes."""

    @functools.wraps(original, updated=())
    def make_lora_manager(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        global _current
        _current = config_of(vllm_config)
        return lora_manager_class(_current, original)(vllm_config, *args, **kwargs)

    return make_lora_manager


def lora_manager_class(config: LoRAServeConfig | None, stock: Any) -> Callable[..., Any]:
    """The manager class for an engine with these options (None: the flag is off)."""
    if config is None:
        return stock
    from vllm_loraserve import plugin

    if (problem := plugin.install_worker_hooks()) is not None:
        raise RuntimeError(problem)
    from vllm_loraserve.engine.side_loading import side_loading

    if not offered(MANAGER):
        return side_loading(stock)
    module, _, name = MANAGER.rpartition(".")
    return side_loading(getattr(importlib.import_module(module), name))


def wrap_get_punica_wrapper(original: Callable[..., str]) -> Callable[..., str]:
    """Platform.get_punica_wrapper that names our kernels for an engine with the flag."""

    @functools.wraps(original)
    def get_punica_wrapper(cls: Any) -> str:
        stock = original(cls)
        ours = PUNICA_WRAPPERS.get(stock)
        if _current is None or ours is None or not offered(ours):
            return stock
        return ours

    return get_punica_wrapper


def wrap_initialize_from_config(original: Callable[..., None]) -> Callable[..., None]:
    """WorkerWrapperBase.initialize_from_config that tells a LoRA manager of ours what the KV cache has become."""

    @functools.wraps(original)
    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        original(self, kv_cache_configs)
        manager = getattr(self.worker.model_runner, "lora_manager", None)
        allocated = getattr(manager, "kv_cache_allocated", None)
        if allocated is not None:
            allocated(kv_cache_configs[self.global_rank])

    return initialize_from_config
