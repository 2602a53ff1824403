"""Faults on a real engine with two workers: a truncated checkpoint ends its own requests, a dead worker ends the engine
as vLLM does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

PROGRAM = Path(__file__).parent / "offline_faults.py"
ENV = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
OURS = {"additional_config": {"loraserve": {"arena_rank_rows": 64, "load_timeout_s": 600}}}
STOCK = {"enable_lora": True, "max_lora_rank": 32}


def run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), json.dumps(options)],
        env={**os.environ, **ENV},
        capture_output=True,
        text=True,
        timeout=800,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line is not None, done.stdout[-6000:] + done.stderr[-6000:]
    return dict(json.loads(line.removeprefix("RESULT ")))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("ours"), OURS)


def test_a_checkpoint_truncated_after_it_was_taken_ends_its_own_request(ours: dict[str, Any]) -> None:
    seen = ours["truncated"]
    assert seen["taken"]
    count, why, reason = seen["bad"]
    assert (count, why) == (0, "error"), seen["bad"]
    assert "400" in reason
    assert "'all-24' can't be loaded" in reason
    assert seen["good"][:2] == [4, "length"]
    assert seen["repaired"][:2] == [4, "length"], "the next request tries anew"


def test_sleep_and_waking_while_an_adapter_loads(ours: dict[str, Any]) -> None:
    assert ours["asleep"]["in_sleep"] == [True, False]
    assert ours["asleep"]["woken"][:2] == [4, "length"]


def test_a_dead_worker_ends_the_engine_as_vllm_does(ours: dict[str, Any], tmp_path: Path) -> None:
    stock = run(tmp_path, STOCK)
    assert ours["killed"] == stock["killed"]
    assert ours["killed"] == {"ended": "EngineDeadError", "errored": True, "next": "EngineDeadError"}
