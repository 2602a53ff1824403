"""When a new placement is worth its moves: load by the policy's own measure, and memory."""

import pytest

from vllm_loraserve.cluster.placement import (
    AdapterSpec,
    Placement,
    PlacementInput,
    ServerSpec,
    make_policy,
    policy_names,
)
from vllm_loraserve.coordinator.rebalance import overfull, repair, worth_adopting
from vllm_loraserve.simulator.machine import PAPER


def proposal(policy: str, inp: PlacementInput, current: Placement) -> Placement:
    inp.previous = current
    return repair(inp, make_policy(policy).place(inp))


def ranks_mixed() -> tuple[PlacementInput, Placement]:
    """25 adapters of five ranks, evenly loaded but with every rank on every server."""
    adapters = [AdapterSpec(f"r{r}-{i}", r, r, 1000 * r) for r in (8, 16, 32, 64, 128) for i in range(5)]
    servers = [ServerSpec(f"s{i}", 4096, 10**9) for i in range(4)]
    demand = {a.name: 1500.0 for a in adapters}
    inp = PlacementInput(adapters=adapters, servers=servers, demand=demand, op=PAPER.operating_points())
    return inp, repair(inp, Placement())


@pytest.mark.parametrize("policy", policy_names())
def test_a_policy_is_judged_by_what_it_balances(policy: str) -> None:
    """Separating ranks gains nothing where every token costs its own rank; to `loraserve` it is the point."""
    inp, mixed = ranks_mixed()
    additive = make_policy(policy).additive
    adopt, why = worth_adopting(inp, mixed, proposal(policy, inp, mixed), additive)
    assert adopt is (policy == "loraserve"), why
    assert ("largest rank" in why) is not additive


LIMITS = {"bytes": ServerSpec("s0", 4096, host_bytes=10 * 10**8), "adapters": ServerSpec("s0", 4096, 10**12, slots=10)}


@pytest.mark.parametrize("policy", ["contiguous", "loraserve", "loraserve+", "rank-weighted"])
@pytest.mark.parametrize("full", ["bytes", "rows", "adapters"])
def test_an_instance_that_joins_relieves_an_overfull_one(policy: str, full: str) -> None:
    """Nothing is loaded, but what does not fit together comes in by eviction, request by request."""
    first = LIMITS.get(full, ServerSpec("s0", 640))
    adapters = [AdapterSpec(f"a{i}", 64, 64, 10**8) for i in range(20)]
    demand = {a.name: 2.0 for a in adapters}
    alone = PlacementInput(adapters=adapters, servers=[first], demand=demand)
    crowded = proposal(policy, alone, Placement())
    assert overfull(alone, crowded)[full] > 0
    second = ServerSpec("s1", first.capacity_rank_rows, first.host_bytes, first.slots)
    both = PlacementInput(adapters=adapters, servers=[first, second], demand=demand)
    better = proposal(policy, both, crowded)
    adopt, why = worth_adopting(both, crowded, better, make_policy(policy).additive)
    assert adopt, why
    assert f"-> 0 {full}" in why
    assert not worth_adopting(both, better, crowded, make_policy(policy).additive)[0], "and not back"


def test_spare_copies_take_no_place_from_new_adapters() -> None:
    servers = [ServerSpec(f"s{i}", 4096, 10**9, slots=2) for i in range(2)]
    adapters = [AdapterSpec(name, 8, 8, 1000) for name in ("a", "b", "c")]
    inp = PlacementInput(adapters=adapters, servers=servers)
    before = Placement(phi={"a": {"s0": 1.0}, "b": {"s1": 1.0}}, standby={"a": ["s1"], "b": ["s0"]})
    after = repair(inp, before)
    assert not any(overfull(inp, after).values())
    (home,) = after.phi["c"]
    assert len(after.on(home)) == 2
    assert sum(len(s) for s in after.standby.values()) == 1
