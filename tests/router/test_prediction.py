"""Choice by predicted finish time: work under way, holders, spills, sessions; and the ledgers it reads."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import pytest

from vllm_loraserve.cli import main
from vllm_loraserve.cluster.operating_points import H100_8B_STEP_COST, OperatingPoints, StepCost, save
from vllm_loraserve.coordinator.messages import Capacity, Load, Prediction, Residency
from vllm_loraserve.router import cli
from vllm_loraserve.router.directory import Target
from vllm_loraserve.router.ledger import Ledger, Work
from vllm_loraserve.router.prediction import Predictor
from vllm_loraserve.router.upstream import Upstream

from .conftest import Serve, entry, routes, table
from .test_queue import COST


def upstreams(names: str = "ab", **loads: Load) -> dict[str, Upstream]:
    return {name: Upstream(entry(name, f"http://{name}", load=loads.get(name))) for name in names}


def work(predictor: Predictor, target: Target, body_bytes: int = 4000, streams: bool = True) -> Work:
    made = predictor.work(target, body_bytes, 32, streams)
    assert made is not None
    return made


def test_the_instance_with_less_to_read_is_done_first() -> None:
    predictor, known = Predictor(COST), upstreams()
    base = Target("base", {}, 0)
    work(predictor, base, 40_000).sent(known["a"].ledger)
    for _ in range(3):  # more requests, but far fewer tokens
        work(predictor, base, 400).sent(known["b"].ledger)
    assert predictor.choose(work(predictor, base), known) == "b"


def test_a_holder_is_preferred_and_spills_only_when_another_is_faster() -> None:
    predictor, known = Predictor(COST), upstreams()
    one = Target("one", {"a": 1.0}, 64, size_bytes=50_000_000)
    assert predictor.choose(work(predictor, one), known) == "a"
    for _ in range(50):
        work(predictor, one, 40_000).sent(known["a"].ledger)
    chosen = work(predictor, one)
    assert predictor.choose(chosen, known) == "b"
    assert chosen.wait_s >= 0.05  # the fetch
    held = Residency(name="one", sha256="0" * 64, tier="host")
    resident = entry("b", "http://b")
    known["b"].entry = msgspec.structs.replace(resident, resident=(held,))
    assert predictor.choose(again := work(predictor, one), known) == "b"
    assert again.wait_s > 0
    assert predictor.choose(work(predictor, one), {"b": known["b"]}) == "b"
    assert predictor.choose(work(predictor, one), {}) is None


def test_requests_of_an_adapter_attract_each_other() -> None:
    """Its rank rows are read in that instance's steps already."""
    cost = StepCost(base=0.01, decode_token=1e-5, rank_row=1e-4, adapter=1e-3)
    predictor, known = Predictor(cost), upstreams()
    one = Target("one", {"a": 0.5, "b": 0.5}, 64)
    first = work(predictor, one)
    first.sent(known["b"].ledger)
    first.first_token()
    assert predictor.choose(work(predictor, one), known) == "b"


def test_a_full_arena_is_avoided() -> None:
    """Somebody there has to finish before the adapter gets its rank rows."""
    cost = StepCost(base=0.01, decode_token=1e-5)
    predictor, known = Predictor(cost), upstreams()
    for n in range(4):  # 512 rank rows: all there are
        work(predictor, Target(f"large-{n}", {}, 128)).sent(known["a"].ledger)
        work(predictor, Target(f"small-{n}", {}, 8)).sent(known["b"].ledger)
    assert predictor.choose(work(predictor, Target("small", {"a": 0.5, "b": 0.5}, 8)), known) == "b"
    assert predictor.choose(work(predictor, Target("large-0", {"a": 0.5, "b": 0.5}, 128)), known) == "a"
    assert predictor.choose(work(predictor, Target("base", {}, 0)), known) == "a", "needs no room"


def test_many_that_wait_for_room_in_an_arena_are_joined_by_no_more() -> None:
    """A burst on an adapter that is large, on an instance whose arena is in use: what comes later goes elsewhere."""
    cost = StepCost(base=0.01, decode_token=1e-5)
    predictor, known = Predictor(cost), upstreams()
    for n in range(4):
        for name in "ab":
            other = work(predictor, Target(f"{name}-{n}", {}, 128 if name == "a" else 96))
            other.sent(known[name].ledger)
            other.first_token()
    one = Target("one", {"a": 1.0}, 128, size_bytes=1)
    waits = [work(predictor, one) for _ in range(20)]
    waits[0].sent(known["a"].ledger)
    assert known["a"].ledger.blocked("one") == 1
    assert predictor.choose(work(predictor, one, 40), known) == "a"
    for each in waits[1:]:
        each.sent(known["a"].ledger)
    assert known["a"].ledger.blocked("one") == 20
    assert predictor.choose(work(predictor, one, 40), known) == "b"
    waits[0].first_token()  # it has its room: all are served
    assert known["a"].ledger.blocked("one") == 0
    for each in waits:
        each.done()
    assert known["a"].ledger.blocked("one") == 0


