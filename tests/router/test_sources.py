"""Tables from a coordinator, and, without one, from the instances themselves."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import ClientSession

from vllm_loraserve.router.directory import Directory
from vllm_loraserve.router.sources import CoordinatorSource, StaticSource

from .stub import Stub


async def test_static_instances_are_in_while_they_answer_and_adapters_where_they_are_listed() -> None:
    one, two = await Stub("one").start(), await Stub("two").start()
    one.models = ["base", "x", "y"]
    two.models = ["base", "y"]
    directory = Directory()
    async with ClientSession() as session:
        source = StaticSource(directory, [one.url, two.url + "/"], session)
        await source.refresh()
        names = {upstream.url: upstream.name for upstream in directory.live()}
        assert set(names) == {one.url, two.url}
        assert directory.base_model == "base"
        assert [upstream.entry.capacity.max_model_len for upstream in directory.live()] == [2048, 2048]
        assert directory.resolve("x").routes == {names[one.url]: 1.0}
        assert directory.resolve("y").routes == dict.fromkeys(names.values(), 0.5)
        await one.stop()
        await source.refresh()
        assert {upstream.url for upstream in directory.live()} == {two.url}
        assert directory.resolve("y").routes == {names[two.url]: 1.0}
        await one.start(one.port)
        await source.refresh()
        assert len(directory.live()) == 2
    await one.stop()
    await two.stop()


async def test_a_silent_coordinator_is_said_once_and_its_return_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_loraserve.router.sources.SWEEP_EVERY_S", 0.005)
    monkeypatch.setattr("vllm_loraserve.router.sources.SILENT_S", 0.0)
    caplog.set_level("INFO")
    source = CoordinatorSource(Directory(), "tcp://127.0.0.1:9")
    await source.start()
    try:
        async with asyncio.timeout(60):
            while "silent" not in caplog.text:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            assert caplog.text.count("is silent; is it there, with our keys?") == 1
            monkeypatch.setattr("vllm_loraserve.router.sources.SILENT_S", float("inf"))
            while "heard again" not in caplog.text:
                await asyncio.sleep(0.005)
    finally:
        await source.stop()


async def test_what_does_not_belong_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    one, other = await Stub("one").start(), await Stub("other").start()
    directory = Directory()
    async with ClientSession() as session:
        source = StaticSource(directory, [one.url, other.url, one.url + "/"], session)
        await source.refresh()
        other.base, other.models = "another-model", ["another-model"]
        for _ in range(3):
            await source.refresh()
            assert [upstream.url for upstream in directory.live()] == [one.url]
        assert caplog.text.count("it serves 'another-model', and the first one 'base'") == 1
        await one.stop()  # what the cluster serves does not change because one is away
        await source.refresh()
        assert directory.live() == []
        assert directory.base_model == "base"
    await other.stop()


async def test_an_instance_slow_to_answer_stays_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = await Stub("one").start()
    directory = Directory()
    async with ClientSession() as session:
        source = StaticSource(directory, [stub.url], session)
        await source.refresh()

        def late(*_: object, **__: object) -> None:
            raise TimeoutError

        monkeypatch.setattr(session, "get", late)
        for left in (1, 1, 0):
            await source.refresh()
            assert len(directory.live()) == left
    await stub.stop()


async def test_an_instance_that_has_gone_is_not_taken_back_for_a_slow_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = await Stub("one").start()
    directory = Directory()
    async with ClientSession() as session:
        source = StaticSource(directory, [stub.url], session)
        await source.refresh()
        await stub.stop()
        await source.refresh()  # refused
        assert not directory.live()

        def late(*_: object, **__: object) -> None:
            raise TimeoutError

        monkeypatch.setattr(session, "get", late)
        await source.refresh()
        assert not directory.live()


async def test_static_instances_that_want_a_key_are_asked_with_it() -> None:
    stub = await Stub("one").start()
    stub.key = "upstream"
    directory = Directory()
    async with ClientSession() as session:
        await StaticSource(directory, [stub.url], session).refresh()
        assert directory.live() == []
        await StaticSource(directory, [stub.url], session, key="upstream").refresh()
        assert [upstream.url for upstream in directory.live()] == [stub.url]
    await stub.stop()
