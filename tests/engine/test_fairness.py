"""Shares and limits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_loraserve.engine.fairness import Limits, Shares, label_of


def test_labels_name_then_tenant_then_star() -> None:
    options = {"acme/one": 1, "acme": 2}
    assert label_of("acme/one", options) == "acme/one"
    assert label_of("acme/two", options) == "acme"
    assert label_of("other", options) is None
    assert label_of("other", {"*": 1}) == "other"


@given(st.floats(0.25, 8), st.floats(0.25, 8), st.lists(st.integers(1, 500), min_size=300, max_size=300))
def test_admitted_tokens_follow_the_weights(a: float, b: float, sizes: list[int]) -> None:
    shares = Shares({"a": a, "b": b})
    tokens = {"a": 0, "b": 0}
    for size in sizes:
        name = min(("a", "b"), key=shares.time)
        shares.admit(name, size)
        tokens[name] += size
    # Start-time fair queueing: apart by no more than the largest request of each.
    assert abs(tokens["a"] / a - tokens["b"] / b) <= 500 / a + 500 / b


def test_idle_time_is_not_saved_up() -> None:
    shares = Shares({"*": 1.0})
    for _ in range(100):
        shares.admit("busy", 100)
    shares.admit("late", 100)
    assert shares.time("late") >= shares.time("busy") - 200


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 300)), max_size=50))
def test_limits_hold_except_for_one_alone(requests: list[tuple[str, int]]) -> None:
    limits = Limits({"*": 400})
    running: dict[str, list[int]] = {"a": [], "b": []}
    for name, tokens in requests:
        if limits.allows(name, tokens):
            limits.take(name, tokens)
            running[name].append(tokens)
        assert sum(running[name]) <= 400 or len(running[name]) == 1
    for name, sizes in running.items():
        for tokens in sizes:
            limits.release(name, tokens)
        assert limits.allows(name, 10**6)


def test_labels_that_are_behind_are_forgotten_and_stand_where_they_stood() -> None:
    shares = Shares({"*": 1.0})
    for number in range(20_000):
        shares.admit(f"adapter{number}", 10)
        if number % 10 == 9:
            shares.admit("ahead", 1)
            shares._now += 10
    assert len(shares._times) < 5000
    assert shares.time("adapter1") == shares._now
    shares.refund("adapter1", 10)
    assert shares.time("adapter1") == shares._now
