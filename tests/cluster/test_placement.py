"""The placement interface and the rank-weighted policy."""

from __future__ import annotations

import pytest

from vllm_loraserve.cluster.operating_points import OperatingPoints
from vllm_loraserve.cluster.placement import (
    AdapterSpec,
    PlacementError,
    PlacementInput,
    ServerSpec,
    make_policy,
    server_loads,
)

OP = OperatingPoints(points={8: 10_000.0, 128: 5_000.0})


def adapter(name: str, rank: int = 8) -> AdapterSpec:
    return AdapterSpec(name, rank, rank, rank * 1000)


def servers(n: int, **kw: float) -> list[ServerSpec]:
    return [ServerSpec(f"s{i}", 1024, 10**9, **kw) for i in range(n)]  # type: ignore[arg-type]


def test_no_demand_places_every_adapter_once_and_spreads_them() -> None:
    inp = PlacementInput(adapters=[adapter(f"a{i}") for i in range(8)], servers=servers(4), op=OP)
    placement = make_policy("rank-weighted").place(inp)
    assert set(placement.phi) == {f"a{i}" for i in range(8)}
    assert sorted(len(v) for v in placement.by_server().values()) == [2, 2, 2, 2]
    assert all(sum(r.values()) == pytest.approx(1.0) for r in placement.phi.values())


def test_hot_adapter_is_split_and_loads_are_even() -> None:
    adapters = [adapter("hot"), *(adapter(f"a{i}", 128) for i in range(7))]
    demand = {"hot": 20_000.0, **{f"a{i}": 500.0 for i in range(7)}}
    inp = PlacementInput(adapters=adapters, servers=servers(4), demand=demand, op=OP)
    placement = make_policy("rank-weighted").place(inp)
    assert len(placement.phi["hot"]) >= 3
    loads = server_loads(inp, placement).values()
    assert max(loads) < 1.15 * sum(loads) / 4


def test_rank_counts_as_demand_does() -> None:
    inp = PlacementInput(
        adapters=[adapter("big", 128), adapter("x"), adapter("y")],
        servers=servers(2),
        demand={"big": 1000.0, "x": 1000.0, "y": 1000.0},
        op=OP,
    )
    placement = make_policy("rank-weighted").place(inp)
    # rank 128 costs twice a rank-8 token here, so it gets a server for itself.
    assert set(placement.phi["x"]) == set(placement.phi["y"]) != set(placement.phi["big"])


def test_adapter_larger_than_every_arena_is_reported_not_placed() -> None:
    inp = PlacementInput(adapters=[adapter("huge", 4096), adapter("a")], servers=servers(2), op=OP)
    placement = make_policy("rank-weighted").place(inp)
    assert "huge" not in placement.phi
    assert "4096 rank rows" in placement.unplaced["huge"]
    assert "a" in placement.phi


def test_errors_name_the_thing() -> None:
    with pytest.raises(PlacementError, match="no server"):
        make_policy("rank-weighted").place(PlacementInput(adapters=[adapter("a")], servers=[]))
    with pytest.raises(PlacementError, match="'s0' is listed twice"):
        make_policy("rank-weighted").place(PlacementInput(adapters=[], servers=servers(1) * 2))
    with pytest.raises(PlacementError, match="known: "):
        make_policy("nonsense")


def test_faster_server_gets_more() -> None:
    slow, fast = ServerSpec("slow", 1024, 10**9), ServerSpec("fast", 1024, 10**9, speed=3.0)
    adapters = [adapter(f"a{i}") for i in range(40)]
    inp = PlacementInput(adapters=adapters, servers=[slow, fast], demand={a.name: 100.0 for a in adapters}, op=OP)
    by = make_policy("rank-weighted").place(inp).by_server()
    assert 2.5 < len(by["fast"]) / len(by["slow"]) < 3.6
