"""What is taken from schedule traces: whole steps, alone or beside another instance's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_loraserve.cluster.fit import predict_step
from vllm_loraserve.cluster.traced_steps import Step, alone_and_beside, fit_without_outliers, read_steps


def line(pid: int, t: float, decodes: int = 1, prefill: int = 0, after_idle: bool = False) -> dict[str, Any]:
    return {
        "pid": pid,
        "t": t,
        "after_idle": after_idle,
        "prefill_tokens": prefill,
        "prefill_token_ranks": 8 * prefill,
        "decode_tokens": decodes,
        "decode_token_ranks": 8 * decodes,
        "rank_rows": 8,
        "adapters": 1,
        "context_tokens": 50 * decodes,
    }


def read(lines: list[dict[str, Any]]) -> list[Step]:
    return read_steps(json.dumps(each) for each in lines)


def test_a_step_is_as_long_as_until_the_next_of_its_engine_unless_that_came_later() -> None:
    lines = [line(1, 10.0, after_idle=True), line(2, 10.05), line(1, 10.1), line(1, 99.0, after_idle=True)]
    steps = read([*lines, line(1, 99.5)])
    assert [(s.pid, s.start, pytest.approx(s.sample.seconds)) for s in steps] == [(1, 10.0, 0.1), (1, 99.0, 0.5)]


def test_steps_are_told_apart_by_whether_another_instance_computed_meanwhile() -> None:
    alone = [line(1, t, decodes=1) for t in (0.0, 1.0, 2.0)]
    half = [line(1, t, decodes=2) for t in (3.0, 4.0)]
    both = [line(1, 4.5 + t, decodes=3) for t in range(4)]
    other = [line(2, 3.6 + 0.1 * i, decodes=4) for i in range(70)]
    single, shared = alone_and_beside(read([*alone, *half, *both, *other]))
    assert [s.decode_tokens for s in single if s.decode_tokens != 4] == [1, 1, 1]
    assert [s.decode_tokens for s in shared if s.decode_tokens != 4] == [2, 3, 3, 3]
    assert sum(s.decode_tokens == 4 for s in shared) > 30, "the other one's, while this one ran"


def test_a_step_that_was_held_up_is_left_out_of_the_fit() -> None:
    lines, t = [], 0.0
    for i in range(400):
        decodes, prefill = 1 + i % 7, 16 * (i % 5)
        lines.append(line(1, t, decodes, prefill))
        # 10 ms + 1 ms a decode + 0.1 ms a prompt token; every fiftieth step stands for a second.
        t += 0.010 + 1e-3 * decodes + 1e-4 * prefill + (1.0 if i % 50 == 49 else 0.0)
    samples = [step.sample for step in read(lines)]
    fit, left_out = fit_without_outliers(samples)
    assert left_out == 7, "the last step has no end"
    assert fit.relative_error < 0.01
    assert predict_step(fit.cost, samples[0]) == pytest.approx(0.011, rel=0.01)
