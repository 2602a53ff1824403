"""memory/eviction.py: what is cheap to bring back and little wanted goes first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_loraserve.memory.eviction import Candidate, Demand, cheapest_stretch, eviction_order, load_seconds


def test_order() -> None:
    wanted = Candidate("wanted", 100, 1.0, demand=5.0)
    idle = Candidate("idle", 100, 1.0, demand=0.1)
    assert eviction_order([wanted, idle]) == ["idle", "wanted"]
    cheap = Candidate("cheap", 100, 0.1, demand=1.0)
    costly = Candidate("costly", 100, 2.0, demand=1.0)
    assert eviction_order([costly, cheap]) == ["cheap", "costly"]
    assert eviction_order([]) == []


def test_a_fixed_cost_keeps_small_adapters() -> None:
    small = Candidate("small", 10, load_seconds(10, 1000, 0.5), demand=1.0)
    large = Candidate("large", 1000, load_seconds(1000, 1000, 0.5), demand=1.0)
    assert eviction_order([small, large]) == ["large", "small"]


def test_demand_halves() -> None:
    demand: Demand[str] = Demand(half_life=10)
    assert demand.of("a", 0) == 0
    demand.use("a", 0)
    demand.use("a", 0)
    assert demand.of("a", 0) == 2
    assert demand.of("a", 10) == pytest.approx(1)
    demand.use("a", 10)
    assert demand.of("a", 20) == pytest.approx(1)
    assert demand.of("a", 5) <= 2, "a clock that steps back is no error"
    demand.forget("a")
    assert demand.of("a", 20) == 0


def test_the_cheapest_stretch() -> None:
    a, b, c = (Candidate(name, 10, 1.0, demand) for name, demand in (("a", 1.0), ("b", 5.0), ("c", 2.0)))
    held = {(0, 10): a, (20, 10): b, (30, 10): c}
    assert cheapest_stretch([(10, 10)], held, 10) == []
    assert cheapest_stretch([(10, 10)], held, 20) == ["a"]
    assert cheapest_stretch([(10, 10)], held, 30) == ["a", "b"]
    assert cheapest_stretch([], held, 20) == ["b", "c"], "nobody moves what lies at 10"
    assert cheapest_stretch([(10, 10)], held, 41) is None
    assert cheapest_stretch([], {}, 1) is None


@given(
    pieces=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from(["free", "stays", "held"]), st.integers(0, 3)), max_size=8
    ),
    size=st.integers(1, 12),
)
def test_no_stretch_is_cheaper(pieces: list[tuple[int, str, int]], size: int) -> None:
    free, held, at, bounds = [], {}, 0, [0]
    for length, kind, demand in pieces:
        if kind == "free":
            free.append((at, length))
        elif kind == "held":
            held[at, length] = Candidate(at, length, 1.0, float(demand))
        at += length
        bounds.append(at)

    def loss(begin: int, end: int) -> tuple[float, int] | None:
        inside = [piece for piece in (*free, *held) if begin <= piece[0] < end]
        if sum(length for _, length in inside) != end - begin:
            return None
        gone = [held[piece] for piece in inside if piece in held]
        return sum(each.demand for each in gone), sum(each.size for each in gone)

    every = [loss(begin, end) for begin in bounds for end in bounds if end - begin >= size]
    possible = [each for each in every if each is not None]
    chosen = cheapest_stretch(free, held, size)
    if not possible:
        assert chosen is None
        return
    assert chosen is not None
    gone = [candidate for candidate in held.values() if candidate.key in chosen]
    assert (sum(each.demand for each in gone), sum(each.size for each in gone)) == min(possible)


def test_demand_of_long_ago_is_forgotten() -> None:
    demand: Demand[int] = Demand(half_life=60)
    for second in range(20_000):
        demand.use(second, float(second))
        demand.use(-1, float(second))
    assert len(demand) < 5000
    assert demand.of(19_999, 20_000.0) > 0.9
    assert demand.of(-1, 20_000.0) > 50
