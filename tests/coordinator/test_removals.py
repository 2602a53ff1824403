"""Removals: requests that run finish, instances release, and a disk that can't be written loses nothing."""

import sqlite3

import pytest
from coordinator_bench import add

from vllm_loraserve.coordinator.membership import Refused
from vllm_loraserve.coordinator.registry import RegistryError


def test_removal_drains_then_releases_then_forgets(bench):
    b = bench()
    one = b.join("one")
    add(b, "a", "b")
    b.run(2)
    one.running["a"] = 2
    b.beat()
    done = b.controller.remove("a", 30.0, b.now)
    assert b.routes()["a"] == {}
    with pytest.raises(Refused) as refused:
        b.controller.check_name("a")
    assert refused.value.code == "conflict"
    b.run(5)
    assert "a" in one.resident
    assert not done.is_set()
    one.running["a"] = 0
    b.run(3)
    assert done.is_set()
    assert set(one.resident) == {"b"}
    assert [r.name for r in b.registry.all()] == ["b"]


def test_a_drain_survives_a_restart(bench):
    b = bench()
    one = b.join("one")
    add(b, "a")
    b.run(2)
    one.running["a"] = 1
    b.beat()
    b.controller.remove("a", 5.0, b.now)
    b.run(1)
    b.restart()
    b.now += 1.0
    b.controller.tick(b.now)
    assert [r.name for r in b.registry.all()] == ["a"]  # nobody is there yet to be asked
    b.controller.register(one.hello(), b.now)
    b.run(8)
    assert "a" in one.resident  # it has a running request, and time again
    one.running["a"] = 0
    b.run(3)
    assert "a" not in one.resident
    assert not b.registry.all()


def test_a_drain_ends_at_its_deadline(bench):
    b = bench()
    one = b.join("one")
    add(b, "a")
    b.run(2)
    one.running["a"] = 1
    b.beat()
    b.controller.remove("a", 5.0, b.now)
    b.run(8)
    assert "a" not in one.resident
    assert not b.registry.all()


class FullDisk:
    """A connection that refuses to write while `full`."""

    def __init__(self, db):
        self._db, self.full = db, True

    def execute(self, statement, *values):
        if self.full and not statement.startswith("SELECT"):
            raise sqlite3.OperationalError("database or disk is full")
        return self._db.execute(statement, *values)

    def close(self):
        self._db.close()


def on_disk(bench):
    return dict(sqlite3.connect(bench.registry.path).execute("SELECT name, state FROM adapters"))


def in_memory(bench):
    return {r.name: r.state for r in bench.registry.all()}


def test_a_removal_that_can_not_be_written_is_done_when_it_can(bench):
    b = bench()
    b.join("one")
    add(b, "a", "b")
    b.run(2)
    done = b.controller.remove("a", 0.0, b.now)
    disk = b.registry._db = FullDisk(b.registry._db)
    b.run(5)
    assert not done.is_set()
    assert in_memory(b) == on_disk(b) == {"a": "draining", "b": "active"}
    assert set(b.routes()["b"]) == {"one"}, "the rest of the cluster goes on"
    disk.full = False
    b.run(5)
    assert done.is_set()
    assert in_memory(b) == on_disk(b) == {"b": "active"}


def test_what_can_not_be_written_has_not_happened(bench):
    b = bench()
    b.join("one")
    add(b, "a")
    b.run(2)
    disk = b.registry._db = FullDisk(b.registry._db)
    for change in (lambda: b.controller.remove("a", 0.0, b.now), lambda: add(b, "c")):
        with pytest.raises(RegistryError, match=r"can't be written \(database or disk is full\)"):
            change()
    b.run(5)
    assert in_memory(b) == on_disk(b) == {"a": "active"}
    assert set(b.routes()["a"]) == {"one"}
    disk.full = False
    done = b.controller.remove("a", 0.0, b.now)
    b.run(5)
    assert done.is_set()


def test_an_instance_joins_and_leaves_while_nothing_can_be_written(bench):
    b = bench()
    b.join("one")
    b.registry._db = FullDisk(b.registry._db)
    b.join("two")
    assert [m.name for m in b.controller.members.all()] == ["one", "two"]
    b.controller.leave("two", b.instances["two"].incarnation, b.now)
    assert [m.name for m in b.controller.members.all()] == ["one"]
