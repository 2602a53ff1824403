"""What a new placement moves, in bytes, and what `plan` predicts of it."""

from __future__ import annotations

import math

import msgspec
import pytest

from vllm_loraserve.cluster.moves import diff
from vllm_loraserve.cluster.operating_points import OperatingPoints
from vllm_loraserve.cluster.placement import (
    AdapterSpec,
    Placement,
    PlacementInput,
    ServerSpec,
)
from vllm_loraserve.cluster.predict import predict
from vllm_loraserve.cluster.relabel import relabel

OP = OperatingPoints(points={8: 10_000.0, 128: 5_000.0})
A, B = AdapterSpec("a", 8, 8, 100), AdapterSpec("b", 128, 128, 1600)
SERVERS = [ServerSpec("s0", 512, 10**6), ServerSpec("s1", 512, 10**6)]


def given(demand: float, previous: Placement | None = None) -> PlacementInput:
    return PlacementInput(adapters=[A, B], servers=SERVERS, demand={"a": demand, "b": demand}, op=OP, previous=previous)


def test_diff_counts_copies_drops_and_bytes() -> None:
    before = Placement(phi={"a": {"s0": 1.0}, "b": {"s0": 0.5, "s1": 0.5}})
    after = Placement(phi={"a": {"s1": 1.0}, "b": {"s0": 1.0}}, standby={"b": ["s1"]})
    plan = diff([A, B], before, after)
    assert [(m.kind, m.adapter, m.server, m.bytes) for m in plan.moves] == [
        ("copy", "a", "s1", 100),
        ("drop", "a", "s0", 0),
    ]
    assert plan.moves[0].sources == ("s0",)
    assert (plan.bytes_copied, plan.held_bytes, plan.phi_changed) == (100, 100 + 2 * 1600, 2)
    assert diff([A, B], None, after).bytes_copied == plan.held_bytes


def test_relabelling_moves_the_fewest_bytes() -> None:
    before = Placement(phi={"a": {"s0": 1.0}, "b": {"s1": 1.0}})
    swapped = Placement(phi={"a": {"s1": 1.0}, "b": {"s0": 1.0}})
    inp = given(100.0, before)
    assert relabel(inp, swapped).phi == before.phi


def test_prediction_worsens_with_demand_and_saturates() -> None:
    placement = Placement(phi={"a": {"s0": 1.0}, "b": {"s1": 1.0}})
    calm, busy, lost = (predict(given(d), placement) for d in (500.0, 5_000.0, 7_000.0))
    assert calm.loads == pytest.approx({"s0": 0.05, "s1": 0.1})
    assert calm.headroom == pytest.approx(10.0)
    assert calm.p95_ttft_s < busy.p95_ttft_s < lost.p95_ttft_s == math.inf


def test_the_p95_is_that_of_all_requests_together() -> None:
    """One server in twenty requests at most being slow does not show; from one in ten on it does."""
    one = AdapterSpec("a", 8, 8, 1)
    inp = PlacementInput(adapters=[one], servers=SERVERS, demand={"a": 9_000.0}, op=OP)
    alone = {share: predict(inp, Placement(phi={"a": {"s0": share, "s1": 1.0 - share}})) for share in (0.5, 0.97, 1.0)}
    assert alone[0.97].p95_ttft_s == pytest.approx(alone[1.0].p95_ttft_s, rel=0.25)
    # 1 - P95 over both: at equal load each has the same distribution, and so has the mixture.
    half = predict(inp, Placement(phi={"a": {"s0": 1.0}}), prompt_tokens=1024.0)
    equal = msgspec.structs.replace(inp, demand={"a": 18_000.0})
    both = predict(equal, Placement(phi={"a": {"s0": 0.5, "s1": 0.5}}))
    assert both.p95_ttft_s == pytest.approx(half.p95_ttft_s)
    # Few requests at a busy server: their own P95 is long, that of all is not.
    pair = PlacementInput(adapters=[A, B], servers=SERVERS, demand={"a": 3_000.0, "b": 100.0}, op=OP)
    slow = msgspec.structs.replace(pair, servers=[SERVERS[0], msgspec.structs.replace(SERVERS[1], speed=0.03)])
    placement = Placement(phi={"a": {"s0": 1.0}, "b": {"s1": 1.0}})
    seldom, never = predict(slow, placement), predict(pair, placement)
    assert seldom.p95_ttft_s < 3.0 * never.p95_ttft_s
    assert predict(msgspec.structs.replace(slow, demand={"a": 900.0, "b": 100.0}), placement).p95_ttft_s > 1.0
