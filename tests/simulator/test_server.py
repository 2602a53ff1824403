"""One simulated instance: step times, leaps, limits, loads; against closed forms."""

from __future__ import annotations

import msgspec
import pytest

from vllm_loraserve.cluster.operating_points import StepCost
from vllm_loraserve.cluster.placement import Placement
from vllm_loraserve.simulator.machine import Kernels
from vllm_loraserve.simulator.server import MAX_SKIP_S

from .one_server import COST, MACHINE, STEP, run


def test_single_request_costs_what_the_step_cost_says() -> None:
    r = run([(0.0, 0, 50, 11)])
    load = 8 * 1000 / 1e12
    first = load + 0.010 + 50 * 1e-4 + 50 * 8 * 1e-6 + 8 * 1e-5
    assert r.ttft[0] == pytest.approx(first)
    assert r.finish[0] == pytest.approx(first + 10 * STEP)
    assert r.tbt[0] == pytest.approx(STEP)


def test_long_prompt_is_chunked() -> None:
    r = run([(0.0, 0, 250, 1)])
    # 100 + 100 + 50 tokens: three bases.
    assert r.ttft[0] == pytest.approx(3 * 0.010 + 250 * (1e-4 + 8e-6) + 3 * 8e-5, rel=1e-4)


def test_who_pays_for_the_large_rank() -> None:
    """A rank-8 prompt batched with a rank-128 one: own rank, the batch's maximum, the configured maximum."""
    # The first two only bring the adapters into the arena; the step that is looked at starts at 10 s.
    requests = [(0.0, 0, 1, 1), (0.0, 1, 1, 1), (10.0, 0, 40, 1), (10.0, 1, 40, 1), (10.0, 1, 19, 1)]
    ttft = {}
    for kernels in Kernels:
        # The one that arrives first starts alone; the others of that instant share the second step.
        ttft[kernels] = run(requests, kernels=kernels).ttft[2:]
    second = 0.010 + 59 * 1e-4
    assert ttft[Kernels.RANK_AWARE][1] - ttft[Kernels.RANK_AWARE][0] == pytest.approx(second + 59 * 128e-6 + 128e-5)
    for kernels, rank in ((Kernels.RANK_AWARE, 8), (Kernels.MAX_IN_BATCH, 8), (Kernels.PADDED, 128)):
        alone = 0.010 + 40e-4 + 40 * rank * 1e-6 + rank * 1e-5
        assert ttft[kernels][0] == pytest.approx(alone, rel=1e-4), kernels
    # A long decode of rank 128 beside a rank-8 prompt: the prompt pays 128 with max-in-batch kernels only.
    mixed = [(0.0, 0, 1, 1), (0.0, 1, 1, 400), (2.0, 0, 80, 1)]
    own, largest = (run(mixed, kernels=k).ttft[2] for k in (Kernels.RANK_AWARE, Kernels.MAX_IN_BATCH))
    assert largest - own == pytest.approx(80 * 120e-6, abs=2e-3)
    # With prompts and decodes priced apart it pays its own rank there, and 128 beside another such prompt.
    assert run(mixed, kernels=Kernels.S_LORA).ttft[2] == pytest.approx(own, abs=1e-4)
    assert ttft[Kernels.S_LORA] == pytest.approx(ttft[Kernels.MAX_IN_BATCH])


def test_leap_is_cut_at_the_step_boundary_after_an_arrival() -> None:
    """A second request arriving in a long decode starts at the next boundary, not at the leap's end."""
    r = run([(0.0, 0, 10, 500), (1.0, 0, 10, 1)])
    assert r.ttft[1] < 2 * STEP + 0.010
    assert r.finish[0] == pytest.approx(r.ttft[0] + 499 * STEP, rel=0.01)


def test_watching_changes_nothing() -> None:
    calm = run([(0.0, 0, 10, 300)])
    watched = run([(0.0, 0, 10, 300)], sample_s=0.001)
    assert watched.finish[0] == pytest.approx(calm.finish[0])
    assert len(watched.load) > 100


def test_kv_limit_holds_requests_back() -> None:
    machine = msgspec.structs.replace(MACHINE, kv_tokens=100)
    r = run([(0.0, 0, 50, 50), (0.0, 0, 50, 50)], machine=machine)
    assert r.ttft[1] >= r.finish[0]
    with pytest.raises(ValueError, match="does not fit the KV cache of 100 tokens"):
        run([(0.0, 0, 90, 50)], machine=machine)


