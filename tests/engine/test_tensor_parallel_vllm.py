"""Real tensor parallel: two workers, each with its shard of the pages, answer as one worker and as stock vLLM do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from offline_tensor_parallel import SHAPES

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).parent / "offline_tensor_parallel.py"
ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # By itself vLLM binds one worker to one NUMA node, and a small machine has one.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
OURS = {"additional_config": {"loraserve": {"arena_rank_rows": 64}}}
ENGINES: dict[str, dict[str, Any]] = {
    "one": OURS,
    "two": {**OURS, "tensor_parallel_size": 2},
    "stock": {"enable_lora": True, "max_lora_rank": 32, "tensor_parallel_size": 2},
    "sharded": {**OURS, "max_lora_rank": 32, "tensor_parallel_size": 2, "fully_sharded_loras": True},
}
Answers = dict[str, list[list[tuple[int, float]]]]


def run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), json.dumps(options)],
        env={**os.environ, **ENV},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return dict(json.loads(line.removeprefix("RESULT ")))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every engine answers; two at a time, as most of each is its start. Each has a model of its own on disk."""
    folder = tmp_path_factory.mktemp("parallel")
    with ThreadPoolExecutor(2) as pool:
        done = {name: pool.submit(run, folder / name, options) for name, options in ENGINES.items()}
        return {name: result.result() for name, result in done.items()}


def assert_same(got: Answers, want: Answers) -> None:
    """Equal tokens, and log-probabilities apart by no more than fp32 sums in another order."""
    assert got.keys() == want.keys()
    for name in want:
        for mine, theirs in zip(got[name], want[name], strict=True):
            assert [token for token, _ in mine] == [token for token, _ in theirs], name
            assert [p for _, p in mine] == pytest.approx([p for _, p in theirs], abs=1e-3), name


def test_two_workers_answer_as_one(engines: dict[str, dict[str, Any]]) -> None:
    assert_same(engines["two"]["answers"], engines["one"]["answers"])
    assert len({json.dumps(answer) for answer in engines["one"]["answers"].values()}) == 5, "each adapter tells"


def test_two_workers_answer_as_stock(engines: dict[str, dict[str, Any]]) -> None:
    assert_same(engines["two"]["answers"], engines["stock"]["answers"])


def test_each_worker_holds_its_shard(engines: dict[str, dict[str, Any]]) -> None:
    (alone,), (first, second) = engines["one"]["workers"], engines["two"]["workers"]
    assert (first["down_proj_in"], second["down_proj_in"]) == (alone["down_proj_in"] // 2,) * 2
    assert first["paged"] == second["paged"] == 8
    fingerprints = {worker["fingerprint"] for worker in (alone, first, second)}
    assert len(fingerprints) == 3, "pages of one shard must never be taken for another's"


def test_every_worker_tells_the_sizes_of_the_whole_model(engines: dict[str, dict[str, Any]]) -> None:
    """Of the modules as adapters name them; the model has two key-value heads, and pages or not is all the same."""
    whole = {name.rsplit(".", 1)[-1]: [list(sizes)] for name, sizes in SHAPES.items()}
    fused = {"qkv_proj": [[64, 128 + 64 + 64]], "gate_up_proj": [[64, 2 * 96]]}
    for name in ("one", "two", "sharded"):
        for worker in engines[name]["workers"]:
            told = dict(worker["shapes"])
            assert {key for key in told if key not in whole | fused} == {"embed_tokens", "lm_head"}
            assert {key: sizes for key, sizes in told.items() if sizes} == whole | fused


def test_fully_sharded_loras_stay_on_vllms_path(engines: dict[str, dict[str, Any]]) -> None:
    assert_same(engines["sharded"]["answers"], engines["stock"]["answers"])
    for worker in engines["sharded"]["workers"]:
        assert worker["paged"] == 0
        assert any(name.endswith("ShardedLoRA") for name in worker["on_vllms_path"])
