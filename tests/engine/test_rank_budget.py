"""Room and work: properties over random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_loraserve.cluster.operating_points import (
    OperatingPoints,
    OperatingPointsError,
    StepCost,
    save,
    shipped_defaults,
)
from vllm_loraserve.engine.rank_budget import (
    MIN_CHUNK,
    ArenaRoom,
    RankCost,
    WorkBudget,
    cost_per_rank_from,
    rank_cost,
)

ranks = st.integers(1, 256)


@given(st.integers(1, 8), st.integers(8, 512), st.lists(st.tuples(st.integers(1, 12), ranks), max_size=40))
def test_room_is_never_overdrawn_and_comes_back(slots: int, rank_rows: int, wanted: list[tuple[int, int]]) -> None:
    room = ArenaRoom(slots, rank_rows, page_rows=8)
    rank_of: dict[int, int] = {}
    taken = []
    for adapter, rank in wanted:
        rank = rank_of.setdefault(adapter, rank)
        if room.fits(adapter, rank):
            room.take(adapter, rank)
            taken.append(adapter)
        assert room.used_rows <= rank_rows
        assert len(room.users) <= slots
        assert room.used_rows == sum(room.rows_of(rank_of[a]) for a in room.users)
    for adapter in taken:
        room.release(adapter)
    assert not room.users
    assert room.used_rows == 0


@given(
    st.integers(1, 8),
    st.lists(ranks, min_size=1, max_size=12),
    ranks,
    st.dictionaries(st.integers(1, 20) | st.just(99), ranks, max_size=4),
)
def test_draining_makes_room(slots: int, running: list[int], rank: int, pinned: dict[int, int]) -> None:
    """Also where nothing but the pinned ones' places could be had."""
    room = ArenaRoom(slots, 256, page_rows=8)
    pinned = {adapter: running[adapter - 1] if adapter <= len(running) else r for adapter, r in pinned.items()}
    room.assign({}, pinned)
    for adapter, used in enumerate(running, 1):
        if room.fits(adapter, used):
            room.take(adapter, used)
    drain = room.to_drain(99, rank)
    if room.fits(99, rank):
        assert not drain
    for adapter in drain:
        room.release(adapter)
    assert room.fits(99, rank)


def test_pinned_adapters_take_room_as_long_as_anybody_runs() -> None:
    room = ArenaRoom(4, 64, page_rows=8)
    room.assign({1: (1, 8)}, {2: 40})
    assert room.fits(2, 40)
    assert room.fits(3, 16)
    assert not room.fits(3, 17), "8 rows run, 40 are pinned"
    room.take(2, 40)
    assert room.fits(3, 16), "a pinned one that runs counts once"
    assert not room.fits(3, 17)
    assert room.to_drain(3, 24) == {1}, "what is pinned gives nothing back"
    room.assign({1: (1, 8)}, {2: 8, 3: 8, 4: 8})
    assert not room.fits(5, 8), "slots count too"
    room.assign({}, {2: 8, 3: 8, 4: 48})
    assert room.fits(5, 64), "nobody runs whose end could make room"


@given(st.floats(0.001, 1), st.floats(0.01, 2), st.integers(0, 5000), st.lists(st.tuples(st.integers(1, 4000), ranks)))
def test_work_stays_within_the_share_and_moves_on(
    cost: float, share: float, decodes: int, chunks: list[tuple[int, int]]
) -> None:
    work = WorkBudget(RankCost.uniform(cost), share)
    work.begin(2048, decodes, 0, others_decode=True)
    start = work.left
    spent, first = 0.0, True
    for tokens, rank in chunks:
        allowed = work.allow(tokens, rank)
        assert 0 <= allowed <= tokens
        if first:
            assert allowed >= min(tokens, MIN_CHUNK), "prefill always makes progress"
        if allowed:
            work.spend(allowed, rank)
            spent += cost * rank * allowed
            assert spent <= max(start, 0) + 1e-6 or first
            first = False


def test_no_bound_when_nobody_else_decodes() -> None:
    work = WorkBudget(RankCost.uniform(1.0), 0.01)
    work.begin(2048, 0, 0, others_decode=False)
    assert work.allow(2000, 256) == 2000


@given(st.floats(1e-5, 1e-2), st.floats(1e-6, 1e-4))
def test_cost_from_operating_points_is_the_slope_over_the_base(base: float, slope: float) -> None:
    points = {rank: 1 / (base + slope * rank) for rank in (8, 16, 64, 128)}
    assert cost_per_rank_from(points) == pytest.approx(slope / base, rel=1e-3)


def test_operating_points_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="two ranks"):
        cost_per_rank_from({8: 100.0})
    assert cost_per_rank_from({8: 100.0, 128: 120.0}) == 0.0


def test_the_step_cost_of_measured_points_is_what_a_step_is_charged(tmp_path: Path) -> None:
    file = tmp_path / "points.json"
    step = StepCost(base=0.01, prefill_token=2e-5, prefill_token_rank=4e-7, decode_token_rank=1e-7, rank_row=2e-6)
    save(OperatingPoints(points={8: 1000.0, 128: 500.0}, step_cost=step, measured=True), file)
    cost = rank_cost(None, str(file))
    assert (cost.prefill, cost.decode, cost.row) == pytest.approx((0.02, 0.005, 0.1))
    work = WorkBudget(cost, 0.5)
    work.begin(1000, decode_rank_rows=64, rows=256, others_decode=True)
    assert work.spent == pytest.approx(64 * 0.005 + 256 * 0.1)
    assert work.allow(1000, 128) == int((500 - work.spent) / (128 * 0.02))

    save(OperatingPoints(points={8: 1 / 1.08, 128: 1 / 2.28}, measured=True), file)
    assert rank_cost(None, str(file)) == RankCost.uniform(pytest.approx(0.01))
    assert rank_cost(0.25, str(file)) == RankCost.uniform(0.25), "what is said outright counts"


def test_without_a_file_the_shipped_points_count() -> None:
    shipped = shipped_defaults().step_cost
    assert shipped is not None
    assert rank_cost(None, None).prefill == shipped.prefill_token_rank / shipped.prefill_token > 0


def test_a_file_of_operating_points_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OperatingPointsError, match=r"none\.json"):
        rank_cost(None, str(tmp_path / "none.json"))
    save(OperatingPoints(points={8: 1000.0}), tmp_path / "one.json")
    with pytest.raises(ValueError, match="two ranks"):
        rank_cost(None, str(tmp_path / "one.json"))
