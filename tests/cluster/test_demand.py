"""Demand windows, forecasts, back-testing, bursts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vllm_loraserve.cluster.demand import FORECASTERS, DemandHistory, backtest, linear_trend, robust


def test_rates_per_window_and_unseen_adapters() -> None:
    h = DemandHistory(window_s=10.0, windows=3)
    for t in range(30):
        h.add("a", 100.0, float(t))
    h.add_report({"b": 500.0}, 25.0)
    assert h.forecast(30.0, "last") == pytest.approx({"a": 100.0, "b": 50.0})
    assert "c" not in h.forecast(30.0, "last")
    names, rates = h.rates(30.0)
    assert dict(zip(names, rates[:, -1].tolist(), strict=True)) == pytest.approx({"a": 100.0, "b": 50.0})


def test_running_window_is_used_before_the_first_closes() -> None:
    h = DemandHistory(window_s=10.0)
    h.add("a", 500.0, 100.0)
    assert h.forecast(105.0)["a"] == pytest.approx(100.0)


def test_silence_decays_to_nothing() -> None:
    h = DemandHistory(window_s=1.0, windows=4)
    h.add("a", 100.0, 0.5)
    levels = [h.forecast(float(t), "ewma").get("a", 0.0) for t in range(1, 8)]
    assert levels[0] > 0.0
    assert all(x >= y for x, y in itertools.pairwise(levels))
    assert levels[-1] == 0.0


def test_trend_extrapolates_and_never_goes_negative() -> None:
    up, down = np.arange(6.0)[None] * 10, np.arange(5, -1, -1.0)[None] * 10 - 20
    assert linear_trend(up)[0] == pytest.approx(60.0)
    assert linear_trend(np.maximum(down, 0))[0] == 0.0
    spike = np.array([[10.0, 10, 10, 10, 10, 100]])
    assert robust(spike)[0] < 100.0


def test_backtest_picks_the_right_forecaster_and_says_why() -> None:
    rng = np.random.default_rng(0)
    ramp = np.linspace(10, 200, 20)[None] * np.ones((5, 1))
    assert backtest(ramp).chosen == "trend"
    noise = 100 + rng.normal(0, 40, (50, 20)).clip(-99)
    chosen = backtest(noise)
    assert chosen.chosen in ("ewma", "robust")
    assert chosen.errors["ewma"] < chosen.errors["last"]
    assert chosen.chosen in chosen.explain()
    assert set(chosen.errors) == set(FORECASTERS)
    assert "too little history" in backtest(noise[:, :3]).explain()


def test_burst_is_found_once_it_is_more_than_one_request() -> None:
    h = DemandHistory(window_s=10.0)
    for t in range(20):
        h.add("a", 1000.0, float(t))
        h.add("b", 100.0, float(t))
    expected = {"a": 1000.0, "b": 100.0}
    for i in range(30):
        h.add("b", 1000.0, 20.0 + i * 0.1)
    for t in range(20, 23):
        h.add("a", 1000.0, float(t))
    assert h.bursts(21.0, expected) == []
    assert h.bursts(23.0, expected) == ["b"]


def test_many_forgotten_adapters_do_not_stay() -> None:
    h = DemandHistory(window_s=1.0, windows=2)
    for i in range(500):
        h.add(f"a{i}", 1.0, 0.1)
    for t in range(1, 10):
        h.add("alive", 1.0, t + 0.5)
    assert list(h.forecast(10.0)) == ["alive"]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="window_s"):
        DemandHistory(window_s=0.0)
