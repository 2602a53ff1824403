"""Per-request choice by prediction: `loraserve+` (predicted finish time) and the Toppings baseline (least
added cost).

Both read a `ServerView` of each candidate, a handful of running totals that an instance reports or the
simulator knows, and the fitted step cost. Pure functions; the caller keeps the views fresh.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

from vllm_loraserve.cluster.operating_points import StepCost

T = TypeVar("T")
Choice = Literal["finish-time", "least-added-cost"]
"""`choose_finish_time` (`loraserve+`) or `choose_least_added_cost` (Toppings)."""


class ServerView:
    """What is known of a server at the moment of choice. Plain attributes: one is filled per candidate and
    request.

    `phi`: the fraction the placement gives it (0.0 for a standby copy or none). `ready_s`: seconds until
    the adapter can run there (0.0: resident; else load or fetch). `step_left_s`: rest of the running step.
    `distinct_rows`, `distinct`: rank rows and number of adapters in the batch.
    `demanded`: some request there, waiting or running, uses it; `blocked`: how many of those requests wait
    while none of them runs. `rows_demanded`, `arena_rows`: rank rows of all adapters that requests there use,
    and what the arena holds.
    """

    __slots__ = (
        "arena_rows",
        "blocked",
        "context_tokens",
        "decode_rank_sum",
        "demanded",
        "distinct",
        "distinct_rows",
        "kv_free",
        "kv_queued",
        "max_batched_tokens",
        "max_rank",
        "name",
        "phi",
        "queued",
        "queued_token_ranks",
        "queued_tokens",
        "ready_s",
        "rows_demanded",
        "running",
        "seats_free",
        "speed",
        "step_left_s",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.phi = 0.0
        self.ready_s = 0.0
        self.demanded = False
        self.blocked = 0
        self.rows_demanded = 0.0
        self.arena_rows = math.inf
        self.queued = 0
        self.queued_tokens = 0.0
        self.queued_token_ranks = 0.0
        self.running = 0
        self.decode_rank_sum = 0.0
        self.context_tokens = 0.0
        self.distinct = 0
        self.distinct_rows = 0.0
        self.max_rank = 0
        self.kv_free = math.inf
        self.kv_queued = 0.0
        self.seats_free = 1 << 30
        self.step_left_s = 0.0
        self.speed = 1.0
        self.max_batched_tokens = 2048


def fixed_step_s(v: ServerView, cost: StepCost) -> float:
    """Seconds of a step of `v` that carries its decodes and no prompt (additive cost)."""
    return (
        cost.base
        + cost.decode_token * v.running
        + cost.decode_token_rank * v.decode_rank_sum
        + cost.rank_row * v.distinct_rows
        + cost.adapter * v.distinct
        + cost.context_token * v.context_tokens
    ) / v.speed


def predict_wait(v: ServerView, cost: StepCost, prompt: float, output: float, rank: int) -> tuple[float, float]:
    """(seconds to the first token, seconds of one decode step afterwards) of a request put on `v` now."""
    step = fixed_step_s(v, cost)
    room = max(v.max_batched_tokens - v.running, v.max_batched_tokens / 8)
    tokens = v.queued_tokens + prompt
    prefill = (
        tokens * cost.prefill_token + (v.queued_token_ranks + prompt * rank) * cost.prefill_token_rank
    ) / v.speed + math.ceil(tokens / room) * step
    wait = v.step_left_s + prefill
    # Memory or seats short: wait for running requests to leave. They leave at one per (output x step /
    # running).
    if v.running:
        need = v.kv_queued + prompt + output - v.kv_free
        seats = v.queued + 1 - v.seats_free
        leaving_s = output * step / v.running
        per_request = max(v.context_tokens / v.running, 1.0)
        blocked = max(need / per_request, seats, 0.0)
        wait += blocked * leaving_s
    return max(wait, v.ready_s), step


EXTERNALITY = 40.0
"""How much a second of step time taken from everybody weighs against a second of one's own waiting."""
CROWDING = 4.0
"""How steeply the wait for room in an arena grows with the share of it that is asked for too much."""
CROWD = 16
"""So many requests that wait for room for their adapter's rows are worth a second copy of the rows: nothing is
gained then by waiting with them."""
SPILL_MARGIN_S = 0.02
SPILL_SHARE = 0.05
"""A non-holder must be predicted this much faster, and by this share of the time that the request decodes there: for
less, copying an adapter is not worth it."""
SPILL_CANDIDATES = 2
"""Servers without phi that are looked at for being the least loaded."""


