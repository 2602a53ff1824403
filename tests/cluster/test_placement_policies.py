"""What makes each policy itself: budgets, groups, replicas, stability."""

from __future__ import annotations

import pytest

from vllm_loraserve.cluster.moves import diff
from vllm_loraserve.cluster.operating_points import OperatingPoints
from vllm_loraserve.cluster.placement import (
    AdapterSpec,
    Placement,
    PlacementInput,
    ServerSpec,
    make_policy,
    server_loads,
)
from vllm_loraserve.cluster.placement_baselines import replica_counts
from vllm_loraserve.cluster.placement_loraserve import WHOLE_BUDGETS, LoRAServe, fill_level, rank_budgets
from vllm_loraserve.cluster.stability import carry_over, interference_loads

RANKS = (8, 16, 32, 64, 128)
OP = OperatingPoints(points={8: 10_000.0, 16: 9_500.0, 32: 9_000.0, 64: 7_500.0, 128: 5_500.0})


def given(
    n_servers: int = 4, per_rank: int = 5, rate: float = 1000.0, previous: Placement | None = None
) -> PlacementInput:
    adapters = [AdapterSpec(f"r{r}-{i}", r, r, r * 1000) for r in RANKS for i in range(per_rank)]
    return PlacementInput(
        adapters=adapters,
        servers=[ServerSpec(f"s{i:03d}", 2048, 10**8) for i in range(n_servers)],
        demand={a.name: rate for a in adapters},
        op=OP,
        previous=previous,
    )


@pytest.mark.parametrize(
    ("needs", "servers", "expected"),
    [
        ({8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0}, 4, {8: 1, 16: 1, 32: 1, 64: 1}),
        ({8: 2.6, 128: 1.4}, 4, {8: 3, 128: 1}),
        ({8: 0.8, 16: 0.8, 32: 0.8, 64: 0.8, 128: 0.8}, 4, {8: 0, 16: 1, 32: 1, 64: 1, 128: 1}),
        ({8: 1.34, 16: 1.33, 32: 1.33}, 4, {8: 2, 16: 1, 32: 1}),
    ],
)
def test_budgets_are_largest_remainders(needs: dict[int, float], servers: int, expected: dict[int, int]) -> None:
    groups = rank_budgets(needs, [(f"s{i}", 1.0) for i in range(servers)])
    assert {r: len(g) for r, g in groups.items()} == expected


def test_loraserve_separates_ranks_where_there_are_servers_for_it() -> None:
    inp = given(n_servers=40)
    placement = make_policy("loraserve").place(inp)
    rank = {a.name: a.rank for a in inp.adapters}
    mixed = [s for s, held in placement.by_server().items() if len({rank[a] for a in held}) > 1]
    assert len(mixed) <= len(RANKS)
    own = interference_loads(inp, placement, additive=False)
    random = interference_loads(inp, make_policy("random").place(inp), additive=False)
    assert max(own.values()) < 0.7 * max(random.values())


def test_fill_level_is_the_least_at_which_everything_fits() -> None:
    # One server full of rank 128, one of rank 8: nothing to gain from mixing.
    assert fill_level([(5_500.0, 5_500.0), (10_000.0, 10_000.0)], [1.0, 1.0]) == pytest.approx(1.0, rel=0.06)
    # Little of rank 128, much of rank 8: server 1 pays rank 128's price for L x 5,500 tokens, server 2 the rest.
    level = fill_level([(1_000.0, 5_500.0), (14_500.0, 10_000.0)], [1.0, 1.0])
    assert level == pytest.approx(1.0, rel=0.06)
    # Twice the demand, twice the level; a server of twice the speed counts as two.
    assert fill_level([(2_000.0, 5_500.0), (29_000.0, 10_000.0)], [1.0, 1.0]) == pytest.approx(2 * level, rel=0.01)
    assert fill_level([(8_000.0, 5_500.0)], [1.0, 1.0]) == pytest.approx(8_000.0 / 11_000.0, rel=0.06)
    assert fill_level([(8_000.0, 5_500.0)], [2.0]) == pytest.approx(8_000.0 / 11_000.0, rel=0.01)
    assert fill_level([], [1.0]) == 0.0


def test_loraserve_fills_servers_by_rank_where_whole_budgets_overload_the_mixed_one() -> None:
    inp = given()
    inp.demand = {a.name: 16_000.0 / a.rank for a in inp.adapters}  # exponential: half of it is rank 8
    policy = LoRAServe(damped=False)

    def worst(placement: Placement) -> float:
        return max(interference_loads(inp, placement, additive=False).values())

    whole, chosen = worst(policy._pack(inp, 1.0)), policy.place(inp)
    assert worst(chosen) * WHOLE_BUDGETS < whole
    rank = {a.name: a.rank for a in inp.adapters}
    groups = sorted({rank[a] for a in held} for held in chosen.by_server().values())
    assert sum(len(g) for g in groups) <= len(RANKS) + len(inp.servers) - 1, "at most one border for each server"
    assert max(interference_loads(inp, chosen, additive=False).values()) < 1.2 * min(
        interference_loads(inp, chosen, additive=False).values()
    )


