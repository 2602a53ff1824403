"""Room and work: properties over random numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_loraserve.engine.rank_budget import MIN_CHUNK, ArenaRoom, WorkBudget, cost_per_rank_from

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
    work = WorkBudget(cost, share)
    work.begin(2048, decodes, others_decode=True)
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
    work = WorkBudget(1.0, 0.01)
    work.begin(2048, 0, others_decode=False)
    assert work.allow(2000, 256) == 2000


@given(st.floats(1e-5, 1e-2), st.floats(1e-6, 1e-4))
def test_cost_from_operating_points_is_the_slope_over_the_base(base: float, slope: float) -> None:
    points = {rank: 1 / (base + slope * rank) for rank in (8, 16, 64, 128)}
    assert cost_per_rank_from(points) == pytest.approx(slope / base, rel=1e-3)


def test_operating_points_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="two ranks"):
        cost_per_rank_from({8: 100.0})
    assert cost_per_rank_from({8: 100.0, 128: 120.0}) == 0.0
