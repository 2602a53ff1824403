"""vLLM's own Triton LoRA kernels, loaded from the Python sources of an installed or unpacked vLLM wheel.

The comparison (tests, cost count, GPU benchmark) must run the very kernels that users run today, also where
vLLM cannot be imported: on a GPU machine without vLLM, or on a CPU where vLLM disables Triton. Only the LoRA
op files are executed, under private module names; the handful of helpers that they import from the rest of
vLLM are replaced by equivalents defined here. Nothing of vLLM is copied into this repository.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

OPS = "lora/ops/triton_ops"
FILES = ("utils", "kernel_utils", "lora_kernel_metadata", "lora_shrink_op", "lora_expand_op")


def find_vllm_source(path: str | Path | None = None) -> Path:
    """The `vllm` package folder: `path` itself, `path/vllm`, or the installed package. No vLLM code is
    run."""
    if path is None:
        spec = importlib.machinery.PathFinder.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "vLLM is not installed; unpack its wheel and name the folder with --vllm-source DIR"
            )
        return Path(next(iter(spec.submodule_search_locations)))
    for folder in (Path(path), Path(path) / "vllm"):
        if (folder / OPS / "lora_shrink_op.py").is_file():
            return folder
    raise FileNotFoundError(f"{path} holds no {OPS}/lora_shrink_op.py: not an unpacked vLLM wheel")


def load_stock(source: str | Path | None = None) -> SimpleNamespace:
    """vLLM's `lora_shrink`, `lora_expand`, `LoRAKernelMeta`, `get_lora_op_configs` and the modules they live
    in.

    Triton is imported; set TRITON_INTERPRET=1 first to run the kernels on CPU tensors.
    """
    return _load(find_vllm_source(source))


@functools.cache
def _load(folder: Path) -> SimpleNamespace:
    with _stand_ins():
        modules = {name: _execute(folder / OPS / f"{name}.py", name) for name in FILES}
    return SimpleNamespace(
        folder=folder,
        version=_version(folder),
        modules=modules,
        lora_shrink=modules["lora_shrink_op"]._lora_shrink,
        lora_expand=modules["lora_expand_op"]._lora_expand,
        LoRAKernelMeta=modules["lora_kernel_metadata"].LoRAKernelMeta,
        get_lora_op_configs=modules["utils"].get_lora_op_configs,
        forget_addresses=lambda: _forget_addresses(modules["utils"]),
    )


def _forget_addresses(utils: ModuleType) -> None:
    """vLLM keeps pointers and strides by the address of a weight; a new weight at an old address must not find them."""
    utils.__dict__["_LORA_A_PTR_DICT"].clear()
    utils.__dict__["_LORA_B_PTR_DICT"].clear()


@contextmanager
def configured(stock: SimpleNamespace, change: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Run vLLM's kernels with other block sizes: `change(op_type, default_config)` returns the configuration
    to use."""
    modules = [stock.modules["lora_shrink_op"], stock.modules["lora_expand_op"]]
    originals = [module.get_lora_op_configs for module in modules]

    def changed(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def get_lora_op_configs(op_type: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return change(op_type, dict(original(op_type, *args, **kwargs)))

        return get_lora_op_configs

    for module, original in zip(modules, originals, strict=True):
        module.get_lora_op_configs = changed(original)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.get_lora_op_configs = original


@dataclass(frozen=True)
class RecordedLaunch:
    """A kernel launch that was asked for: its grid and all arguments by name."""

    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


@contextmanager
def recorded(stock: SimpleNamespace) -> Iterator[list[RecordedLaunch]]:
    """Inside the block vLLM's shrink and expand ops do everything but launch: what they would launch is listed."""
    launches: list[RecordedLaunch] = []
    replaced = [
        (stock.modules["lora_shrink_op"], "_lora_shrink_kernel"),
        (stock.modules["lora_expand_op"], "_lora_expand_kernel"),
    ]
    originals = [getattr(module, name) for module, name in replaced]
    for (module, name), kernel in zip(replaced, originals, strict=True):
        setattr(module, name, _Recorder(kernel.arg_names, launches))
    try:
        yield launches
    finally:
        for (module, name), kernel in zip(replaced, originals, strict=True):
            setattr(module, name, kernel)


class _Recorder:
    def __init__(self, names: list[str], launches: list[RecordedLaunch]) -> None:
        self._names, self._launches = names, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._launches.append(RecordedLaunch(tuple(grid), dict(zip(self._names, args, strict=False)) | kwargs))

        return launch


def _version(folder: Path) -> str:
    try:
        text = (folder / "_version.py").read_text()
    except OSError:
        return "unknown"
    for line in text.splitlines():
        if line.startswith(("__version__ =", "version =", "__version__ = version =")):
            return line.rsplit("=", 1)[1].strip().strip("'\"")
    return "unknown"


def _execute(path: Path, name: str) -> ModuleType:
    """Run one source file under its vLLM name, so that its imports of the files before it resolve."""
    full = f"vllm.{OPS.replace('/', '.')}.{name}"
    spec = importlib.util.spec_from_file_location(full, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Put stand-ins for the rest of vLLM in `sys.modules` while the files run, and what was there back
    afterwards."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(_make_stand_ins())
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]
        sys.modules.update(before)


def _make_stand_ins() -> dict[str, ModuleType]:
    import triton
    import triton.language as tl

    logger = logging.getLogger("vllm_loraserve.stock_kernels")
    cuda = torch.cuda.is_available()
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.envs": {
            "VLLM_BATCH_INVARIANT": False,
            "VLLM_LORA_ENABLE_DUAL_STREAM": False,
            "VLLM_LORA_DISABLE_PDL": False,
            "VLLM_TUNED_CONFIG_FOLDER": None,
        },
        "vllm.logger": {"init_logger": lambda name: _OnceLogger(logger)},
        "vllm.platforms": {
            "current_platform": SimpleNamespace(
                is_cuda=lambda: cuda,
                has_device_capability=lambda cc: cuda and torch.cuda.get_device_capability()[0] * 10 >= cc,
            )
        },
        "vllm.triton_utils": {"tl": tl, "triton": triton, "HAS_TRITON": True},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"next_power_of_2": lambda n: 1 << max(n - 1, 0).bit_length()},
        "vllm.utils.torch_utils": {
            "direct_register_custom_op": _do_not_register,
            "async_tensor_h2d": lambda data, dtype=None, device=None, **_: torch.tensor(
                data, dtype=dtype, device=device
            ),
        },
        "vllm.lora": {},
        "vllm.lora.ops": {},
        "vllm.lora.ops.triton_ops": {},
    }
    modules = {}
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(attributes)
        modules[name] = module
    modules["vllm"].__dict__["envs"] = modules["vllm.envs"]
    return modules


def _do_not_register(*args: Any, **kwargs: Any) -> None:
    """The op files fall back to the plain function when registration raises AttributeError."""
    raise AttributeError


class _OnceLogger:
    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name.removesuffix("_once"))