def test_loraserve_follows_a_shift_of_demand_and_moves_only_then() -> None:
    policy = make_policy("loraserve")
    inp = given()
    inp.previous = policy.place(inp)
    assert diff(inp.adapters, inp.previous, policy.place(inp)).bytes_copied == 0
    before = max(server_loads(inp, inp.previous).values())
    inp.demand = {a.name: 4000.0 if a.rank == 128 else 250.0 for a in inp.adapters}
    after = policy.place(inp)
    assert diff(inp.adapters, inp.previous, after).bytes_copied > 0
    stale = interference_loads(inp, carry_over(inp), additive=False)
    assert max(interference_loads(inp, after, additive=False).values()) < 0.8 * max(stale.values())
    assert before > 0.0


def test_dead_server_is_left_and_its_adapters_find_a_home() -> None:
    for name in ("loraserve", "loraserve+", "rank-weighted", "hrw", "random"):
        policy = make_policy(name)
        inp = given()
        inp.previous = policy.place(inp)
        inp.servers = inp.servers[1:]
        after = policy.place(inp)
        assert set(after.phi) == {a.name for a in inp.adapters}
        assert "s000" not in after.by_server()


def test_standby_becomes_the_copy_when_its_server_dies() -> None:
    a = AdapterSpec("a", 8, 8, 8000)
    before = Placement(phi={"a": {"s000": 1.0}}, standby={"a": ["s002"]})
    inp = PlacementInput(adapters=[a], servers=[ServerSpec(f"s{i:03d}", 64, 10**6) for i in (1, 2)], previous=before)
    assert carry_over(inp).phi == {"a": {"s002": 1.0}}


def test_contiguous_cuts_by_rank_and_random_ignores_it() -> None:
    inp = given(n_servers=5)
    placement = make_policy("contiguous").place(inp)
    ranks = {a.name: a.rank for a in inp.adapters}
    for held in placement.by_server().values():
        assert len({ranks[a] for a in held}) == 1
    scattered = make_policy("random").place(inp).by_server()
    assert any(len({ranks[a] for a in held}) > 1 for held in scattered.values())
    assert all(len(r) == 1 for r in placement.phi.values())


def test_static_policies_do_not_react() -> None:
    for name in ("random", "contiguous"):
        inp = given()
        inp.previous = make_policy(name).place(inp)
        inp.demand = {k: v * (10.0 if "128" in k else 0.1) for k, v in inp.demand.items()}
        assert make_policy(name).place(inp).phi == inp.previous.phi


def test_toppings_is_everywhere_while_memory_lasts() -> None:
    placement = make_policy("toppings").place(given())
    assert all(len(r) == 4 for r in placement.phi.values())
    tight = given()
    size = sum(a.bytes for a in tight.adapters)
    tight.servers = [ServerSpec(s.name, 2048, size // 2) for s in tight.servers]
    tight.demand["r8-0"] = 50_000.0
    placement = make_policy("toppings").place(tight)
    assert len(placement.phi) == 25
    assert not placement.unplaced
    assert len(placement.phi["r8-0"]) == 4


def test_replicas_follow_demand_and_rendezvous_is_stable() -> None:
    inp = given()
    inp.demand["r8-0"] = 20_000.0
    counts = replica_counts(inp, 50)
    assert counts["r8-0"] == 4
    assert sum(counts.values()) <= 50
    assert min(counts.values()) == 1
    policy = make_policy("hrw")
    before = policy.place(inp)
    inp.servers = [*inp.servers, ServerSpec("s999", 2048, 10**8)]
    after = policy.place(inp)
    moved = diff(inp.adapters, before, after)
    assert 0 < moved.bytes_copied < 0.6 * moved.held_bytes


def test_min_cost_flow_keeps_what_is_loaded() -> None:
    inp = given(per_rank=8)
    policy = make_policy("min-cost-flow")
    inp.previous = policy.place(inp)
    inp.demand["r8-0"] *= 6
    flow = diff(inp.adapters, inp.previous, policy.place(inp))
    assert flow.moved_fraction < 0.1
    assert policy.place(inp).phi == policy.place(inp).phi


def test_dlora_adds_replicas_of_the_worst_provided() -> None:
    inp = given()
    inp.demand["r16-2"] = 30_000.0
    placement = make_policy("dlora-proactive").place(inp)
    assert len(placement.phi["r16-2"]) > 1


def test_plus_splits_the_hot_keeps_spares_and_levels() -> None:
    inp = given()
    inp.demand["r64-1"] = 15_000.0
    placement = make_policy("loraserve+").place(inp)
    assert len(placement.phi["r64-1"]) >= 2
    loads = server_loads(inp, placement)
    assert max(loads.values()) <= 1.06 * sum(loads.values()) / len(loads)
    assert placement.standby
    assert all(s not in placement.phi[a] for a, ss in placement.standby.items() for s in ss)


def test_plus_corrects_fractions_by_live_load() -> None:
    inp = given()
    inp.demand["r64-1"] = 15_000.0
    policy = make_policy("loraserve+")
    base = policy.place(inp).phi["r64-1"]
    busy = next(iter(base))
    inp.observed_load = {s: 1.5 if s == busy else 0.6 for s in base}
    assert policy.place(inp).phi["r64-1"][busy] < base[busy]


def test_plus_packs_adapters_where_the_arena_has_room() -> None:
    inp = given(n_servers=2, per_rank=2)
    rows = sum(a.rank_rows for a in inp.adapters)
    inp.servers = [ServerSpec("big", rows, 10**8), ServerSpec("small", 128, 10**8)]
    held = make_policy("loraserve+").place(inp).by_server()
    ranks = {a.name: a.rank for a in inp.adapters}
    assert sum(ranks[a] for a in held["small"]) <= sum(ranks[a] for a in held["big"])
