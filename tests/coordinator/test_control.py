"""The controller's decisions over time: placement, lazy migration, restarts."""

import msgspec
import pytest
from coordinator_bench import FakeInstance, add, record

from vllm_loraserve.cluster.operating_points import OperatingPoints, StepCost, shipped_defaults
from vllm_loraserve.cluster.placement import make_policy
from vllm_loraserve.coordinator.control import ControlOptions
from vllm_loraserve.coordinator.insight import explain
from vllm_loraserve.coordinator.membership import Refused
from vllm_loraserve.coordinator.messages import PageGroup, Prediction, Residency


def test_adapters_are_placed_prefetched_and_routed(bench):
    b = bench()
    b.join("one")
    b.join("two")
    add(b, *"abcd")
    assert all(len(r) == 1 for r in b.routes().values()), "placed at once, before anything is resident"
    b.run(2)
    held = {name: set(i.resident) for name, i in b.instances.items()}
    assert sorted(map(len, held.values())) == [2, 2]
    assert all(set(r) == {i for i in held if a in held[i]} for a, r in b.routes().items())
    assert sum(sum(r.values()) for r in b.routes().values()) == pytest.approx(4)
    assert not b.controller.commands.pending()


def test_the_table_says_by_what_finish_times_are_predicted_where_the_policy_wants_it(bench):
    b = bench(policy="loraserve+")
    b.join("one")
    shipped = b.controller.table(b.now)
    assert shipped.prediction == Prediction(step_cost=shipped_defaults().step_cost, measured=False)
    assert [entry.speed for entry in shipped.instances] == [1.0]
    # A queue that lasts shows what an instance really sustains.
    add(b, "a")
    b.run(2)
    half = b.controller.loop.op.at(8) / 2
    b.instances["one"].rates, b.instances["one"].waiting = {"a": half}, 5
    b.run(15)
    assert [entry.speed for entry in b.controller.table(b.now).instances] == [pytest.approx(0.5)]
    cost = StepCost(base=0.1)
    b.controller.loop.op = OperatingPoints(points={8: 1.0}, step_cost=cost, measured=True)
    assert b.controller.table(b.now).prediction == Prediction(step_cost=cost, measured=True)
    b.controller.loop.op = OperatingPoints(points={8: 1.0}, measured=True)
    assert b.controller.table(b.now).prediction is None
    b.controller.loop.op = shipped_defaults()
    b.controller.loop.policy = make_policy("loraserve")
    assert b.controller.table(b.now).prediction is None, "the paper draws by fraction"
    b.controller.loop.policy = make_policy("toppings")
    assert b.controller.table(b.now).prediction.choice == "least-added-cost"


def test_operating_points_of_another_model_or_device_are_a_problem(bench):
    b = bench(policy="loraserve+")
    b.join("one")
    for model, device, says in (
        ("toy", "", ""),
        ("", "GPU", "of 'GPU', not of 'CPU'"),
        ("toy", "CPU", ""),
        ("other", "CPU", "of 'other', not of 'toy'"),
    ):
        b.instances["one"].capacity = msgspec.structs.replace(b.instances["one"].capacity, device="CPU")
        b.controller.register(b.instances["one"].hello(), b.now)
        op = OperatingPoints(points={8: 1.0}, measured=True, model=model, device=device)
        b.controller.loop.op = op
        assert says in "".join(b.controller.problems())
        assert bool(b.controller.problems()) is bool(says)
        b.controller.loop.op = msgspec.structs.replace(op, measured=False)
        assert not b.controller.problems()


def test_a_dead_instance_loses_its_routes_and_comes_back(bench):
    b = bench()
    b.join("one")
    b.join("two")
    add(b, *"abcd")
    b.run(2)
    b.run(6, "one")
    assert all(set(r) == {"one"} for r in b.routes().values())
    assert [i.name for i in b.controller.table(b.now).instances] == ["one"]
    with pytest.raises(Refused) as refused:
        b.beat("two")
    assert refused.value.code == "unknown_instance"
    b.join("two", incarnation="2")
    b.run(2)
    assert [i.name for i in b.controller.table(b.now).instances] == ["one", "two"]


