"""Fitting step costs, operating-point files, drift."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from vllm_loraserve.cluster.fit import TERMS, StepSample, fit_step_cost, predict_step
from vllm_loraserve.cluster.operating_points import (
    H100_8B_STEP_COST,
    OperatingPoints,
    OperatingPointsError,
    load,
    points_from_step_cost,
    relative_costs,
    save,
    shipped_defaults,
)


def samples(noise: float, n: int = 400) -> list[StepSample]:
    rng = np.random.default_rng(3)
    out = []
    for _ in range(n):
        prefill = int(rng.choice([0, 0, 256, 1024, 2048]))
        decode, rank = int(rng.integers(0, 128)), int(rng.choice([8, 16, 64, 128]))
        adapters = int(rng.integers(1, 24))
        s = StepSample(
            seconds=1.0,
            prefill_tokens=prefill,
            prefill_token_ranks=prefill * rank,
            decode_tokens=decode,
            decode_token_ranks=decode * int(rng.choice([8, 32, 128])),
            rank_rows=adapters * int(rng.choice([8, 16, 64])),
            adapters=adapters,
            context_tokens=decode * int(rng.integers(100, 2000)),
        )
        true = predict_step(H100_8B_STEP_COST, s)
        out.append(msgspec.structs.replace(s, seconds=true * float(rng.normal(1.0, noise))))
    return out


def test_exact_samples_give_back_every_coefficient() -> None:
    fit = fit_step_cost(samples(0.0))
    for term in TERMS:
        assert getattr(fit.cost, term) == pytest.approx(getattr(H100_8B_STEP_COST, term), rel=1e-4), term
    assert fit.relative_error < 1e-6


def test_noisy_samples_predict_well_and_stay_non_negative() -> None:
    fit = fit_step_cost(samples(0.1))
    assert fit.relative_error < 0.12
    assert all(getattr(fit.cost, t) >= 0.0 for t in TERMS)
    clean = samples(0.0)
    errors = [abs(predict_step(fit.cost, s) / s.seconds - 1.0) for s in clean]
    assert np.mean(errors) < 0.04


def test_too_few_samples() -> None:
    with pytest.raises(OperatingPointsError, match="3 usable samples"):
        fit_step_cost(samples(0.0, 3))


def test_interpolation_is_exact_for_a_linear_step_cost() -> None:
    points = points_from_step_cost(H100_8B_STEP_COST, (8, 32, 128))
    exact = points_from_step_cost(H100_8B_STEP_COST, (16, 64, 256))
    op = OperatingPoints(points=points)
    for rank, value in exact.items():
        assert op.at(rank) == pytest.approx(value, rel=1e-9)
    assert op.at(8) > op.at(9) > op.at(128) > op.at(200)


def test_file_round_trip_and_errors(tmp_path: Path) -> None:
    op = shipped_defaults()
    assert not op.measured
    save(op, tmp_path / "op.json")
    assert load(tmp_path / "op.json") == op
    with pytest.raises(OperatingPointsError, match="profile"):
        load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text('{"points": {"8": "fast"}}')
    with pytest.raises(OperatingPointsError, match=r"points"):
        load(tmp_path / "bad.json")
    (tmp_path / "neg.json").write_text('{"points": {"8": -1.0}}')
    with pytest.raises(OperatingPointsError, match="must be positive"):
        load(tmp_path / "neg.json")
    (tmp_path / "old.json").write_text('{"points": {"8": 1.0}, "version": 99}')
    with pytest.raises(OperatingPointsError, match="version 99"):
        load(tmp_path / "old.json")


def test_relative_costs_grow_with_rank() -> None:
    costs = relative_costs(shipped_defaults(), (8, 64, 128))
    assert costs[8] == 1.0 < costs[64] < costs[128]
