"""What a real worker answers the agent, and adapters that cross between it and a peer (`offline_residency.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from manager_machine import SHAPES

pytestmark = pytest.mark.vllm


def test_a_worker_says_what_it_holds_and_exchanges_adapters_with_a_peer(tmp_path):
    program = Path(__file__).with_name("offline_residency.py")
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                   "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
                   "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=800, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
    assert told["first"] == [[], [], {}, {}]
    hidden, inner = SHAPES["mlp.down_proj"][1], SHAPES["mlp.down_proj"][0]
    assert (told["shapes"]["down_proj"], told["shapes"]["up_proj"]) == ([[inner, hidden]], [[hidden, inner]])
    assert told["aside"][0] == []
    assert told["listed_aside"] == [], "vLLM's own list would call it absent"
    assert "broken" in told["error"]["2"]
    assert told["running"][0] == [1]
    assert told["running"][3] == {"1": told["generation"]}
    assert told["peer_got_it"]
    assert told["pages_from_peer"] == told["pages"], "byte for byte, its checkpoint gone"
    assert "has changed since 't' was registered" in told["overwritten"]["4"]
    assert not told["held"]
    assert told["generated"] == told["generated_again"] == 4
