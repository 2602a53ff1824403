"""What the end of a test run's log says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FAILURES = Path(__file__).parents[1] / "scripts" / "failures.py"
TESTS = """
import pytest

@pytest.fixture
def broken():
    raise OSError("no such thing")

def test_right(): pass
def test_wrong(): assert {"a": 1} == {"a": 2}
def test_unready(broken): pass
"""


def said(report: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FAILURES), str(report)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_failure_is_named_with_the_end_of_its_error(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_some.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1
    told = said(report)
    assert told.returncode == 0
    assert "FAILURE test_some::test_wrong\n" in told.stdout
    assert "assert {'a': 1} == {'a': 2}" in told.stdout
    assert "ERROR test_some::test_unready\n" in told.stdout
    assert "OSError: no such thing" in told.stdout
    assert "test_right" not in told.stdout


def test_a_run_without_a_report_is_told(tmp_path: Path) -> None:
    told = said(tmp_path / "none.xml")
    assert told.returncode == 1
    assert "pytest left no report" in told.stdout


def test_what_can_not_be_compiled_here_is_no_silent_pass(tmp_path: Path) -> None:
    script = FAILURES.with_name("not_run.py")
    environment = {
        "PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(FAILURES.parents[1]), *filter(None, sys.path)]),
        "LORASERVE_POOL_LIBRARY": str(tmp_path / "absent.so"),
    }

    def lines() -> str:
        run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment)
        return run.stdout

    assert "NOT RUN compiling the CUDA kernels, and them on a stand-in driver: needs nvcc on the PATH\n" in lines()
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert "nvcc" not in lines()
    assert "scripts/not_run.py" in FAILURES.with_name("test.sh").read_text()
