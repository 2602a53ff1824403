"""memory/eviction.py: what is cheap to bring back and little wanted goes first."""

import pytest

from vllm_loraserve.memory.eviction import Candidate, Demand, eviction_order, load_seconds


def test_order() -> None:
    wanted = Candidate("wanted", 100, 1.0, demand=5.0)
    idle = Candidate("idle", 100, 1.0, demand=0.1)
    assert eviction_order([wanted, idle]) == ["idle", "wanted"]
    cheap = Candidate("cheap", 100, 0.1, demand=1.0)
    costly = Candidate("costly", 100, 2.0, demand=1.0)
    assert eviction_order([costly, cheap]) == ["cheap", "costly"]
    assert eviction_order([]) == []


def test_a_fixed_cost_keeps_small_adapters() -> None:
    small = Candidate("small", 10, load_seconds(10, 1000, 0.5), demand=1.0)
    large = Candidate("large", 1000, load_seconds(1000, 1000, 0.5), demand=1.0)
    assert eviction_order([small, large]) == ["large", "small"]


def test_demand_halves() -> None:
    demand: Demand[str] = Demand(half_life=10)
    assert demand.of("a", 0) == 0
    demand.use("a", 0)
    demand.use("a", 0)
    assert demand.of("a", 0) == 2
    assert demand.of("a", 10) == pytest.approx(1)
    demand.use("a", 10)
    assert demand.of("a", 20) == pytest.approx(1)
    assert demand.of("a", 5) <= 2, "a clock that steps back is no error"
    demand.forget("a")
    assert demand.of("a", 20) == 0
