"""What each instance gets of this machine: GPUs, or cores and memory. Pure, given what there is."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_loraserve import cgroup
from vllm_loraserve.launcher.errors import StartError

MIN_KV_BYTES, MAX_KV_BYTES = 256 << 20, 8 << 30
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """What there is to share out."""

    gpu_ids: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them: indices or UUIDs."""
    cores: int = 1
    memory_bytes: int = 8 << 30
    """Memory that is available now."""
    slow_bfloat16: bool = False
    """No GPU, and a CPU that computes in bfloat16 several times as slowly as in float32."""


@dataclass(frozen=True)
class Share:
    """What one instance gets: environment variables and `vllm serve` options."""

    env: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def this_machine() -> Machine:
    """Asks the system; GPUs by nvidia-smi, so that no CUDA context is opened here. Within a container: its limits."""
    gpus: tuple[str, ...] = ()
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True)
        count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
        gpus = visible_gpus(count, os.environ.get("CUDA_VISIBLE_DEVICES"))
    cores = len(os.sched_getaffinity(0))
    return Machine(
        gpus,
        min(cores, cgroup.limits().cores or cores),
        cgroup.available_memory(),
        slow_bfloat16=not gpus and lacks_bfloat16(CPU_INFO),
    )


def lacks_bfloat16(cpu_info: Path) -> bool:
    """An x86 CPU without AVX-512, for which PyTorch's matrix library has no product of bfloat16 matrices: a prompt
    takes 6 to 7 times as long as in float32, a decode step of 8 requests 2.5 times (SmolLM2-135M, AVX2)."""
    try:
        text = cpu_info.read_text()
    except OSError:
        return False
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), None)
    return flags is not None and "avx512f" not in flags


def visible_gpus(count: int, visible: str | None) -> tuple[str, ...]:
    """Which of `count` GPUs CUDA uses; of `visible`, CUDA_VISIBLE_DEVICES, those before the first that is none."""
    if visible is None or count == 0:
        return tuple(map(str, range(count)))
    given = (name.strip() for name in visible.split(","))
    return tuple(
        itertools.takewhile(lambda name: int(name) < count if name.isdecimal() else name not in ("", "-1"), given)
    )


def value_of(option: str, options: Sequence[str]) -> str | None:
    """The value that `options` give to `option` (`--name value` or `--name=value`; `-` and `_` are the same)."""
    wanted = option.replace("_", "-")
    for position, text in enumerate(options):
        name, equals, value = text.partition("=")
        if name.replace("_", "-") == wanted:
            if equals:
                return value
            return options[position + 1] if position + 1 < len(options) else ""
    return None


def values_of(option: str, options: Sequence[str]) -> list[str]:
    """As `value_of`, for an option that takes several (`--name one two`); empty when it is not given."""
    wanted = option.replace("_", "-")
    for position, text in enumerate(options):
        name, equals, value = text.partition("=")
        if name.replace("_", "-") == wanted:
            if equals:
                return [value]
            return list(itertools.takewhile(lambda text: not text.startswith("-"), options[position + 1 :]))
    return []


def share(machine: Machine, instances: int, given: Sequence[str] = ()) -> list[Share]:
    """One Share per instance. What the user gives (`given`: options for `vllm serve`) is never overridden.

    With GPUs: as many per instance as it has ranks, in turn; instances that must share a GPU share its memory.
    StartError when one instance wants more than there are. Without: the cores are divided, and a KV cache that leaves
    room for weights is set, since vLLM's own default on a CPU takes half of the memory for each instance.
    """

    def unless_given(*options: str) -> tuple[str, ...]:
        return () if value_of(options[0], given) is not None else options

    if not machine.gpu_ids:
        cores = max(1, machine.cores // instances)
        kv_bytes = min(MAX_KV_BYTES, max(MIN_KV_BYTES, machine.memory_bytes // 10 // instances))
        # Two instances that bind to the same cores halve each other.
        env = {"OMP_NUM_THREADS": str(cores), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_TARGET_DEVICE": "cpu"}
        options = unless_given("--kv-cache-memory-bytes", str(kv_bytes))
        return [Share(env, options)] * instances
    gpus = len(machine.gpu_ids)
    parallel = _size("--tensor-parallel-size", "-tp", given) * _size("--pipeline-parallel-size", "-pp", given)
    if parallel > gpus:
        raise StartError(f"each instance is to run on {parallel} GPUs, and there are {gpus}; see its parallel sizes")
    shares = []
    per_gpu = -(-instances * parallel // gpus)
    for index in range(instances):
        devices = [machine.gpu_ids[(index * parallel + i) % gpus] for i in range(parallel)]
        options = unless_given("--gpu-memory-utilization", f"{0.9 / per_gpu:.2f}") if per_gpu > 1 else ()
        shares.append(Share({"CUDA_VISIBLE_DEVICES": ",".join(devices)}, options))
    return shares


def _size(option: str, short: str, given: Sequence[str]) -> int:
    text = value_of(option, given) or value_of(short, given) or "1"
    if not text.isdecimal() or int(text) < 1:
        raise StartError(f"{option} {text!r} is no whole number above 0")
    return int(text)
