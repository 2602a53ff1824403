"""The bound: the cluster as one machine with one queue."""

from __future__ import annotations

import msgspec
import pytest

from vllm_loraserve.simulator.bound import pooled, simulate_bound
from vllm_loraserve.simulator.machine import H100, L4, Kernels
from vllm_loraserve.simulator.search import max_rate
from vllm_loraserve.simulator.simulation import Abort, simulate
from vllm_loraserve.simulator.systems import SYSTEMS
from vllm_loraserve.simulator.workload import Workload, paper_workload, synthetic_trace

TRACE = synthetic_trace(2000)


def workload(rate: float) -> Workload:
    return paper_workload(L4, "poisson", "shifting-skew", rate, 40.0, 1, TRACE)


def test_the_pool_of_one_is_the_machine_and_work_is_divided() -> None:
    assert msgspec.structs.replace(pooled(H100, 1), name=H100.name) == H100
    four = pooled(H100, 4)
    assert four.step_cost.base == H100.step_cost.base
    tokens = {"prefill_tokens": 100.0, "rank_rows": 64.0, "context_tokens": 500.0}
    whole, part = four.step_cost.seconds(**tokens), H100.step_cost.seconds(**{k: v / 4 for k, v in tokens.items()})
    assert whole == pytest.approx(part)
    assert four.kv_tokens == 4 * H100.kv_tokens
    assert four.disk_latency_s == H100.disk_latency_s / 4  # as many loads in a second as four have
    with pytest.raises(ValueError, match="at least one"):
        pooled(H100, 0)


def test_machines_that_differ_have_no_pool() -> None:
    with pytest.raises(ValueError, match="differ"):
        simulate_bound(workload(2.0), [H100, L4])


@pytest.mark.parametrize("name", ["toppings", "hrw", "loraserve+"])
@pytest.mark.parametrize("kernels", [Kernels.RANK_AWARE, Kernels.MAX_IN_BATCH])
def test_no_system_beats_the_bound(name: str, kernels: Kernels) -> None:
    def best(probe) -> float:  # type: ignore[no-untyped-def]
        return max_rate(probe, 5.0, guess=10.0, tolerance=0.04)

    limit = best(lambda rate, abort: simulate_bound(workload(rate), [L4] * 3, abort=abort))

    def at(rate: float, abort: Abort | None) -> object:
        return simulate(workload(rate), [L4] * 3, SYSTEMS[name], kernels, abort=abort)

    assert 0.0 < best(at) <= limit * 1.04
