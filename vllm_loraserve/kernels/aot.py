"""Ahead-of-time compilation of the kernels for GPUs that are not here: registers, spills, shared memory,
copies.

The compiler and its tools come with Triton, so that a machine without a GPU can refuse a change that makes
the kernels spill or lose their software pipeline. This says nothing about speed or results on a device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_loraserve.kernels.tuning import LaunchConfig

TRITON_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_TABLES = ("table_stride", "ranks_stride", "h_rows")
_SHRINK_UNSPECIALISED = (*_TABLES, "split_shift")
_LOAD = r"\bld\.global"
_EXPAND_UNSPECIALISED = ("n_blocks", *_TABLES)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one variant. Counts are of instructions in the code, not of executions."""

    registers: int
    spill_instructions: int
    """Loads and stores of local memory in the machine code."""
    barriers: int
    """Waits of a whole thread block in the machine code."""
    shared_bytes: int
    loads: int
    """Loads from device memory into registers, of any width."""
    loads_16_bytes: int
    loads_before_wait: int
    """Of those, the ones that stand before the first wait for the launch before; 0 where there is no such wait."""
    lets_next_launch_start: bool
    async_copies: int
    async_copies_16_bytes: int
    matrix_instructions: int


def compile_shrink(
    config: LaunchConfig, *, dtype: str, capability: int, n_slices: int = 3, aligned: bool = True, even_k: bool = True
) -> Compiled:
    """Compile the shrink kernel; `capability` e.g. 90; `aligned`: every row starts on a 16-byte boundary;
    `even_k`: K is a multiple of the block."""
    from vllm_loraserve.kernels.triton_shrink import shrink_kernel

    constants = {
        "N_SLICES": n_slices,
        "PAGE_ROWS": 8,
        "BLOCK_M": config.block_m,
        "BLOCK_R": config.block_r,
        "BLOCK_K": config.block_k,
        "EVEN_K": even_k,
        "ALIGNED": aligned,
        "DEPENDENT_LAUNCH": config.dependent_launch,
    }
    pointers = _pointers("x_ptr arena_ptr", "table_ptr ranks_ptr header_ptr perm_ptr items_ptr", dtype)
    return _compile(
        shrink_kernel,
        pointers,
        constants,
        _SHRINK_UNSPECIALISED + (() if aligned else ("K", "x_stride", "page_stride")),
        capability,
        config.shrink_warps,
        config.shrink_stages,
    )


def compile_expand(
    config: LaunchConfig, *, dtype: str, capability: int, add_inputs: bool = True, aligned: bool = True
) -> Compiled:
    """Compile the expand kernel; `aligned`: rank rows and output slices start on 16-byte boundaries."""
    from vllm_loraserve.kernels.triton_expand import expand_kernel

    constants = {
        "PAGE_ROWS": 8,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_RANK": config.block_rank,
        "SPLIT_K": config.split_k,
        "PLANES": config.expand_planes,
        "ADD_INPUTS": add_inputs,
        "ALIGNED": aligned,
        "EARLY_Y": config.expand_early_y,
        "DEPENDENT_LAUNCH": config.dependent_launch,
    }
    pointers = _pointers("y_ptr arena_ptr", "table_ptr ranks_ptr blocks_ptr header_ptr perm_ptr tiles_ptr", dtype)
    return _compile(
        expand_kernel,
        pointers,
        constants,
        _EXPAND_UNSPECIALISED + (() if aligned else ("y_stride", "page_stride")),
        capability,
        config.expand_warps,
        config.expand_stages,
    )


def _pointers(of_dtype: str, of_int32: str, dtype: str) -> dict[str, str]:
    return (
        dict.fromkeys(of_dtype.split(), "*" + TRITON_TYPES[dtype])
        | dict.fromkeys(of_int32.split(), "*i32")
        | {"slices_ptr": "*i64", "h_ptr": "*fp32"}
    )


def _compile(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, int | bool],
    unspecialised: tuple[str, ...],
    capability: int,
    warps: int,
    stages: int,
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name, "i32")
        if name not in unspecialised:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    ptx = built.asm["ptx"]
    before, waits, _ = ptx.partition("griddepcontrol.wait")
    registers, spills, barriers = _machine_code(built.asm["cubin"])
    return Compiled(
        registers=registers,
        spill_instructions=spills,
        barriers=barriers,
        shared_bytes=built.metadata.shared,
        loads=len(re.findall(_LOAD, ptx)),
        loads_16_bytes=len(re.findall(_LOAD + r"\.v4\.b32", ptx)),
        loads_before_wait=len(re.findall(_LOAD, before)) if waits else 0,
        lets_next_launch_start="griddepcontrol.launch_dependents" in ptx,
        async_copies=len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        async_copies_16_bytes=len(re.findall(r"cp\.async\.c[ag]\.shared[^;]*,\s*0x10\b", ptx)),
        matrix_instructions=len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx)),
    )


def _machine_code(cubin: bytes) -> tuple[int, int, int]:
    """Registers per thread, local-memory instructions and barriers of a compiled kernel."""
    import triton.backends.nvidia as nvidia

    tool = Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", "--dump-sass", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"\bREG:(\d+)", text)
    if registers is None or "EXIT" not in text:
        raise RuntimeError(f"cuobjdump reported neither resources nor machine code: {text[:200]!r}")
    return int(registers[1]), len(re.findall(r"\b(?:STL|LDL)\b", text)), len(re.findall(r"\bBAR\.", text))
