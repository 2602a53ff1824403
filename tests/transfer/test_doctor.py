"""`vllm-loraserve doctor` as a process: what it prints, what it demands."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from transfer.helpers import PATIENCE_S


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_loraserve.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
    )


def test_the_table_names_every_way():
    run = doctor()
    assert run.returncode == 0, run.stderr
    for way in ("memfd", "cuda_ipc", "verbs", "verbs_gpudirect", "tcp", "nixl"):
        assert f"\n  {way} " in run.stdout
    assert "ways between instances" in run.stdout


def test_json_and_requirements():
    run = doctor("--json", "--require", "tcp", "--require", "memfd")
    assert run.returncode == 0
    result = json.loads(run.stdout)
    assert result["ways"]["tcp"] == ""
    broken = next((name for name, why in result["ways"].items() if why), None)
    if broken is not None:
        run = doctor("--require", broken)
        assert run.returncode == 1
        assert f"{broken} is required and does not work: {result['ways'][broken]}" in run.stderr


def test_a_missing_extension_is_named(tmp_path):
    run = doctor("--json", LORASERVE_POOL_LIBRARY=str(tmp_path / "absent.so"))
    assert run.returncode == 0
    ways = json.loads(run.stdout)["ways"]
    assert "absent.so does not exist" in ways["extension"]
    assert ways["tcp"] == ways["memfd"] == ""