def test_arena_limit_serialises_adapters_that_do_not_fit_together() -> None:
    machine = msgspec.structs.replace(MACHINE, arena_rows=128)
    roomy = run([(0.0, 0, 20, 50), (0.0, 1, 20, 50)])
    tight = run([(0.0, 0, 20, 50), (0.0, 1, 20, 50)], machine=machine)
    assert tight.ttft[1] >= tight.finish[0] > roomy.ttft[1]


def test_room_is_made_by_the_fewest_requests_and_the_other_adapters_go_on() -> None:
    """Two rank-128 adapters fill the arena and never end by themselves; a third waits for `MAX_SKIP_S`, then the one
    with fewer requests gets no new ones until it has its room."""
    hot = [(t / 10, 0, 1, 20) for t in range(80)]
    warm = [(0.05 + t / 5, 1, 1, 20) for t in range(40)]
    waits = [(0.5, 2, 1, 1)]
    requests = sorted([*hot, *warm, *waits])
    ttft = run(requests, ranks=(128, 128, 128)).ttft
    of = [[float(ttft[i]) for i, r in enumerate(requests) if r[1] == adapter] for adapter in range(3)]
    decode_s = 20 * (0.010 + 256e-5 + 20e-3)  # at most: the two streams never have 20 requests running
    assert MAX_SKIP_S < of[2][0] < MAX_SKIP_S + decode_s
    assert max(of[0]) < 0.05, "requests of the adapter that stays went on"
    assert max(of[1]) > 0.15, "those of the adapter that makes room waited"
    last = [float(ttft[i]) for i, r in enumerate(requests) if r[1] == 1 and r[0] > 7.0]
    assert max(last) < 0.05, "and ran again afterwards"


def test_load_blocks_only_its_own_request_except_with_padded_kernels() -> None:
    machine = msgspec.structs.replace(MACHINE, load_latency_s=1.0)
    requests = [(0.0, 0, 20, 400), (2.0, 1, 20, 1)]
    ours = run(requests, machine=machine)
    stock = run(requests, machine=machine, kernels=Kernels.PADDED)
    assert ours.ttft[1] > 1.0
    assert stock.ttft[1] > 1.0
    # Padded rows make every stock step dearer, too; the stall of the second load is on top of that.
    padded_step = 0.010 + 1e-3 + 128e-6 * 0 + 128e-5
    assert ours.finish[0] < 1.0 + 401 * STEP + 0.1
    assert stock.finish[0] > 1.0 + 399 * padded_step + 1.0


def test_faster_machine_is_faster() -> None:
    fast = run([(0.0, 0, 50, 11)], machine=msgspec.structs.replace(MACHINE, speed=2.0))
    assert run([(0.0, 0, 50, 11)]).finish[0] / fast.finish[0] == pytest.approx(2.0, rel=0.01)


def test_busy_neighbours_on_one_host_slow_each_other() -> None:
    slower = StepCost(**{k: 1.5 * v for k, v in msgspec.structs.asdict(COST).items()})
    shared = msgspec.structs.replace(MACHINE, beside=slower)
    placement = Placement(phi={"a0": {"s0000": 1.0}, "a1": {"s0001": 1.0}})
    alone = run([(0.0, 0, 50, 40)], machine=shared, servers=2, placement=placement)
    assert alone.finish[0] == pytest.approx(run([(0.0, 0, 50, 40)]).finish[0])
    both = run([(0.0, 0, 50, 40), (0.0, 1, 50, 40)], machine=shared, servers=2, placement=placement)
    apart = run([(0.0, 0, 50, 40), (0.0, 1, 50, 40)], servers=2, placement=placement)
    # The first of the two starts its first step beside an idle neighbour.
    assert both.tbt / apart.tbt == pytest.approx([1.5, 1.5], rel=0.05)


def test_scheduling_ahead_makes_an_arrival_wait_for_one_step_more() -> None:
    ahead = msgspec.structs.replace(MACHINE, schedules_ahead=True)
    resident = [(0.0, 1, 1, 1), (1.0, 0, 50, 41)]
    middle = 1.0 + 20 * STEP
    own = 0.010 + 1e-3 + 20 * (1e-4 + 8e-6) + 8e-5  # its prompt beside one decode
    for machine, waits in ((MACHINE, 1), (ahead, 2)):
        r = run([*resident, (middle, 0, 20, 1)], machine=machine)
        assert (waits - 1) * STEP + own <= r.ttft[2] <= waits * STEP + own + 1e-9
    idle = run([(0.0, 0, 20, 1)], machine=ahead)
    assert idle.ttft[0] == pytest.approx(run([(0.0, 0, 20, 1)]).ttft[0])