def test_an_instance_that_is_about_to_stop_gets_nothing_new_and_hands_on_what_it_has(bench):
    b = bench()
    b.join("one")
    b.join("two")
    b.instances["two"].transfer = "127.0.0.1:7001"
    b.controller.register(b.instances["two"].hello(), b.now)
    add(b, *"abcd")
    b.run(2)
    had = set(b.instances["two"].resident)
    assert had
    told = len(b.instances["two"].told)
    b.instances["two"].draining, b.instances["two"].running = True, {min(had): 1}
    b.beat("two")
    assert all(set(routes) == {"one"} for routes in b.routes().values()), "at once"
    entries = {entry.name: entry for entry in b.controller.table(b.now).instances}
    assert (entries["one"].draining, entries["two"].draining) == (False, True)
    add(b, "e")
    b.run(2)
    assert set(b.instances["one"].resident) == set("abcde")
    fetched = {c.adapter.name: [x.instance for x in c.locations] for c in b.instances["one"].told}
    assert all(fetched[name] == ["two"] for name in had), "its memory can still be read"
    assert len(b.instances["two"].told) == told
    b.restart()
    for name in ("one", "two"):
        b.controller.register(b.instances[name].hello(), b.now)
    assert all(set(routes) == {"one"} for routes in b.routes().values()), "also when it registers anew"
    b.instances["one"].draining = True
    b.run(2)
    assert all(routes == {} for routes in b.routes().values())
    b.controller.leave("two", "1", b.now)
    b.join("two", incarnation="2")
    b.run(2)
    assert all(set(routes) == {"two"} for routes in b.routes().values())


def test_restart_waits_for_the_instances_and_keeps_every_place(bench):
    b = bench()
    b.join("one")
    b.join("two")
    add(b, *"abcdef")
    b.run(3)
    before = b.routes()
    b.restart()
    assert not b.controller.settled
    back = b.now
    for name in ("two", "one"):
        assert not b.controller.settled
        with pytest.raises(Refused):
            b.beat(name)
        b.now += 0.5  # what a client waits at most before it connects again
        b.controller.register(b.instances[name].hello(), b.now)
    assert b.controller.settled
    assert b.now - back < 5.0
    assert b.routes() == before
    b.run(3)
    assert b.routes() == before


def test_restart_does_not_wait_for_ever(bench):
    b = bench(settle_s=4.0)
    b.join("one")
    b.join("two")
    add(b, *"abcd")
    b.run(2)
    b.restart()
    b.controller.register(b.instances["one"].hello(), b.now)
    b.run(5, "one")
    assert b.controller.settled
    assert all(set(r) == {"one"} for r in b.routes().values())


def test_migration_routes_to_the_old_copy_until_the_new_one_is_there_then_releases_it(bench):
    b = bench(release_after_s=5.0)
    one = b.join("one")
    add(b, "a")
    b.run(2)
    two = b.join("two")
    b.controller.placement.phi["a"] = {"two": 1.0}
    b.controller.tick(b.now + 1)
    assert b.routes()["a"] == {"one": 1.0}, "two has no copy yet"
    b.beat("two")
    assert ("prefetch", "a") in two.done
    b.beat("two")
    assert b.routes()["a"] == {"two": 1.0}
    one.running["a"] = 1
    b.run(8)
    assert "a" in one.resident, "never while a request of it runs"
    one.running.clear()
    b.run(3)
    assert "a" not in one.resident
    assert "a" in two.resident


def test_the_last_copy_is_not_released(bench):
    b = bench(release_after_s=1.0)
    one, two = b.join("one"), b.join("two")
    add(b, "a")
    b.run(2)
    holder, other = (one, two) if "a" in one.resident else (two, one)
    other.broken.add("a")
    b.controller.placement.phi["a"] = {other.name: 1.0}
    b.run(10)
    assert "a" in holder.resident
    assert b.routes()["a"] == {holder.name: 1.0}, "the new place can't load it"
    assert any("no such file" in p for p in b.controller.problems())


def test_failed_prefetch_is_tried_again_later_not_at_once(bench):
    b = bench()
    one = b.join("one")
    one.broken.add("a")
    add(b, "a")
    b.run(4)
    assert one.done == [("prefetch", "a")]
    one.broken.clear()
    b.run(5)
    assert one.done == [("prefetch", "a")] * 2
    assert "a" in one.resident
    assert not b.controller.problems()


def test_same_name_other_content_is_a_conflict_and_new_content_replaces_stale_copies(bench):
    b = bench()
    one = b.join("one")
    add(b, "a")
    b.run(2)
    assert b.controller.add(record("a"), b.now)[1] is False
    with pytest.raises(Refused, match="other content") as refused:
        b.controller.add(record("a", sha256="new"), b.now)
    assert refused.value.code == "conflict"
    b.controller.remove("a", 0.0, b.now)
    b.registry.remove("a")
    b.controller._removals._drains.clear()
    fresh, created = b.controller.add(record("a", sha256="new"), b.now)
    assert created
    b.run(3)
    assert one.resident["a"].sha256 == "new"
    assert one.done == [("prefetch", "a"), ("prefetch", "a")], "which lets go of the stale copy"
    assert fresh.adapter_id > 1


