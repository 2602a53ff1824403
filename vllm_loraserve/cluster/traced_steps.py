"""Steps of running instances, from the lines of `--loraserve-config.trace_schedule`, as samples of the step cost.

Unlike single prompts and groups of streams they mix prompts and decodes, as traffic does.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterable

import msgspec

from vllm_loraserve.cluster.fit import Fit, StepSample, fit_step_cost, predict_step

TOTALS = tuple(name for name in StepSample.__struct_fields__ if name != "seconds")
"""Fields of a line that are those of a sample."""
OUTLIER = 2.0
"""A step that takes so many times what the others predict was held up by something else, and is left out."""


class Step(msgspec.Struct, frozen=True):
    """One step of one instance."""

    pid: int
    start: float
    """Unix time, seconds."""
    sample: StepSample


def read_steps(lines: Iterable[str]) -> list[Step]:
    """The steps whose length is known: another one of the same engine followed at once."""
    by_engine: dict[int, list[dict[str, float]]] = {}
    for line in lines:
        step = json.loads(line)
        by_engine.setdefault(step["pid"], []).append(step)
    return [
        Step(pid, step["t"], StepSample(seconds=after["t"] - step["t"], **{total: step[total] for total in TOTALS}))
        for pid, steps in by_engine.items()
        for step, after in itertools.pairwise(steps)
        if not after["after_idle"]
    ]


def alone_and_beside(steps: Iterable[Step]) -> tuple[list[StepSample], list[StepSample]]:
    """Samples of steps during which no other instance computed (less than a tenth of the time), and of those during
    which another one did (more than nine tenths)."""
    spans: dict[int, list[tuple[float, float]]] = {}
    steps = sorted(steps, key=lambda step: step.start)
    for step in steps:
        spans.setdefault(step.pid, []).append((step.start, step.start + step.sample.seconds))
    alone, beside = [], []
    for step in steps:
        end = step.start + step.sample.seconds
        covered = max(
            (_covered(others, step.start, end) for pid, others in spans.items() if pid != step.pid), default=0.0
        )
        share = covered / max(step.sample.seconds, 1e-9)
        if share < 0.1:
            alone.append(step.sample)
        elif share > 0.9:
            beside.append(step.sample)
    return alone, beside


def _covered(spans: list[tuple[float, float]], start: float, end: float) -> float:
    """Seconds of [start, end) that lie in `spans`, which are sorted and do not overlap."""
    first = max(bisect.bisect_right(spans, (start, float("inf"))) - 1, 0)
    covered = 0.0
    for low, high in spans[first:]:
        if low >= end:
            break
        covered += max(0.0, min(high, end) - max(low, start))
    return covered


def fit_without_outliers(samples: list[StepSample]) -> tuple[Fit, int]:
    """The fitted step cost, and how many samples were left out as OUTLIER says."""
    rough = fit_step_cost(samples)
    kept = [s for s in samples if s.seconds < OUTLIER * predict_step(rough.cost, s)]
    return fit_step_cost(kept), len(samples) - len(kept)
