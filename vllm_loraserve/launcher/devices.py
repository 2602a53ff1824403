"""What each instance gets of this machine: GPUs, or cores and memory. Pure, given what there is."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

MIN_KV_BYTES, MAX_KV_BYTES = 256 << 20, 8 << 30
CPU_MAX_LORAS, GPU_MAX_LORAS = 8, 32


@dataclass(frozen=True)
class Machine:
    """What there is to share out."""

    gpus: int = 0
    cores: int = 1
    memory_bytes: int = 8 << 30
    """Memory that is available now."""


@dataclass(frozen=True)
class Share:
    """What one instance gets: environment variables and `vllm serve` options."""

    env: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def this_machine() -> Machine:
    """Asks the system; GPUs by nvidia-smi, so that no CUDA context is opened here."""
    gpus = 0
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True)
        gpus = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            gpus = min(gpus, len([d for d in visible.split(",") if d.strip() not in ("", "-1")]))
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        memory = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        pass
    return Machine(gpus, len(os.sched_getaffinity(0)), memory)


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

    With GPUs: as many per instance as its tensor parallel size, in turn; instances that must share a GPU share its
    memory. Without: the cores are divided, and a KV cache that leaves room for weights is set, since vLLM's own default
    on a CPU takes half of the memory for each instance.
    """

    def unless_given(*options: str) -> tuple[str, ...]:
        return () if value_of(options[0], given) is not None else options

    if machine.gpus == 0:
        cores = max(1, machine.cores // instances)
        kv_bytes = min(MAX_KV_BYTES, max(MIN_KV_BYTES, machine.memory_bytes // 10 // instances))
        # Two instances that bind to the same cores halve each other.
        env = {"OMP_NUM_THREADS": str(cores), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_TARGET_DEVICE": "cpu"}
        options = unless_given("--kv-cache-memory-bytes", str(kv_bytes))
        options += unless_given("--max-loras", str(CPU_MAX_LORAS))
        return [Share(env, options)] * instances
    parallel = int(value_of("--tensor-parallel-size", given) or value_of("-tp", given) or 1)
    shares = []
    per_gpu = -(-instances * parallel // machine.gpus)
    for index in range(instances):
        devices = [(index * parallel + i) % machine.gpus for i in range(parallel)]
        options = unless_given("--max-loras", str(GPU_MAX_LORAS))
        if per_gpu > 1:
            options += unless_given("--gpu-memory-utilization", f"{0.9 / per_gpu:.2f}")
        shares.append(Share({"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}, options))
    return shares
