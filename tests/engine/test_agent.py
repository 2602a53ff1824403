"""Agent, meter and resolver against a real coordinator and an engine client that only keeps books."""

import asyncio
import time
from types import SimpleNamespace

import msgspec
import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from fake_engine import FakeEngine, record  # noqa: E402
from one_instance import PATIENCE_S, membership, until  # noqa: E402
from vllm.exceptions import RetryableRequestError  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402

from vllm_loraserve.coordinator.client import CoordinatorClient  # noqa: E402
from vllm_loraserve.coordinator.messages import (  # noqa: E402
    Capacity,
    GetTable,
    Register,
    RemoveAdapter,
    Residency,
    RoutingTable,
)
from vllm_loraserve.engine.engine_config import WORKER_EXTENSION  # noqa: E402


async def test_registers_with_its_capacity(joined):
    coordinator, *_ = joined
    hello = coordinator.controller.members.get("one").hello
    assert hello.base_model == "toy"
    assert (hello.capacity.slots, hello.capacity.rank_rows, hello.capacity.max_rank) == (4, 256, 256)
    assert hello.capacity.max_model_len == 1024
    assert hello.capacity.kv_tokens == 1600
    assert hello.modules == {}, "this worker can't be asked"
    assert (hello.capacity.max_batched_tokens, hello.capacity.max_seqs) == (512, 32)


async def test_prefetches_reports_and_releases(joined):
    coordinator, _, engine, models = joined
    coordinator.add(record("a"))
    await until(lambda: "a" in coordinator.controller.members.get("one").resident)
    assert models.lora_requests["a"].lora_path == "/adapters/a"
    assert [r.lora_name for r in engine.held.values()] == ["a"]
    assert not coordinator.controller.commands.pending()
    async with CoordinatorClient(coordinator.endpoint) as client:
        await client.request(RemoveAdapter(name="a", drain_s=5.0))
    assert not models.lora_requests
    assert not engine.held, "vLLM's own unload would have left it in the engine"


async def test_an_unknown_name_is_resolved_from_the_registry_and_reported(joined):
    coordinator, _, engine, models = joined
    engine.broken.add("b")
    coordinator.add(record("b"))
    await until(lambda: coordinator.controller.problems())
    assert "no adapter_config.json there" in coordinator.controller.problems()[0]
    engine.broken.clear()
    request = await models.resolve_lora("b")
    assert (request.lora_name, request.lora_path) == ("b", "/adapters/a")
    await until(lambda: "b" in coordinator.controller.members.get("one").resident)
    assert await models.resolve_lora("nobody") is None


async def test_a_drain_is_told_at_once_and_reports_go_on(joined):
    coordinator, agent, *_ = joined
    agent.config = msgspec.structs.replace(agent.config, heartbeat_s=1000.0)
    await asyncio.sleep(0.3)  # into the long pause
    async with asyncio.timeout(PATIENCE_S):
        await agent.drain()
    member = coordinator.controller.members.get("one")
    assert member.draining
    agent.config = msgspec.structs.replace(agent.config, heartbeat_s=0.1)
    seen = member.seen
    await agent.drain()
    await until(lambda: member.seen > seen)


async def test_a_drain_does_not_wait_for_reports_of_an_engine_that_is_dead(joined):
    coordinator, agent, engine, _ = joined
    engine.errored = True
    await until(lambda: len(coordinator.controller.members) == 0)
    async with asyncio.timeout(PATIENCE_S):
        await agent.drain()


async def test_a_drain_does_not_wait_for_a_coordinator_that_is_away(joined):
    coordinator, agent, *_ = joined
    await coordinator.stop()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await agent.drain()
    finally:
        await coordinator.start()
        await until(lambda: len(coordinator.controller.members) == 1)


async def test_a_quiet_engine_is_left_to_sleep(joined, monkeypatch):
    from vllm_loraserve.engine import agent as module

    for name, seconds in (("RESIDENCY_S", 0.02), ("SETTLE_S", 0.1), ("QUIET_RESIDENCY_S", 60.0)):
        monkeypatch.setattr(module, name, seconds)
    _, agent, engine, _ = joined
    asked = 0

    async def list_loras():
        nonlocal asked
        asked += 1
        return set(engine.held)

    monkeypatch.setattr(engine, "list_loras", list_loras)
    agent._look.set()
    await until(lambda: asked > 1)
    async with asyncio.timeout(PATIENCE_S):
        quiet = 0
        while quiet != asked:
            quiet = asked
            await asyncio.sleep(0.3)
    await asyncio.sleep(0.3)
    assert asked == quiet, "nothing has happened: nothing is asked"
    engine.gate.set()
    async for _ in engine.generate("p", SamplingParams(), "r1", lora_request=None):
        pass
    await until(lambda: asked > quiet + 1)


