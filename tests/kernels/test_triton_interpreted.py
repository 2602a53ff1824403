"""Runs the checks of `interpreted/` under Triton's interpreter, each file in a process of its own.

TRITON_INTERPRET is read when Triton is imported, and other tests of this process may have imported it
already.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be checked here")

CHECKS = sorted(Path(__file__).with_name("interpreted").glob("check_*.py"))
NEED_VLLM = {"check_engine", "check_punica_gpu"}


def test_there_are_checks():
    assert {path.stem for path in CHECKS} >= NEED_VLLM | {"check_lora_linear", "check_stock_parity", "check_cost"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.vllm] if path.stem in NEED_VLLM else []) for path in CHECKS],
)
def test_interpreted(path):
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1700, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout.splitlines()[-1]
