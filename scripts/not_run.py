"""Prints one line, NOT RUN and why, for each part of the tests that this machine can't run.

python scripts/not_run.py

For the verdicts at the end of scripts/test.sh: a part that was left out must not look like one that passed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vllm_loraserve.memory import extension


def not_run() -> list[str]:
    """What is missing, a sentence each."""
    library = extension.load()
    report = library.probe() if library is not None else None
    missing = []
    if shutil.which("nvcc") is None and not (report is not None and report.cuda_kernels):
        missing.append("compiling the CUDA kernels, and them on a stand-in driver: needs nvcc on the PATH")
    if report is None or not report.cuda.devices:
        missing.append("tests on a GPU (-m gpu): none here")
    if not Path("/sys/class/infiniband").is_dir() or not any(Path("/sys/class/infiniband").iterdir()):
        missing.append("tests on an RDMA device of this machine (-m rdma): none here; the virtual machines have one")
    return missing


if __name__ == "__main__":
    for line in not_run():
        print("NOT RUN", line)