async def test_workers_hear_who_holds_an_adapter_before_they_load_it(coordinator):
    engine = FakeEngine()
    engine.arena_rows = 100
    joining = membership(coordinator, engine, extension=WORKER_EXTENSION, transfer_key_file="k")
    async with joining as (agent, models):
        controller = coordinator.controller
        await until(lambda: controller.members.get("one").hello.transfer == "127.0.0.1:7001,127.0.0.1:7002")
        capacity = controller.members.get("one").hello.capacity
        assert (capacity.rank_rows, capacity.max_rank) == (100, 100), "what the workers' arenas really hold"
        assert controller.modules == {"lm_head": (), "o_proj": ((64, 64),), "q_proj": ((64, 64),)}, "of all workers"
        other = Register(
            instance="two",
            incarnation="x",
            url="http://127.0.0.1:9",
            base_model="toy",
            capacity=Capacity(slots=4, rank_rows=1),
            transfer="127.0.0.1:7003",
            resident=tuple(Residency(name=n, sha256="one", generation=1) for n in "ab"),
        )
        controller.register(other, time.monotonic() + 1000)
        held_by_two = [("two", "127.0.0.1:7003")]
        coordinator.add(record("a"))
        await until(lambda: "a" in models.lora_requests)
        assert ("a", "/adapters/a", "one", held_by_two) in engine.located, "by the command"
        await until(lambda: "a" in controller.members.get("one").resident)
        generation = 10 + models.lora_requests["a"].lora_int_id + 1  # of both ranks
        assert [(x.instance, x.generation) for x in controller.locations(record("a"), besides="two")] == [
            ("one", generation)
        ]
        controller.registry.add(record("b", source="/adapters/b"))
        await models.resolve_lora("b")
        assert ("b", "/adapters/b", "one", held_by_two) in engine.located, "by the resolver"
        await agent.locator.locate_all(await agent.resolver.refresh())
        assert [sorted(part) for part in engine.retained] == [["a", "b"], ["one", "two"]], "whatever else is gone"


@pytest.mark.parametrize("by", ["command", "resolver"])
async def test_workers_hear_what_was_registered_before_they_load_it_also_without_transfers(coordinator, by):
    engine = FakeEngine()
    async with membership(coordinator, engine, extension=WORKER_EXTENSION) as (_, models):
        if by == "command":
            coordinator.add(record("a"))
            await until(lambda: "a" in models.lora_requests)
        else:
            coordinator.controller.registry.add(record("a"))
            await models.resolve_lora("a")
        assert engine.located == [("a", "/adapters/a", "one", [])]
        assert engine.told_before_load == ["a"]


async def test_a_busy_engine_keeps_a_restarted_coordinator_waiting_only_for_what_is_not_known_yet(
    coordinator, monkeypatch
):
    monkeypatch.setattr("vllm_loraserve.engine.agent.ANSWER_TIMEOUT_S", 0.2)
    engine = FakeEngine()
    answers, rpc = asyncio.Event(), engine.collective_rpc

    async def collective_rpc(method, args=()):
        await answers.wait()
        return await rpc(method, args)

    monkeypatch.setattr(engine, "collective_rpc", collective_rpc)
    async with membership(coordinator, engine, extension=WORKER_EXTENSION):
        assert not coordinator.controller.modules, "it joined without"
        answers.set()
        await until(lambda: coordinator.controller.modules)
        coordinator.add(record("a"))
        await until(lambda: "a" in coordinator.controller.members.get("one").resident)
        # The engine is in a step that does not end, and the coordinator is a new one.
        answers.clear()
        monkeypatch.setattr("vllm_loraserve.engine.agent.ANSWER_TIMEOUT_S", 1000.0)
        await coordinator.stop()
        await coordinator.start()
        await until(lambda: len(coordinator.controller.members) == 1)
        hello = coordinator.controller.members.get("one").hello
        assert [copy.name for copy in hello.resident] == ["a"]
        assert hello.modules
        answers.set()


async def test_survives_the_coordinators_absence_and_is_back_with_everything(joined, monkeypatch):
    monkeypatch.setattr("vllm_loraserve.engine.resolver.AWAY_S", 1000.0)
    coordinator, agent, _, models = joined
    coordinator.add(record("a"))
    coordinator.add(record("b", source="/adapters/b"))
    await until(lambda: len(coordinator.controller.members.get("one").resident) == 2)
    await agent.resolver.refresh()
    await agent.orders.release(record("b", source="/adapters/b"))
    agent.resolver.learn(record("b", source="/adapters/b"))
    await coordinator.stop()
    request = await models.resolve_lora("b")
    assert request.lora_path == "/adapters/b", "the last known registry serves"

    async def ask(name):
        raise AssertionError(f"a timeout for every name, and now for '{name}'")

    monkeypatch.setattr(agent.resolver, "_ask", ask)
    with pytest.raises(RetryableRequestError):
        await models.resolve_lora("nobody")
    await until(lambda: not agent._reachable)
    await coordinator.start()
    await until(lambda: len(coordinator.controller.members) == 1 and coordinator.controller.settled)
    await until(lambda: set(coordinator.controller.members.get("one").resident) == {"a", "b"})
    async with CoordinatorClient(coordinator.endpoint) as client:
        table = await client.ask(GetTable(), RoutingTable)
    assert [r.adapter.name for r in table.adapters if r.routes] == ["a", "b"]


async def test_an_instance_whose_engine_is_dead_leaves_and_stays_away(joined):
    coordinator, agent, engine, _ = joined
    engine.errored = True
    await until(lambda: len(coordinator.controller.members) == 0)
    await until(lambda: not agent._tasks)


async def test_an_expired_instance_registers_again(joined):
    coordinator, *_ = joined
    coordinator.controller.members.expire(time.monotonic() + 10_000)
    assert len(coordinator.controller.members) == 0
    await until(lambda: len(coordinator.controller.members) == 1)


async def test_demand_and_load_are_reported(joined):
    coordinator, agent, engine, models = joined
    coordinator.add(record("a"))
    await until(lambda: "a" in models.lora_requests)
    agent.load.record(SimpleNamespace(num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.25), None)
    stream = engine.generate("p", SamplingParams(), "r1", lora_request=models.lora_requests["a"])
    await anext(stream)

    def member():
        return coordinator.controller.members.get("one")

    await until(lambda: member().demand.get("a") is not None and member().demand["a"].running == 1)
    assert (member().load.running, member().load.waiting, member().load.kv_usage) == (3, 2, 0.25)
    assert member().demand["a"].tokens_per_s > 0
    await stream.aclose()
    assert engine.closed == 1
    await until(lambda: member().demand["a"].running == 0 and member().load.running == 0)
