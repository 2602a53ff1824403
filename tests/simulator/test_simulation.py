"""The event loop: determinism, conservation, rebalancing, failures, memory."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from vllm_loraserve.cluster.placement import Placement
from vllm_loraserve.simulator.machine import H100, L4, PAPER, Kernels
from vllm_loraserve.simulator.results import Result
from vllm_loraserve.simulator.search import fewest_servers, max_rate
from vllm_loraserve.simulator.simulation import Abort, Failure, simulate
from vllm_loraserve.simulator.systems import SYSTEMS
from vllm_loraserve.simulator.workload import Workload, burst, churn, paper_workload, synthetic_trace, zipf

TRACE = synthetic_trace(3000)


def load(rate: float = 30.0, seconds: float = 40.0, seed: int = 1) -> Workload:
    return paper_workload(H100, "poisson", "shifting-skew", rate, seconds, seed, TRACE)


@pytest.mark.parametrize("name", sorted(SYSTEMS))
@pytest.mark.parametrize("kernels", list(Kernels))
def test_every_system_finishes_everything_and_is_deterministic(name: str, kernels: Kernels) -> None:
    workload = load(seconds=20.0)
    a = simulate(workload, [H100] * 3, SYSTEMS[name], kernels, seed=3)
    b = simulate(workload, [H100] * 3, SYSTEMS[name], kernels, seed=3)
    assert a.finished == a.requests == len(workload.arrival)
    assert np.array_equal(a.ttft, b.ttft)
    assert np.array_equal(a.finish, b.finish)
    assert (a.finish >= a.ttft).all()
    assert (a.ttft > 0).all()
    assert a.summary() == b.summary()


def test_work_is_conserved() -> None:
    """Tokens/s x duration = all tokens, and no server is busier than time allows."""
    workload = load()
    r = simulate(workload, [H100] * 3, SYSTEMS["loraserve"])
    assert r.tokens_per_s * r.duration_s == pytest.approx(float((workload.prompt + workload.output).sum()))
    assert all(0.0 < b <= 1.0 + 1e-9 for b in r.busy)


def test_one_copy_policies_hold_fewer_adapters_than_full_replication() -> None:
    one = simulate(load(), [H100] * 4, SYSTEMS["random"])
    everywhere = simulate(load(), [H100] * 4, SYSTEMS["toppings"])
    assert everywhere.adapters_per_server == everywhere.placed_per_server == 25
    assert one.adapters_per_server < 15
    assert one.bytes_moved == everywhere.bytes_moved == 0


def test_copies_on_their_way_out_are_held_but_not_placed() -> None:
    moved = simulate(load(seconds=80.0), [H100] * 4, SYSTEMS["loraserve"])
    assert 7 <= moved.placed_per_server < moved.adapters_per_server


def test_live_load_steps_around_a_queue_that_a_draw_does_not_see() -> None:
    hot = load(rate=35.0)
    spread = Placement(phi={a.name: {"s0000": 0.5, "s0001": 0.5} for a in hot.adapters})
    drawn, live = (
        simulate(hot, [H100] * 2, msgspec.structs.replace(SYSTEMS[s], period_s=0.0), placement=spread)
        for s in ("loraserve", "loraserve-live")
    )
    assert live.ttft_percentile(95) < 0.9 * drawn.ttft_percentile(95)


def test_failure_loses_no_request_and_costs_time() -> None:
    workload = load(rate=20.0)
    calm = simulate(workload, [H100] * 3, SYSTEMS["loraserve+"])
    hit = simulate(workload, [H100] * 3, SYSTEMS["loraserve+"], failures=[Failure(0, 10.0, 25.0)])
    assert hit.finished == hit.requests
    assert hit.ttft_percentile(99) > calm.ttft_percentile(99)
    assert hit.busy[0] < calm.busy[0]


@pytest.mark.parametrize("name", ["loraserve", "loraserve+", "toppings"])
@pytest.mark.parametrize("failures", [[Failure(0, 5.0, 8.0)], [Failure(0, 5.0, 8.0), Failure(1, 6.0, 9.0)]])
def test_requests_wait_while_no_server_is_alive(name: str, failures: list[Failure]) -> None:
    workload = load(rate=4.0, seconds=20.0)
    result = simulate(workload, [H100] * len(failures), SYSTEMS[name], failures=failures)
    assert result.finished == result.requests == len(workload.arrival)


def test_placement_follows_demand_and_moves_bytes() -> None:
    r = simulate(load(seconds=80.0), [H100] * 4, SYSTEMS["loraserve"])
    assert r.rebalances > 5
    assert r.bytes_moved > 0


def test_full_host_tiers_still_serve_everything() -> None:
    small = msgspec.structs.replace(L4, host_bytes=4 * 2**30)
    workload = zipf(small, 40, 3.0, 40.0, 0, TRACE)
    for name in ("toppings", "loraserve", "loraserve+"):
        r = simulate(workload, [small] * 4, SYSTEMS[name])
        assert r.finished == r.requests, name


def test_more_adapters_than_host_memory_are_read_from_their_checkpoints() -> None:
    small = msgspec.structs.replace(L4, host_bytes=2**30)
    workload = zipf(small, 300, 2.0, 20.0, 0, TRACE)
    assert sum(a.bytes for a in workload.adapters) > 4 * small.host_bytes
    for name in ("random", "toppings", "loraserve", "loraserve+"):
        r = simulate(workload, [small] * 2, SYSTEMS[name])
        assert r.finished == r.requests, name
        assert r.fetches > 0


def test_adapter_larger_than_every_arena_is_an_error_that_names_it() -> None:
    small = msgspec.structs.replace(L4, arena_rows=64)
    with pytest.raises(ValueError, match=r"adapter r128-0 needs 128 rank rows and the largest arena has 64"):
        simulate(load(2.0, 5.0), [small] * 2, SYSTEMS["loraserve"])


@pytest.mark.parametrize("make", [burst, churn])
def test_burst_and_churn_run_with_many_adapters(make: Callable[..., Workload]) -> None:
    workload = make(H100, 500, 20.0, 30.0, 0, TRACE)
    r = simulate(workload, [msgspec.structs.replace(H100, host_bytes=400 * 2**30)] * 4, SYSTEMS["loraserve+"])
    assert r.finished == r.requests


def test_abort_ends_a_lost_run_early() -> None:
    workload = load(rate=200.0, seconds=60.0)
    full = simulate(workload, [H100] * 2, SYSTEMS["toppings"])
    cut = simulate(workload, [H100] * 2, SYSTEMS["toppings"], abort=Abort(5.0))
    assert not full.meets(5.0)
    assert cut.aborted
    assert not cut.meets(5.0)
    assert cut.duration_s < 0.8 * full.duration_s


def test_interference_is_the_paper_s() -> None:
    """Rank 8 beside rank 128 on one paper server: P95 TTFT about 84 % worse than beside rank 8 (section
    III)."""
    rng = np.random.default_rng(1)
    rate, n = 2.0, 1500
    arrival, pick = np.cumsum(rng.exponential(1 / rate, n)), rng.integers(0, 3000, n)
    which = rng.integers(0, 2, n)
    p95 = []
    for other in (8, 128):
        adapters = [PAPER.adapter("small", 8), PAPER.adapter("other", other)]
        workload = Workload("pair", adapters, arrival, which, TRACE.prompt[pick], TRACE.output[pick])
        r = simulate(workload, [PAPER], SYSTEMS["rank-weighted"], Kernels.MAX_IN_BATCH)
        p95.append(float(np.percentile(r.ttft[which == 0], 95)))
    assert 1.5 < p95[1] / p95[0] < 2.3


def test_searches_find_the_edge() -> None:
    system = SYSTEMS["toppings"]

    def at(rate: float, servers: int, abort: Abort | None = None, seconds: float = 30.0) -> Result:
        return simulate(load(rate, seconds), [H100] * servers, system, abort=abort)

    best = max_rate(lambda rate, abort: at(rate, 2, abort), 2.0, guess=20.0, tolerance=0.05)
    assert at(best, 2).meets(2.0)
    assert not at(best * 1.15, 2).meets(2.0)
    needed = fewest_servers(lambda n, abort: at(50.0, n, abort), 2.0)
    assert at(50.0, needed).meets(2.0)
    assert not at(50.0, needed - 1).meets(2.0)
    assert fewest_servers(lambda n, abort: at(500.0, n, abort, 5.0), 0.1, most=2) == 0
