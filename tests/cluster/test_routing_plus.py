"""Choice by prediction: queues, adapter locality, memory, spilling, affinity."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vllm_loraserve.cluster.operating_points import H100_8B_STEP_COST as COST
from vllm_loraserve.cluster.routing_plus import (
    ServerView,
    choose_finish_time,
    choose_least_added_cost,
    fixed_step_s,
    predict_wait,
    spill_candidates,
)


def view(name: str, **kw: Any) -> ServerView:
    v = ServerView(name)
    v.phi = 1.0
    for key, value in kw.items():
        setattr(v, key, value)
    return v


def choose(*views: ServerView, rank: int = 16, **kw: Any) -> str:
    return choose_finish_time(views, COST, 1000.0, 200.0, rank, rank, **kw)


def test_idle_server_waits_for_its_own_prompt_only() -> None:
    wait, step = predict_wait(view("a"), COST, 1000.0, 200.0, 16)
    assert step == pytest.approx(COST.base)
    assert wait == pytest.approx(COST.base + 1000 * (COST.prefill_token + 16 * COST.prefill_token_rank))
    slow, _ = predict_wait(view("a", speed=0.5), COST, 1000.0, 200.0, 16)
    assert slow == pytest.approx(2 * wait)


def test_wait_grows_with_queue_memory_and_residency() -> None:
    base, _ = predict_wait(view("a"), COST, 1000.0, 200.0, 16)
    queued, _ = predict_wait(view("a", queued_tokens=50_000.0), COST, 1000.0, 200.0, 16)
    assert queued > base + 50_000 * COST.prefill_token
    full = view("a", running=50, context_tokens=50_000.0, kv_free=0.0)
    roomy = view("a", running=50, context_tokens=50_000.0)
    assert predict_wait(full, COST, 1000.0, 200.0, 16)[0] > predict_wait(roomy, COST, 1000.0, 200.0, 16)[0]
    assert predict_wait(view("a", ready_s=9.0), COST, 1000.0, 200.0, 16)[0] == 9.0
    assert fixed_step_s(view("a", distinct_rows=1000.0, distinct=10), COST) == pytest.approx(
        COST.base + 1000 * COST.rank_row + 10 * COST.adapter
    )


def test_shorter_queue_wins_and_names_break_ties() -> None:
    assert choose(view("a", queued_tokens=100_000.0), view("b")) == "b"
    assert choose(view("b"), view("a")) == "a"


def test_requests_of_an_adapter_attract_each_other_until_the_queue_is_long() -> None:
    used = {"demanded": True, "running": 8}
    assert choose(view("a"), view("b", **used)) == "b"
    assert choose(view("a"), view("b", queued_tokens=500_000.0, **used)) == "a"


def test_spills_to_a_non_holder_only_when_faster_fetch_included() -> None:
    holder, other = {"queued_tokens": 30_000.0}, {"phi": 0.0, "ready_s": 0.05}
    assert choose(view("holder"), view("other", **other)) == "holder"
    assert choose(view("holder", queued_tokens=300_000.0), view("other", **other)) == "other"
    # A short queue is waited for, and how long it may be grows with what the request decodes.
    short, near = {"queued_tokens": 1_500.0}, {"phi": 0.0, "ready_s": 0.0}
    assert choose(view("holder", **short), view("near", **near)) == "holder"
    assert choose_finish_time([view("holder", **short), view("near", **near)], COST, 1000.0, 5.0, 16, 16) == "near"
    slow_fetch = {"phi": 0.0, "ready_s": 30.0}
    assert choose(view("holder", **holder), view("other", **slow_fetch)) == "holder"


def test_full_arena_is_avoided_unless_the_adapter_is_there_already() -> None:
    crowded = {"rows_demanded": 500.0, "arena_rows": 512.0, "running": 4}
    assert choose(view("a", **crowded), view("b", running=4), rank=64) == "b"
    assert choose(view("a", demanded=True, **crowded), view("b", running=4), rank=64) == "a"


def test_a_crowd_that_waits_for_room_sends_the_next_ones_elsewhere() -> None:
    """A few requests wait together for their adapter's rows; many are worth a second copy of them."""
    cost = msgspec.structs.replace(COST, rank_row=1e-6)

    def choose_with(**kw: Any) -> str:
        full = view("a", demanded=True, rows_demanded=768.0, arena_rows=512.0, running=16, **kw)
        return choose_finish_time([full, view("b", running=16)], cost, 1000.0, 200.0, 64, 64)

    assert choose_with(blocked=0) == "a", "it runs there"
    assert choose_with(blocked=1) == "a"
    assert choose_with(blocked=16) == choose_with(blocked=100) == "b"


def test_spills_look_at_where_the_adapter_is_in_use_where_there_is_room_and_where_nobody_waits() -> None:
    # name: (in use, room in rank rows, load)
    servers = {"a": (True, 0, 9), "b": (False, 8, 8), "c": (False, 500, 7), "d": (False, 8, 2), "e": (False, 8, 1)}

    def candidates(names: str) -> list[str]:
        return sorted(
            spill_candidates(
                names,
                in_use=lambda s: servers[s][0],
                room=lambda s: servers[s][1],
                load=lambda s: (servers[s][2],),
            )
        )

    assert candidates("abcde") == ["a", "c", "d", "e"]
    assert candidates("cde") == ["c", "d", "e"]
    assert candidates("acd") == ["a", "c", "d"]
    assert candidates("ab") == ["a", "b"]
    assert candidates("") == []


def test_session_is_a_tie_break() -> None:
    assert choose(view("a"), view("b"), own="b", affinity_gain_s=0.05) == "b"
    assert choose(view("a"), view("b", queued_tokens=100_000.0), own="b", affinity_gain_s=0.05) == "a"


def test_toppings_looks_at_queue_rank_and_decode_slo() -> None:
    def toppings(*views: ServerView) -> str:
        return choose_least_added_cost(views, COST, 1000.0, 200.0, 64)

    assert toppings(view("a", queued_tokens=50_000.0), view("b")) == "b"
    assert toppings(view("a", running=100, context_tokens=1e5), view("b", running=10, context_tokens=1e4)) == "b"
    # It does not see that an adapter is in use already: that is what finish time adds.
    assert toppings(view("a"), view("b", demanded=True)) == "a"
    slow = view("a", context_tokens=5e6)
    assert toppings(slow, view("b", queued_tokens=20_000.0)) == "b"
