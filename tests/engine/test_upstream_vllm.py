"""vLLM's own features with adapters: speculative decoding, structured output, preemption, a KV connector, pause and
resume, sleep, abort while an adapter loads. Two engines in one program (`offline_upstream.py`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = [
    "Count again and again: one two three four one two three four one two three four one two three four one two",
    "The colours are red green blue, red green blue, red green blue, red green blue, and once more red green",
]
ADAPTERS = {"one": (16, 11), "two": (8, 6), "late": (8, 8), "gone": (8, 10)}
"""Rank and seed. With these no answer hangs on rounding: the best token's logit leads by 0.07 or more (the base model's
by 0.015), and every adapter answers the second prompt in its own way."""
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    # vLLM's drafting sets the number of OpenMP's threads to Numba's, and on a busy machine two wait for each other.
    "NUMBA_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


def answers(rows: list[tuple[str, str, list[int]]]) -> dict[tuple[str, str], list[int]]:
    return {(name, prompt): tokens for name, prompt, tokens in rows}


def test_features_of_vllm_with_adapters(model_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    asked = {
        "model": str(model_dir),
        "adapters": {name: str(make_adapter(name, rank, seed, 0.3)) for name, (rank, seed) in ADAPTERS.items()},
        "folder": str(tmp_path / "kv"),
        "prompts": PROMPTS,
        "whole": {name: f"{name}: {' '.join(PROMPTS)}" for name in ("one", "two")},
    }
    program = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline_upstream.py")), json.dumps(asked)],
        capture_output=True,
        text=True,
        env={**os.environ, **ENV},
        timeout=800,
        check=False,
    )
    line = next((each for each in program.stdout.splitlines() if each.startswith("RESULT ")), None)
    assert line is not None, program.stdout[-4000:] + program.stderr[-4000:]
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    first, second = result["speculative"], result["interrupted"]

    expected = answers(first["tokens"])
    alone = first["alone"]
    assert len(expected) == 6
    own = [*alone.values(), expected["base", PROMPTS[1]]]
    assert len(set(map(tuple, own))) == 5, "every adapter has its own answer"
    assert first["accepted"] > 0, "drafts were made and taken"
    assert first["preempted"] > 0
    assert max(first["begun"][1:]) < first["begun"][0], "five run at a time, and of these six the first one came last"
    assert len(first["formed"]) == 3
    assert all(re.fullmatch("(yes|no)-[0-9]{3}", text) for text in first["formed"]), first["formed"]
    for name in ("one", "two"):
        assert expected[name, PROMPTS[1]] == alone[name], "preempted in a batch, and alone"

    assert answers(second["tokens"]) == expected, "without drafts and preemption, and with them"
    assert second["in_pause"] == [False, True], "(the request had its answer, the engine is paused)"
    assert second["around_pause"] == {"late": alone["late"], "one": alone["one"]}
    assert second["cancelled"]
    assert second["others"] == alone["two"], "a load that is held holds nobody else up"
    assert second["again"] == alone["gone"]
    assert second["asleep"] == [True, False], "(asleep, after waking)"
    assert second["slept"] == alone["two"]
    late, gone, two = alone["late"], alone["gone"], alone["two"]
    assert second["replaced"] == [late, late, gone, gone, two], "each in place of the one before"
    assert second["kept"] == second["given"]
    assert second["kept"][0] != second["kept"][1]
    before, after = second["hits"]
    assert (before, after > 0) == (0, True), "the connector gave its blocks the second time"
