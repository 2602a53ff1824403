"""Choice among the eligible servers."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from vllm_loraserve.cluster.routing import choose, rendezvous, rendezvous_weighted


def test_draws_follow_phi() -> None:
    rng = random.Random(1)
    got = Counter(choose({"a": 0.7, "b": 0.3}, None, rng) for _ in range(5000))
    assert got["a"] / 5000 == pytest.approx(0.7, abs=0.03)


def test_load_decides_between_two_candidates() -> None:
    rng = random.Random(1)
    assert {choose({"a": 0.5, "b": 0.5}, {"a": 9.0, "b": 1.0}, rng) for _ in range(50)} == {"b"}


def test_excluded_servers_are_not_chosen_and_none_left_is_none() -> None:
    assert choose({"a": 0.9, "b": 0.1}, None, random.Random(0), exclude={"a"}) == "b"
    assert choose({"a": 1.0, "b": 0.0}, None, random.Random(0), exclude={"a"}) == "b"
    assert choose({"a": 1.0}, None, random.Random(0), exclude={"a"}) is None
    assert choose({}, None, random.Random(0)) is None


def test_session_stays_unless_its_server_is_busy() -> None:
    routes = {"a": 0.5, "b": 0.5}
    own = choose(routes, {"a": 1.0, "b": 1.0}, random.Random(0), affinity="chat-1")
    assert all(choose(routes, {"a": 1, "b": 1}, random.Random(i), affinity="chat-1") == own for i in range(20))
    busy = {"a": 1.0, "b": 1.0, own: 10.0}
    assert choose(routes, busy, random.Random(0), affinity="chat-1") != own


def test_weighted_rendezvous_shares_and_stability() -> None:
    before = {"a": 0.5, "b": 0.3, "c": 0.2}
    after = {"a": 0.4, "b": 0.4, "c": 0.2}
    keys = [f"k{i}" for i in range(4000)]
    share = Counter(rendezvous_weighted(k, before) for k in keys)
    assert share["a"] / 4000 == pytest.approx(0.5, abs=0.03)
    moved = sum(rendezvous_weighted(k, before) != rendezvous_weighted(k, after) for k in keys) / 4000
    assert moved < 0.2


def test_rendezvous_order_only_loses_the_removed_server() -> None:
    order = rendezvous("adapter", {"a", "b", "c", "d"})
    assert rendezvous("adapter", {"a", "b", "c", "d"} - {order[0]}) == order[1:]
