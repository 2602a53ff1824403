"""Instances of different capacity in one cluster."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from vllm_loraserve.simulator.machine import H100
from vllm_loraserve.simulator.simulation import simulate
from vllm_loraserve.simulator.systems import SYSTEMS
from vllm_loraserve.simulator.workload import Workload, synthetic_trace, zipf

TRACE = synthetic_trace(2000)
SLOW = msgspec.structs.replace(H100, speed=0.5)
SMALL = msgspec.structs.replace(H100, arena_rows=64, host_bytes=8 * 2**30)


def load(rate: float) -> Workload:
    return zipf(H100, 40, rate, 30.0, 0, TRACE)


@pytest.mark.parametrize("name", ["loraserve", "loraserve+", "rank-weighted", "toppings"])
def test_a_machine_of_half_the_speed_gets_less(name: str) -> None:
    r = simulate(load(25.0), [H100, SLOW], SYSTEMS[name])
    assert r.finished == r.requests
    slow, fast = 0.5 * r.busy[1], r.busy[0]
    assert 0.2 < slow / (slow + fast) < 0.43, "a third of the work is its fair share"


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_large_ranks_go_where_the_arena_holds_them(name: str) -> None:
    workload = load(12.0)
    r = simulate(workload, [SMALL, H100], SYSTEMS[name])
    assert r.finished == r.requests
    assert np.isfinite(r.ttft).all()