def test_a_spilled_adapter_is_used_where_it_is() -> None:
    """Its rows are read there anyway, on a busy instance too, rather than on a third one."""
    cost = StepCost(base=0.01, decode_token=1e-5, rank_row=1e-4, adapter=1e-3)
    predictor, known = Predictor(cost), upstreams("abcdef")
    one, base = Target("one", {"a": 1.0}, 64), Target("base", {}, 0)
    for _ in range(400):
        work(predictor, base, 40_000).sent(known["a"].ledger)
    known["f"].in_flight = 5  # by count of requests, the last that would be looked at
    spilled = work(predictor, one)
    spilled.sent(known["f"].ledger)
    spilled.first_token()
    assert predictor.choose(work(predictor, one), known) == "f"


def test_what_other_routers_sent_counts() -> None:
    predictor, known = Predictor(COST), upstreams(a=Load(running=40, waiting=10))
    assert predictor.choose(work(predictor, Target("base", {}, 0)), known) == "b"


def test_a_session_stays_while_its_prefix_cache_pays() -> None:
    predictor, known = Predictor(COST), upstreams()
    base = Target("base", {}, 0)
    homes = {key: predictor.choose(work(predictor, base), known, key) for key in map(str, range(20))}
    assert set(homes.values()) == {"a", "b"}
    busy = known["a"].ledger
    work(predictor, base, 1000).sent(busy)  # less than what the cache saves
    key = next(k for k, home in homes.items() if home == "a")
    assert predictor.choose(work(predictor, base), known, key) == "a"
    for _ in range(10):
        work(predictor, base).sent(busy)
    assert predictor.choose(work(predictor, base), known, key) == "b"


def test_of_many_instances_the_least_loaded_are_looked_at_and_the_sessions_own() -> None:
    predictor, base = Predictor(COST), Target("base", {}, 0)
    known = {name: Upstream(entry(name, f"http://{name}")) for name in (f"i{n:02}" for n in range(40))}
    for number, upstream in enumerate(known.values()):
        upstream.in_flight = 40 - number
        for _ in range(40 - number):
            work(predictor, base).sent(upstream.ledger)
    assert predictor.choose(work(predictor, base), known) == "i39"
    homes = {predictor.choose(work(predictor, base, 400_000), dict(known), key) for key in map(str, range(20))}
    assert len(homes) > 1, "a long prompt's cache is worth the queue"
    assert not homes <= set(list(known)[-16:])


def test_ledgers_return_to_zero_on_every_path() -> None:
    predictor, ledger = Predictor(COST), Ledger()
    one, base = Target("one", {}, 20), Target("base", {}, 0)
    a, b, c = work(predictor, one), work(predictor, one), work(predictor, base)
    for each in (a, b, c):
        each.sent(ledger)
    assert (ledger.queued, ledger.rows, ledger.adapters) == (3, 24, {"one": 2})
    a.first_token()
    a.first_token()
    assert (ledger.queued, ledger.running, ledger.decode_ranks, ledger.context) == (2, 1, 20, a.prompt)
    for each in (a, b, c, a):
        each.done()
    b.first_token()  # a late timer
    assert ledger.idle()
    b.sent(ledger)  # a retry
    assert not ledger.idle()
    b.done()
    assert ledger.idle()


def test_mean_output_follows_what_is_seen() -> None:
    predictor = Predictor(COST)
    for _ in range(500):
        predictor.saw_output(10)
    assert predictor.mean_output == pytest.approx(10, abs=1)
    for most, output in ((None, pytest.approx(10, abs=1)), (3, 3)):
        made = predictor.work(Target("base", {}, 0), 4, most, True)
        assert made is not None
        assert made.output == output


def test_the_step_cost_of_the_table_is_followed_unless_the_operator_gives_one() -> None:
    told, other = table([]), msgspec.structs.replace(COST, base=0.5)
    told = msgspec.structs.replace(told, prediction=Prediction(step_cost=other, measured=True))
    predictor, own = Predictor(), Predictor(COST)
    base = Target("base", {}, 0)
    assert predictor.work(base, 4, None, True) is None
    assert predictor.choose(work(own, base), upstreams()) is None
    for each in (predictor, own):
        each.follow(told)
    assert (predictor.cost, own.cost) == (other, COST)
    assert predictor.choose(work(predictor, base), upstreams()) == "a"
    predictor.follow(table([]))
    assert predictor.cost is None


