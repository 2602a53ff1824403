"""`vllm-loraserve doctor`: what this machine has for the adapter pool, and which ways between instances that opens."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import sys
from pathlib import Path

from vllm_loraserve.memory import extension
from vllm_loraserve.memory.slab import HostSlab
from vllm_loraserve.transfer.rungs import nixl, pyverbs_loader
from vllm_loraserve.transfer.rungs.verbs_device import gpudirect_reason, open_device, peermem_loaded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--require",
        metavar="WAY",
        action="append",
        default=[],
        choices=("extension", "memfd", "cuda_ipc", "verbs", "verbs_gpudirect", "tcp", "nixl"),
        help="exit with status 1 unless this works here; may be given again",
    )


def _memory() -> dict[str, str]:
    huge = "?"
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Total"):
            huge = line.split()[1]
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    lock = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    with HostSlab(1 << 21) as slab:
        granted = [
            name
            for name, bit in (("huge pages", extension.HUGE), ("page-locked", extension.PINNED))
            if slab.granted & bit
        ]
    return {
        "huge pages reserved": huge,
        "locked memory limit": lock,
        "a slab gets": ", ".join(granted) or "4 KiB pages",
    }


def _ways(report: extension.Report | None) -> dict[str, str]:
    """Each way: empty where this machine's end of it works, else why not."""
    missing = extension.missing_reason()
    device, verbs = open_device()
    try:
        gpudirect = gpudirect_reason(device) if device is not None else verbs
    finally:
        if device is not None:
            device.close()
    gpus = report.cuda.devices if report else ()
    cuda = missing or ("" if gpus else f"no GPU ({report.cuda.error or 'none found'})" if report else "")
    return {
        "extension": missing,
        "memfd": "" if hasattr(os, "memfd_create") else "this system has no memfd",
        "cuda_ipc": cuda,
        "verbs": verbs,
        "verbs_gpudirect": gpudirect,
        "tcp": "",
        "nixl": "not installed (pip install 'vllm-loraserve[nixl]')"
        if importlib.util.find_spec("nixl") is None
        else nixl.unusable(),
    }


MEANING = {
    "extension": "device slab, pinned slab, fast checksums",
    "memfd": "adapters from an instance on this host: one copy",
    "cuda_ipc": "the same between GPUs of this host",
    "verbs": "RDMA READ into host memory",
    "verbs_gpudirect": "RDMA READ between GPUs",
    "tcp": "everything else, always there",
    "nixl": "optional back end, only when named",
}


def examine() -> dict[str, object]:
    """Everything that is printed, as plain values."""
    library = extension.load()
    report = library.probe() if library else None
    pyverbs, pyverbs_reason = pyverbs_loader.load()
    found: dict[str, str] = {"extension": str(library.path) if library else extension.missing_reason()}
    if report is not None:
        found["checksum"] = report.hash
        found["CUDA kernels"] = "sm_80, sm_90, sm_100 and PTX" if report.cuda_kernels else "not built (no nvcc)"
        found["libcuda"] = report.cuda.library if report.cuda.loaded else report.cuda.error
        for i, gpu in enumerate(report.cuda.devices):
            found[f"GPU {i}"] = (
                f"{gpu.name}, {gpu.bytes >> 30} GiB, sm_{gpu.capability.replace('.', '')}, "
                f"GPUDirect {'yes' if gpu.gpudirect else 'no'}, dma-buf {'yes' if gpu.dma_buf else 'no'}"
            )
        found["libibverbs"] = report.verbs.error or report.verbs.library
        for nic in report.verbs.devices:
            found[f"RDMA {nic.name}"] = f"dma-buf {nic.dma_buf}"
    found["pyverbs"] = str(Path(pyverbs.device.__file__).parent) if pyverbs else pyverbs_reason
    found["nvidia-peermem"] = "loaded" if peermem_loaded() else "not loaded"
    found.update(_memory())
    return {"found": found, "ways": _ways(report)}


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 when something required does not work here."""
    result = examine()
    ways = result["ways"]
    assert isinstance(ways, dict)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        found = result["found"]
        assert isinstance(found, dict)
        print("found")
        for name, text in found.items():
            print(f"  {name:<20} {text}")
        print("ways between instances")
        for name, why in ways.items():
            print(f"  {name:<20} {'works' if not why else 'no: ' + why} ({MEANING[name]})")
    broken = [name for name in args.require if ways[name]]
    for name in broken:
        print(f"vllm-loraserve doctor: {name} is required and does not work: {ways[name]}", file=sys.stderr)
    return 1 if broken else 0