def test_content_that_takes_a_name_over_replaces_the_old_without_a_gap(bench):
    b = bench()
    one, two = b.join("one"), b.join("two")
    add(b, "a")
    b.run(2)
    holder, other = (one, two) if "a" in one.resident else (two, one)
    before = b.registry.get("a")
    done = len(holder.done)
    fresh, created = b.controller.add(record("a", sha256="new", rank=64), b.now, replace=True)
    assert created
    assert (fresh.rank, fresh.adapter_id > before.adapter_id) == (64, True)
    assert b.registry.get("a") == fresh
    assert sorted(b.controller.outdated(fresh)) == ["one", "two"], "a request may have brought it to the other one"
    assert set(b.routes()["a"]) == {holder.name}, "it serves the old content until it has the new one"
    b.run(3)
    assert b.controller.outdated(fresh) == []
    assert holder.resident["a"].sha256 == "new"
    assert holder.done[done:] == [("prefetch", "a")], "and lets go of nothing before"
    (told,) = other.told
    assert (told.action, told.adapter.sha256, told.superseded) == ("release", before.sha256, True)
    assert b.controller.replaced(fresh) == ""
    assert b.controller.add(record("a", sha256="new", rank=64), b.now, replace=True) == (fresh, False)
    fetching, _ = b.controller.add(record("b"), b.now, replace=True)
    assert b.controller.commands.pending()
    assert b.controller.outdated(fetching) == [], "a new name takes nothing over"
    b.restart()
    assert b.registry.get("a") == fresh


def test_a_replacement_that_can_not_be_loaded_does_not_leave_the_old_content_serving(bench):
    b = bench()
    one = b.join("one")
    add(b, "a")
    b.run(2)
    one.broken.add("a")
    fresh, _ = b.controller.add(record("a", sha256="new"), b.now, replace=True)
    b.run(3)
    assert b.controller.outdated(fresh) == []
    assert b.controller.replaced(fresh) == "'one' can't load it: no such file"
    assert "a" not in one.resident
    assert "can't load 'a'" in "".join(b.controller.problems())


def test_more_adapters_than_memory_are_all_routed_but_not_all_prefetched(bench):
    b = bench()
    b.join("one", rank_rows=64, slots=8)
    b.join("two", rank_rows=64, slots=8)
    add(b, *(f"a{i}" for i in range(40)), rank=16)
    b.run(6)
    assert all(r for r in b.routes().values())
    assert all(len(i.resident) <= 4 for i in b.instances.values())
    add(b, "huge", rank=128)
    assert b.routes()["huge"] == {}
    assert any("huge" in p and "128 rank rows" in p for p in b.controller.problems())


def test_demand_moves_adapters_but_wobble_does_not(bench):
    b = bench(rebalance_s=5.0)
    one, two = b.join("one"), b.join("two")
    add(b, *"abcd", rank=64)
    b.run(12)
    settled = b.routes()
    op = b.controller.loop.op.at(64)
    for wobble in (0.95, 1.05, 0.97, 1.02):
        for i in (one, two):
            i.rates = dict.fromkeys(i.resident, 0.2 * op * wobble)
        b.run(6)
        assert b.routes() == settled
    for i in (one, two):
        i.rates = dict.fromkeys(i.resident, 0.01 * op)
    hot = min(one.resident)
    one.rates = {hot: 1.5 * op}
    b.run(40)
    assert set(b.routes()[hot]) == {"one", "two"}, "too hot for one instance"


def test_names_urls_and_models_that_do_not_fit_are_refused(bench):
    b = bench()
    b.join("one")
    with pytest.raises(Refused, match="base model's name"):
        b.controller.check_name("toy")
    with pytest.raises(Refused, match="serves 'other'"):
        b.controller.register(FakeInstance("two").hello(base_model="other"), b.now)
    with pytest.raises(Refused, match="already live"):
        b.controller.register(FakeInstance("one", incarnation="2", port=1234).hello(), b.now)
    b.controller.register(FakeInstance("one", incarnation="2").hello(), b.now)
    with pytest.raises(Refused) as refused:
        b.controller.remove("nobody", 0.0, b.now)
    assert refused.value.code == "not_found"


