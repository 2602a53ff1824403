"""Which instances and models are known, as tables come, go stale, and a coordinator restarts."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from vllm_loraserve.router.directory import LINGER_S, ORPHAN_S, STALE_S, Directory
from vllm_loraserve.router.errors import ApiError
from vllm_loraserve.router.upstream import Attempt

from .conftest import entry, routes, table
from .test_queue import Clock

A, B = entry("a", "http://x:1"), entry("b", "http://x:2")


def names(directory: Directory) -> set[str]:
    return {upstream.name for upstream in directory.live()}


def test_older_tables_are_refused_equal_and_newer_taken() -> None:
    directory = Directory(Clock())
    assert directory.apply(table([A], version=5, epoch=2))
    assert not directory.apply(table([A, B], version=4, epoch=2))
    assert not directory.apply(table([A, B], version=9, epoch=1))
    assert names(directory) == {"a"}
    assert directory.apply(table([A], version=5, epoch=2))
    assert directory.apply(table([A, B], version=1, epoch=3))
    assert names(directory) == {"a", "b"}


def test_a_smaller_epoch_is_taken_when_the_last_table_is_old() -> None:
    clock = Clock()
    directory = Directory(clock)
    directory.apply(table([A], epoch=9))
    clock.now += STALE_S
    assert directory.apply(table([B], epoch=1))


def test_instances_survive_the_first_tables_of_a_restarted_coordinator() -> None:
    clock = Clock()
    directory = Directory(clock)
    directory.apply(table([A, B], [routes("one", a=1.0)], epoch=1))
    kept = directory.upstreams["a"]
    directory.apply(table([], [routes("one")], epoch=2, base_model=""))
    assert names(directory) == {"a", "b"}
    assert directory.resolve(None).name == "base"
    assert directory.resolve("one").routes == {}
    directory.apply(table([A], epoch=2, version=2))
    assert directory.upstreams["a"] is kept
    assert names(directory) == {"a", "b"}
    clock.now += LINGER_S
    directory.sweep()
    assert names(directory) == {"a"}


def test_an_unsettled_table_brings_adapters_and_takes_no_instances() -> None:
    """Fetched from a coordinator that has just restarted: its registry is whole, its instances are not."""
    directory = Directory(Clock())
    directory.apply(table([A, B], [routes("one", a=1.0), routes("gone", b=1.0)], version=9))
    fetched = table([A], [routes("one"), routes("new")], epoch=2)
    assert directory.apply(msgspec.structs.replace(fetched, settled=False))
    assert names(directory) == {"a", "b"}
    assert (directory.resolve("one").routes, directory.resolve("new").routes) == ({"a": 1.0}, {})
    with pytest.raises(ApiError):
        directory.resolve("gone")
    assert directory.epoch == 1
    assert directory.apply(table([A], [routes("new", a=1.0)], epoch=2))
    assert directory.epoch == 2


def test_an_instance_that_leaves_within_an_epoch_goes_at_once() -> None:
    directory = Directory(Clock())
    directory.apply(table([A, B]))
    gone = directory.upstreams["b"]
    directory.apply(table([A], version=2))
    assert names(directory) == {"a"}
    assert gone.gone
    assert not gone.available(0.0)


async def test_an_instance_that_is_about_to_stop_keeps_its_requests_until_it_leaves() -> None:
    clock = Clock()
    directory = Directory(clock)
    directory.apply(table([A, B], [routes("one", a=0.5, b=0.5)]))
    stopping = directory.upstreams["b"]
    request = asyncio.create_task(asyncio.sleep(3600))
    stopping.attempts.add(Attempt(request, clock.now))
    going = msgspec.structs.replace(B, draining=True)
    for version in (2, 3):
        directory.apply(table([A, going], [routes("one", a=0.5, b=0.5)], version=version))
        assert names(directory) == {"a"}
        assert not stopping.available(clock.now)
        assert set(directory.resolve("one").routes) == {"a"}
        clock.now += 2 * ORPHAN_S
        directory.sweep()
        await asyncio.sleep(0)
        assert not request.cancelling(), "though it is silent: a long answer that does not stream"
    directory.apply(table([A], version=4))
    await asyncio.gather(request, return_exceptions=True)
    assert request.cancelled()
    new = msgspec.structs.replace(B, incarnation="2")
    directory.apply(table([A, new], version=5))
    assert names(directory) == {"a", "b"}
    assert directory.upstreams["b"] is not stopping


def test_a_restarted_instance_begins_anew() -> None:
    clock = Clock()
    directory = Directory(clock)
    directory.apply(table([A]))
    old = directory.upstreams["a"]
    old.failed(clock.now)
    directory.apply(table([entry("a", "http://x:1", incarnation="2")], version=2))
    new = directory.upstreams["a"]
    assert new is not old
    assert old.gone
    assert new.available(clock.now)


def test_models_resolve_to_their_live_routes() -> None:
    directory = Directory(Clock())
    with pytest.raises(ApiError) as unknown:
        directory.resolve("base")
    assert unknown.value.status == 503  # nothing is known yet, so nothing is known not to exist
    directory.apply(table([A, B], [routes("one", rank=64, a=0.5, b=0.25, gone=0.25), routes("out", state="draining")]))
    target = directory.resolve("one")
    assert (target.routes, target.rank) == ({"a": 0.5, "b": 0.25}, 64)
    assert directory.resolve("") is directory.resolve("base") is directory.resolve(None)
    with pytest.raises(ApiError) as unknown:
        directory.resolve("out")
    assert unknown.value.status == 404
    directory.apply(table([B], [routes("one", rank=64, a=0.5, b=0.5)], version=2))
    assert directory.resolve("one").routes == {"b": 0.5}


def test_a_failed_adapter_says_why() -> None:
    directory = Directory(Clock())
    directory.apply(table([A], [routes("one", state="failed", reason="its file is gone", a=1.0)]))
    with pytest.raises(ApiError, match="its file is gone") as failed:
        directory.resolve("one")
    assert failed.value.status == 400
