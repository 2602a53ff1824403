"""vLLM's own features with the flag on: speculative decoding, structured output, priorities and preemption, a KV
connector, pause and resume, sleep, abort while an adapter loads. Two engines in one program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = [
    "Count again and again: one two three four one two three four one two three four one two three four one two",
    "The colours are red green blue, red green blue, red green blue, red green blue, and once more red green",
]


def test_features_of_vllm_with_adapters(model_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    names = ["one", "two", "paused", "aborted"]
    adapters = {name: str(make_adapter(name, 8 * (1 + n % 2), n + 1, 0.05)) for n, name in enumerate(names)}
    asked = {"model": str(model_dir), "adapters": adapters, "folder": str(tmp_path / "kv"), "prompts": PROMPTS}
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    program = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline_upstream.py")), json.dumps(asked)],
        capture_output=True,
        text=True,
        env=env,
        timeout=800,
        check=False,
    )
    line = next((each for each in program.stdout.splitlines() if each.startswith("RESULT ")), None)
    assert line is not None, program.stdout[-2000:] + program.stderr[-4000:]
    result = json.loads(line.removeprefix("RESULT "))
    speculative, interrupted = result["a"], result["b"]

    expected = {(name, at // 5): tokens for at, (name, *tokens) in enumerate(speculative["tokens"])}
    assert len(expected) == 10
    assert len({tuple(tokens) for tokens in expected.values()}) > 5, "adapters answer differently"
    assert speculative["accepted"] > 0, "drafts were made and taken"
    assert len(speculative["formed"]) == 5
    assert all(re.fullmatch("(yes|no)-[0-9]{3}", text) for text in speculative["formed"]), speculative["formed"]

    for at, (name, *tokens) in enumerate(interrupted["tokens"]):
        assert tokens == expected[name, at // 3], f"{name} with drafts, and without but by priority"
    assert interrupted["lengths"] == [180] * 6
    assert interrupted["preempted"] > 0
    assert not interrupted["while_paused"]
    assert interrupted["paused"] == expected["paused", 0]
    assert interrupted["aborted"] == expected["aborted", 0]
    assert interrupted["slept"] == expected["one", 0]
    assert interrupted["kept"][0] == interrupted["kept"][1]
    assert interrupted["hits"] > 0, "the connector gave its blocks"
