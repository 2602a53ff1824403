"""The line that each step leaves in the file of `trace_schedule`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def test_trace_has_a_line_for_each_step(build: Any, tmp_path: Path) -> None:
    from scheduler_harness import checker, finished, make_request, run_until

    file = tmp_path / "deep" / "trace.jsonl"
    scheduler, _ = build(ranks={1: 16}, options={"trace_schedule": str(file)})
    scheduler.add_request(make_request("r", 20, 4, adapter=1))
    scheduler.add_request(make_request("b", 20, 4))
    run_until(scheduler, finished(scheduler), checker(scheduler))
    scheduler.trace.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(line["tokens"] for line in lines) == 2 * (20 + 3)
    assert sum(line["lora_tokens"].get("1", 0) for line in lines) == 20 + 3
    assert {line["engine"] for line in lines} == {0}
    assert {line["rank_rows"] for line in lines} >= {16}
    assert all(line["schedule_us"] > 0 for line in lines)
    sums = {key: sum(line[key] for line in lines) for key in lines[0] if key.startswith(("prefill", "decode"))}
    assert sums == {
        "prefill_tokens": 40,
        "prefill_token_ranks": 20 * 16,
        "decode_tokens": 6,
        "decode_token_ranks": 3 * 16,
    }
    assert sum(line["context_tokens"] for line in lines) == 2 * (21 + 22 + 23)
    assert [line["after_idle"] for line in lines] == [True] + [False] * (len(lines) - 1)
    assert {line["pid"] for line in lines} == {os.getpid()}
    assert {line["adapters"] for line in lines} == {0, 1}, "before the adapter is loaded, and then"


def test_the_first_step_after_a_pause_is_marked(build: Any, tmp_path: Path) -> None:
    from scheduler_harness import checker, finished, make_request, run_until

    file = tmp_path / "trace.jsonl"
    scheduler, _ = build(options={"trace_schedule": str(file)})
    for name in "ab":
        scheduler.add_request(make_request(name, 20, 3))
        run_until(scheduler, finished(scheduler), checker(scheduler))
    scheduler.trace.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["after_idle"] for line in lines] == [True, False, False] * 2


def test_trace_that_cannot_be_written_costs_no_step(build: Any, tmp_path: Path) -> None:
    from scheduler_harness import checker, finished, make_request, reasons, run_until

    (tmp_path / "file").write_text("")
    scheduler, _ = build(options={"trace_schedule": str(tmp_path / "file" / "x")})
    scheduler.add_request(make_request("r", adapter=1))
    assert reasons(run_until(scheduler, finished(scheduler), checker(scheduler))) == {"r": "length"}


def test_engines_that_share_a_file_leave_whole_lines_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with --data-parallel-size: every engine core has a scheduler with the same options."""
    from vllm_loraserve.engine import trace

    monkeypatch.setattr(trace, "FLUSH_BYTES", 1000)
    file = tmp_path / "trace.jsonl"
    engines = [trace.StepTrace(str(file), engine=number) for number in range(3)]
    for step in range(200):
        for number, engine in enumerate(engines):
            engine.write(step=step, pad="x" * (7 * number + step % 50))
    for engine in engines:
        engine.close()
        engine.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for number in range(3):
        assert [line["step"] for line in lines if line["engine"] == number] == list(range(200))


def test_a_disk_that_is_full_ends_the_trace_and_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_loraserve.engine import trace

    written = trace.StepTrace(str(tmp_path / "trace.jsonl"))
    monkeypatch.setattr(trace.os, "write", lambda file, lines: len(lines) // 2)
    monkeypatch.setattr(trace, "FLUSH_BYTES", 0)
    written.write(step=1)
    written.write(step=2)
    written.close()
