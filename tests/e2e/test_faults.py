"""kill -9 of a part of the cluster, under load."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import time
from collections.abc import Callable

import openai
import pytest
from openai import AsyncStream
from openai.types.chat import ChatCompletionChunk
from world import World

from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorUnavailable
from vllm_loraserve.coordinator.messages import GetStatus, RoutingTable, Status
from vllm_loraserve.launcher import traffic
from vllm_loraserve.launcher.traffic import Request

BACK_S = 5.0
"""From the start of a coordinator until it has everything again, by its own clock: loading Python is no part of it."""
PATIENCE_S = 120.0
"""For what is certain to come, on any machine: only a defect uses it up."""
BROKEN = "failed; the answer is incomplete|EngineCore|Internal|shutting down"
"""What the router says of an instance that vanishes; one that stops, or whose engine has died, may say so itself."""


def quick(world: World, count: int, streamed: bool = False) -> list[Request]:
    """Requests of all models in turn, none streamed or every second round."""
    return [Request(r.model, r.prompt, r.stream and streamed) for r in traffic.mixed(world.models, count)]


async def stream_on(world: World, client: openai.AsyncOpenAI, index: int) -> AsyncStream[ChatCompletionChunk]:
    """A long stream that the instance `index` serves; a session's id decides which one it is."""
    for session in itertools.count():
        stream = await world.begin_stream(client, str(session))
        while sum(running := await world.running()) == 0:
            await asyncio.sleep(0.01)
        if running[index]:
            return stream
        await stream.close()
        while sum(await world.running()) > 0:
            await asyncio.sleep(0.05)
    raise AssertionError("unreachable")


def after(count: int, act: Callable[[], None]) -> Callable[[traffic.Answer], None]:
    """For `traffic.send`: acts when so many answers are in."""
    number = itertools.count(1)

    def answered(_: traffic.Answer) -> None:
        if next(number) == count:
            act()

    return answered


async def _status(endpoint: str) -> Status | None:
    async with CoordinatorClient(endpoint, timeout_s=2) as client:
        try:
            return await client.ask(GetStatus(), Status)
        except CoordinatorUnavailable:
            return None


def settled_table(world: World) -> RoutingTable:
    """The table once every word adapter is somewhere; what is registered a moment before a kill nobody has heard of."""
    while True:
        status = asyncio.run(_status(world.cluster.coordinator_endpoint))
        assert status is not None
        table = status.table
        if {copy.name for instance in table.instances for copy in instance.resident} >= set(world.words):
            return table
        time.sleep(0.1)


def test_without_coordinator_traffic_goes_on_and_with_it_all_is_back(
    world: World, record_property: Callable[[str, object], None]
) -> None:
    cluster = world.cluster
    before = settled_table(world)
    cluster.coordinator.kill()
    assert world.wrong(world.send(quick(world, 28))) == []
    assert asyncio.run(_status(cluster.coordinator_endpoint)) is None

    cluster.coordinator.start()
    began = time.monotonic()
    expected = {entry.adapter.name for entry in before.adapters}
    assert expected >= set(world.words)
    while True:
        status = asyncio.run(_status(cluster.coordinator_endpoint))
        if status is not None and len(status.table.instances) == 2:
            known = {entry.adapter.name for entry in status.table.adapters if entry.routes}
            if known == expected:
                break
        assert time.monotonic() - began < PATIENCE_S, f"not back: {status}"
        time.sleep(0.1)
    record_property("seconds_until_all_is_back", round(status.uptime_s, 2))
    print(f"every adapter and instance is back {status.uptime_s:.1f} s after the coordinator's start")
    assert status.uptime_s < BACK_S
    assert status.table.epoch > before.epoch
    assert world.wrong(world.send(quick(world, 14))) == []


@pytest.mark.parametrize("part", ["everything", "engine core"])
def test_kill_9_of_an_instance_under_load_fails_no_request(world: World, part: str) -> None:
    """But for the streams that it has begun: those end with an error instead of looking complete, or hanging.

    With a dead engine core the API server lives on for some seconds and answers by itself.
    """
    cluster = world.cluster
    victim = cluster.instances[1]

    async def run() -> list[traffic.Answer]:
        async with traffic.client_for(cluster.url) as client:
            stream = await stream_on(world, client, 1)
            requests = quick(world, 84, streamed=part == "engine core")
            answers = await traffic.send(client, requests, concurrency=16, on_answer=after(20, strike))
            with pytest.raises(openai.APIError, match=BROKEN):
                async for _ in stream:
                    pass
            return answers

    def strike() -> None:
        assert victim.status is None
        pids = victim.pids()  # guard, API server, then the engine core and what else vLLM starts
        chosen = pids if part == "everything" else pids[2:]
        assert chosen
        for pid in reversed(chosen):
            os.kill(pid, signal.SIGKILL)

    answers = asyncio.run(run())
    begun = [a for a in answers if a.error and a.ttft_s is not None]
    assert len(begun) <= 16
    assert all(re.search(BROKEN, a.error) for a in begun)
    assert world.wrong([a for a in answers if a not in begun]) == []
    streamed = [Request(r.model, r.prompt, True) for r in traffic.mixed(world.models, 7)]
    assert world.wrong(world.send(streamed)) == []  # by the other one
    assert victim.process is not None
    victim.process.wait(300)
    cluster.wait_for_instances(1, 300.0)


STOPS = {"api server": [], "every process": [], "api server, with time to finish": ["--shutdown-timeout", "600"]}
"""Who gets the signal (a container's first process; all of a systemd unit), and options of the instance."""


@pytest.mark.parametrize("who", STOPS)
def test_sigterm_of_an_instance_under_load_loses_no_request(world: World, who: str) -> None:
    """As where an instance is restarted or its node drained. A begun stream goes on where it is given the time, and
    else ends with an error instead of looking complete."""
    cluster = world.cluster
    victim = cluster.instances[1]
    if STOPS[who]:
        victim.command.extend(STOPS[who])
        victim.kill()
        cluster.wait_for_instances(1, 300.0)
        victim.start()
        cluster.wait_for_instances(2, 600.0)

    log_begins = victim.log.stat().st_size

    def stop() -> None:
        assert victim.status is None
        for pid in victim.pids()[1 : None if who == "every process" else 2]:
            os.kill(pid, signal.SIGTERM)

    async def run() -> list[traffic.Answer]:
        async with traffic.client_for(cluster.url) as client:
            stream = await stream_on(world, client, 1)
            answers = await traffic.send(client, quick(world, 84), concurrency=16, on_answer=after(20, stop))
            if STOPS[who]:
                reasons = [choice.finish_reason async for chunk in stream for choice in chunk.choices]
                assert reasons[-1] == "length"
            else:
                with pytest.raises(openai.APIError, match=BROKEN):
                    async for _ in stream:
                        pass
            return answers

    answers = asyncio.run(run())
    assert world.wrong(answers) == []
    assert victim.process is not None
    victim.process.wait(660)
    cluster.wait_for_instances(1, 300.0)
    if STOPS[who]:
        said = victim.log.read_text()[log_begins:]
        assert "draining in-flight requests" in said
        # What vLLM says of requests that come then.
        assert "cannot schedule new futures" not in said
        assert 'HTTP/1.1" 500' not in said
