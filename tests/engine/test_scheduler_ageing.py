"""A bound on waiting, whatever comes and in whatever order. Real channel, made-up workers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.vllm

HOT, COLD = (1, 2), (3, 4, 5, 6)
"""Adapters: the hot ones fill the arena by themselves."""
MAX_SKIP_STEPS, MOST_TOKENS = 10, 5
LOAD_STEPS = 2
"""From the step that finds a request to the one that knows that its adapter is ready, two loads at a time."""
JOIN = 3
"""Steps that an adapter which fits may yield to other prefill, and the one in which it begins."""


def bound() -> int:
    """Steps that anybody may wait: its load behind those of the others, the time to be overtaken, and then a turn for
    each other adapter that is older: what runs ends, and it begins."""
    loads = LOAD_STEPS * len(COLD)
    turns = (len(HOT) + len(COLD)) * (MOST_TOKENS + JOIN)
    return loads + MAX_SKIP_STEPS + turns


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 6), st.sampled_from(COLD), st.integers(1, MOST_TOKENS)), min_size=1, max_size=30
)
"""(steps since the one before, adapter, tokens)"""


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=ARRIVALS, ranks=st.lists(st.sampled_from([8, 16, 32]), min_size=4, max_size=4))
def test_nobody_waits_longer_than_the_bound_under_a_hot_stream(
    build: Any, policy: str, arrivals: list[tuple[int, int, int]], ranks: list[int]
) -> None:
    """New requests for two hot adapters in every step; cold ones come at any time, in any order and size."""
    from scheduler_harness import STEP_S, checker, make_request, settled_step

    scheduler, workers = build(
        ranks=dict(zip((*HOT, *COLD), (16, 16, *ranks), strict=True)),
        rank_rows=32, max_loras=2, max_seqs=256, max_tokens=4096, caching=False, policy=policy,
        options={"max_skip_s": MAX_SKIP_STEPS * STEP_S, "skip_window": 10**6, "lora_share": None},
    )  # fmt: skip
    for adapter in HOT:
        workers.bring_in(adapter)
    check = checker(scheduler)
    due: list[tuple[int, int, int]] = []
    at = 10
    for gap, adapter, tokens in arrivals:
        at += gap
        due.append((at, adapter, tokens))
    came: dict[str, int] = {}
    longest = 0
    for now in range(at + bound() + 2):
        for number, adapter in enumerate(HOT):
            came[f"hot{now}-{number}"] = now
            scheduler.add_request(make_request(f"hot{now}-{number}", 4, MOST_TOKENS, adapter=adapter, arrival=now))
        while due and due[0][0] == now:
            _, adapter, tokens = due.pop(0)
            name = f"cold{len(due)}"
            came[name] = now
            scheduler.add_request(make_request(name, 4, tokens, adapter=adapter, arrival=now))
        output, _ = settled_step(scheduler)
        check(output)
        for request in output.scheduled_new_reqs:
            longest = max(longest, now - came.pop(request.req_id))
        assert not came or now - min(came.values()) <= bound(), "somebody waits for too long"
    assert not any(name.startswith("cold") for name in came)
    assert longest <= bound()


def test_the_bound_is_the_ageings(build: Any) -> None:
    """Without ageing the same stream keeps a cold request out for as long as it lasts."""
    from scheduler_harness import make_request, settled_step

    scheduler, workers = build(max_loras=2, max_seqs=256, options={"max_skip_s": 1e6, "skip_window": 10**9})
    for adapter in HOT:
        workers.bring_in(adapter)
    for now in range(3 * bound()):
        for adapter in HOT:
            scheduler.add_request(make_request(f"hot{now}-{adapter}", 4, MOST_TOKENS, adapter=adapter, arrival=now))
        if now == 10:
            scheduler.add_request(make_request("cold", 4, 1, adapter=3, arrival=now))
        settled_step(scheduler)
    assert any(request.request_id == "cold" for request in scheduler.waiting)