def spill_candidates(
    others: Sequence[T],
    *,
    in_use: Callable[[T], bool],
    room: Callable[[T], float],
    load: Callable[[T], tuple[float, ...]],
) -> list[T]:
    """The servers without phi that `choose_finish_time` should look at, of all such `others`: those `in_use` by
    requests of the adapter (spilled there before: its rows are read there anyway), the one with the most `room` in
    its arena, and the `SPILL_CANDIDATES` with the least `load`. Each once."""
    if len(others) <= SPILL_CANDIDATES:
        return list(others)
    chosen = [s for s in others if in_use(s)]
    for s in (*heapq.nsmallest(SPILL_CANDIDATES, others, key=load), max(others, key=room)):
        if s not in chosen:
            chosen.append(s)
    return chosen


def choose_finish_time(
    views: Iterable[ServerView],
    cost: StepCost,
    prompt: float,
    output: float,
    rank: int,
    rank_rows: int,
    *,
    own: str | None = None,
    affinity_gain_s: float = 0.0,
    externality: float = EXTERNALITY,
) -> str:
    """The server with the least predicted finish time, counting what the request costs the others there.

    Bringing an adapter to a server where nobody uses it adds its rank rows and its share of launch cost to
    every step until it leaves, so requests of one adapter attract each other; a queue pushes them apart, and so
    does a crowd that waits for room for the adapter itself. A server without phi is taken only when it is faster
    by the spill margins, fetch included. `own`: the session's server, favoured by `affinity_gain_s` (the prefill
    time its prefix cache saves).
    """
    best, best_score = "", math.inf
    for v in views:
        wait, step = predict_wait(v, cost, prompt, output, rank)
        score = wait + output * step
        if not v.demanded:
            score += externality * output * (cost.rank_row * rank_rows + cost.adapter) / v.speed
        asked = v.rows_demanded + (0.0 if v.demanded else rank_rows)
        if asked > v.arena_rows:
            # No room in the arena beside those that are asked for: somebody has to finish first.
            share = min(v.blocked / CROWD, 1.0) if v.demanded else 1.0
            score += share * output * step * (1.0 + CROWDING * (asked - v.arena_rows) / v.arena_rows)
        if v.phi <= 0.0:
            score += SPILL_MARGIN_S + SPILL_SHARE * output * step + v.ready_s
        if v.name == own:
            score -= affinity_gain_s
        if score < best_score or (score == best_score and v.name < best):
            best, best_score = v.name, score
    return best


def choose_least_added_cost(
    views: Iterable[ServerView], cost: StepCost, prompt: float, output: float, rank: int, *, decode_slo_s: float = 0.2
) -> str:
    """The Toppings/CaraServe choice: queueing and prefill of the request, plus the decode time it adds to
    all running requests under a model linear in the sum of ranks, plus a penalty where the decode SLO would
    break."""
    best, best_score = "", math.inf
    for v in views:
        wait, step = predict_wait(v, cost, prompt, output, rank)
        added = (cost.decode_token + cost.decode_token_rank * rank) / v.speed
        score = wait + output * added * (v.running + 1)
        if step + added > decode_slo_s:
            score += 10.0
        if score < best_score or (score == best_score and v.name < best):
            best, best_score = v.name, score
    return best