def test_a_refused_instance_is_a_problem_until_it_is_taken_or_stops_asking(bench):
    b = bench()
    b.join("one")
    other = FakeInstance("two")
    with pytest.raises(Refused):
        b.controller.register(other.hello("another-model"), b.now)
    (problem,) = b.controller.problems()
    assert problem.startswith(f"Refused {other.url}: Instance 'two' serves 'another-model', but this cluster 'toy'")
    b.controller.register(other.hello(), b.now)
    assert b.controller.problems() == []
    with pytest.raises(Refused):
        b.controller.register(FakeInstance("three").hello("another-model"), b.now)
    b.run(31, "one")
    assert b.controller.problems() == []


def test_leaving_is_at_once(bench):
    b = bench()
    one = b.join("one")
    b.join("two")
    add(b, *"ab")
    b.run(2)
    b.controller.leave("one", "stale incarnation", b.now)
    assert len(b.controller.table(b.now).instances) == 2
    b.controller.leave("one", one.incarnation, b.now)
    assert all(set(r) == {"two"} for r in b.routes().values())


def test_the_location_table_names_who_can_be_read_from_least_busy_first(bench):
    b = bench()
    for i, name in enumerate(("one", "two", "three")):
        b.join(name, transfer=f"127.0.0.1:{9000 + i}")
    silent = b.join("silent")
    add(b, "a")
    record_a = b.registry.get("a")
    for name in ("one", "two", "silent"):
        b.instances[name].resident["a"] = Residency(name="a", sha256=record_a.sha256, generation=7)
    b.instances["three"].resident["a"] = Residency(name="a", sha256="of another content", generation=3)
    b.instances["one"].running["a"] = 3
    b.beat()
    assert [(x.instance, x.endpoint, x.generation) for x in b.controller.locations(record_a)] == [
        ("two", "127.0.0.1:9001", 7),
        ("one", "127.0.0.1:9000", 7),
    ]
    assert silent.told == []
    b.controller.loop.placement.phi["a"] = {"three": 1.0}
    b.run(4)
    told = [c for c in b.instances["three"].told if c.action == "prefetch"]
    assert [x.instance for x in told[0].locations] == ["two", "one"]
    # What is in an arena alone can not be read.
    b.instances["two"].resident["a"] = Residency(name="a", sha256=record_a.sha256, tier="arena")
    b.beat()
    assert "two" not in [x.instance for x in b.controller.locations(record_a)]


def test_placement_counts_pages_and_not_checkpoints(bench):
    """Two adapters whose checkpoints would fit one instance together, and whose pages do not."""
    b = bench()
    for name in ("one", "two"):
        b.join(name, host_bytes=40_000)
        b.instances[name].capacity = msgspec.structs.replace(
            b.instances[name].capacity,
            page_rows=16,
            page_groups=(PageGroup(modules=("q_proj", "k_proj", "v_proj"), row_bytes=2000),),
        )
        b.controller.register(b.instances[name].hello(), b.now)
    add(b, "a", "b", "c", rank=9)
    specs = b.controller.placement_input(b.now).adapters
    assert {(a.rank_rows, a.bytes) for a in specs} == {(16, 32_000)}
    b.run(3)
    assert sorted(len(i.resident) for i in b.instances.values()) == [1, 1]
    assert any("32000" in line for line in explain(b.controller, "a", b.now).lines)


def test_what_the_base_models_modules_are_survives_a_restart(bench):
    b = bench()
    b.join("one")
    known = b.controller.modules
    assert set(known) == {"q_proj", "v_proj"}
    b.restart()
    assert b.controller.modules == {}, "the registered adapters were not compared with it yet"
    b.join("one")
    b.controller.all_compared(b.controller.modules)
    b.restart()
    assert b.controller.modules == known
    b.join("one")
    assert not b.controller.modules_changed.is_set()
    b.options = ControlOptions(base_model="another")
    b.restart()
    assert b.controller.modules == {}


def test_a_failed_adapter_has_no_place_and_can_be_removed_or_registered_again(bench):
    b = bench()
    b.join("one")
    add(b, "a", "b")
    for name in "ab":
        b.controller.fail(b.registry.get(name), "It is for another model.")
    b.run(1)
    assert b.routes() == {"a": {}, "b": {}}
    assert not b.controller.commands.pending()
    assert "'a' can't be served: It is for another model." in b.controller.problems()
    b.restart()
    assert b.registry.get("a").state == "failed"
    b.controller.register(b.instances["one"].hello(), b.now)
    add(b, "a")
    assert b.registry.get("a").state == "active"
    done = b.controller.remove("b", 0.0, b.now)
    b.run(2)
    assert done.is_set()
    assert set(b.routes()) == {"a"}
    assert b.routes()["a"]