def test_unmeasured_costs_do_not_pile_an_adapters_requests_on_one_holder() -> None:
    """Shipped values of a GPU say that a larger batch costs next to nothing, which need not be so here."""
    one = Target("one", {"a": 0.5, "b": 0.5}, 64)
    chosen: dict[bool, list[str | None]] = {}
    for measured in (False, True):
        predictor, known = Predictor(), upstreams()
        prediction = Prediction(step_cost=H100_8B_STEP_COST, measured=measured)
        predictor.follow(msgspec.structs.replace(table([]), prediction=prediction))
        for _ in range(8):
            each = work(predictor, one)
            name = predictor.choose(each, known)
            assert name is not None
            each.sent(known[name].ledger)
            each.first_token()
            chosen.setdefault(measured, []).append(name)
    assert chosen[False].count("a") == chosen[False].count("b") == 4
    assert set(chosen[True]) == {"a"}


def test_toppings_routers_choose_by_least_added_cost() -> None:
    """It adds least where fewest decode, though another would be done with this request first; and nobody spills."""
    cost = StepCost(base=0.01, prefill_token=1e-4, decode_token=1e-3)
    one = Target("one", {"a": 0.5, "b": 0.5}, 8)
    chosen = {}
    for choice in ("finish-time", "least-added-cost"):
        predictor, known = Predictor(), upstreams("abc")
        prediction = msgspec.convert({"step_cost": cost, "measured": True, "choice": choice}, Prediction)
        predictor.follow(msgspec.structs.replace(table([]), prediction=prediction))
        for _ in range(6):
            decoding = work(predictor, one, 4)
            decoding.sent(known["a"].ledger)
            decoding.first_token()
        work(predictor, one, 4000).sent(known["b"].ledger)
        work(predictor, one, 400).sent(known["b"].ledger)
        chosen[choice] = predictor.choose(work(predictor, one), known)
    assert chosen == {"finish-time": "c", "least-added-cost": "b"}


def test_speed_seats_and_token_budget_of_an_instance_count() -> None:
    base, even = Target("base", {}, 0), entry("b", "http://b")
    for better in (
        msgspec.structs.replace(even, speed=2.0),
        msgspec.structs.replace(even, capacity=Capacity(slots=8, rank_rows=512, max_seqs=64)),
        msgspec.structs.replace(even, capacity=Capacity(slots=8, rank_rows=512, max_batched_tokens=8192)),
    ):
        predictor, known = Predictor(COST), upstreams()
        poor = Capacity(slots=8, rank_rows=512, max_seqs=4, max_batched_tokens=256)
        known["a"].entry = msgspec.structs.replace(known["a"].entry, capacity=poor)
        known["b"].entry = msgspec.structs.replace(better, capacity=better.capacity if better.speed == 1.0 else poor)
        for upstream in known.values():
            for _ in range(4):
                running = work(predictor, base)
                running.sent(upstream.ledger)
                running.first_token()
        assert predictor.choose(work(predictor, base), known) == "b"


async def test_a_router_without_options_follows_the_tables_step_cost(serve: Serve) -> None:
    """Two requests to be read are more than three short ones, which by count of requests they are not."""
    served = await serve(2)
    listed = [entry(stub.name, stub.url) for stub in served.stubs]
    told = table(listed, [routes("one", rank=16, a=0.5, b=0.5)], version=2)
    prediction = Prediction(step_cost=COST)
    served.router.directory.apply(msgspec.structs.replace(told, prediction=prediction))
    admission = served.router.admission
    assert admission.predictor.cost == COST
    known = served.router.directory.upstreams
    for _ in range(3):
        known["a"].started()
    long = work(admission.predictor, served.router.directory.resolve("one"), 40_000)
    known["b"].started()
    long.sent(known["b"].ledger)
    body = {"model": "one", "prompt": "x", "max_tokens": 5}
    async with served.client.post("/v1/completions", json=body) as r:
        assert r.status == 200
    assert [len(stub.paths) for stub in served.stubs] == [1, 0]
    long.done()


async def test_a_router_with_step_costs_serves_and_clears_its_ledgers(serve: Serve) -> None:
    served = await serve(2, step_cost=COST)
    served.publish([routes("one", rank=16, a=1.0)])
    served.stubs[0].script = ["die"]
    served.stubs[1].script = ["headers", "event", "event", "done"]
    for stream in (True, False):
        body = {"model": "one", "stream": stream, "max_tokens": 5}
        async with served.client.post("/v1/completions", json=body) as r:
            assert (await r.content.read()).count(b"data: ") == 3
    assert served.idle()
    assert all(upstream.ledger.idle() for upstream in served.router.directory.live())


def test_operating_points_are_read_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "points.json"
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    arguments = ["--instances", "http://x", "--operating-points", str(file)]
    assert main(["router", *arguments]) == 2
    assert "no file" in capsys.readouterr().err
    save(OperatingPoints(points={8: 100.0}), file)
    assert main(["router", *arguments]) == 2
    assert "no step cost" in capsys.readouterr().err
    save(OperatingPoints(points={8: 100.0}, step_cost=COST), file)
    assert cli.config_from(parser.parse_args(arguments)).step_cost == COST
