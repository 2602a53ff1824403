"""Agent, meter and resolver against a real coordinator and an engine client that only keeps books."""

import asyncio
import shutil
import tempfile
import time
from types import SimpleNamespace

import msgspec
import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from collections import defaultdict  # noqa: E402

from fake_engine import FakeEngine, record, vllm_config  # noqa: E402
from vllm.exceptions import RetryableRequestError  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.lora.resolver import LoRAResolverRegistry  # noqa: E402
from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: E402
from vllm.utils.counter import AtomicCounter  # noqa: E402

from vllm_loraserve.cluster.placement import make_policy  # noqa: E402
from vllm_loraserve.config import LoRAServeConfig  # noqa: E402
from vllm_loraserve.coordinator.client import CoordinatorClient  # noqa: E402
from vllm_loraserve.coordinator.control import Controller, ControlOptions  # noqa: E402
from vllm_loraserve.coordinator.messages import (  # noqa: E402
    Capacity,
    GetTable,
    Register,
    RemoveAdapter,
    Residency,
    RoutingTable,
)
from vllm_loraserve.coordinator.registry import Registry  # noqa: E402
from vllm_loraserve.coordinator.server import CoordinatorServer, ServerOptions  # noqa: E402
from vllm_loraserve.engine.agent import RESOLVER_NAME, start_agent  # noqa: E402
from vllm_loraserve.engine.engine_config import WORKER_EXTENSION  # noqa: E402

PATIENCE_S = 120.0
"""For what is certain to come, on any machine: only a defect uses it up."""


class FakeModels:
    """The parts of OpenAIServingModels that the agent touches, and its resolve_lora in short."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.base_model_paths = [SimpleNamespace(name="toy")]
        self.lora_requests: dict[str, LoRARequest] = {}
        self.lora_id_counter = AtomicCounter(0)
        self.lora_resolver_lock = defaultdict(asyncio.Lock)
        self.lora_resolvers = []

    async def resolve_lora(self, name):
        async with self.lora_resolver_lock[name]:
            if name in self.lora_requests:
                return self.lora_requests[name]
            for resolver in self.lora_resolvers:
                if (request := await resolver.resolve_lora("toy", name)) is not None:
                    request.lora_int_id = self.lora_id_counter.inc(1)
                    await self.engine.add_lora(request)
                    self.lora_requests[name] = request
                    return request
        return None


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.02)


async def begun(engine, request):
    """A stream of `request`'s adapter whose first token has come."""
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    stream = engine.generate("p", params, "r1", lora_request=request)
    await anext(stream)
    return stream


async def finish(engine, stream) -> None:
    engine.gate.set()
    assert [len(o.outputs[0].token_ids) async for o in stream] == [1, 1]


@pytest.fixture
def coordinator(tmp_path):
    """Starts (and restarts) a coordinator at one endpoint on one database."""
    directory = tempfile.mkdtemp(prefix="lrs")  # a socket's path must be short
    endpoint = f"ipc://{directory}/c"

    class Handle:
        server = None
        controller = None

        async def start(self):
            self.registry = Registry(tmp_path / "r.sqlite")
            # Nobody is given up because the machine is busy; what happens then, a test says.
            options = ControlOptions(expiry_s=1000.0, settle_s=1000.0)
            self.controller = Controller(self.registry, make_policy("rank-weighted"), options, time.monotonic())
            self.server = CoordinatorServer(self.controller, ServerOptions(bind=endpoint))
            await self.server.start()
            return self

        async def stop(self):
            await self.server.stop()
            self.registry.close()

        def add(self, r):
            return self.controller.add(r, time.monotonic())[0]

    handle = Handle()
    handle.endpoint = endpoint
    yield handle
    shutil.rmtree(directory)


@pytest.fixture
async def joined(coordinator, monkeypatch):
    """(coordinator, agent, engine, models) of a running membership."""
    monkeypatch.setattr("vllm_loraserve.engine.agent.LINGER_S", 0.2)
    LoRAResolverRegistry.resolvers.pop(RESOLVER_NAME, None)
    await coordinator.start()
    engine = FakeEngine()
    models = FakeModels(engine)
    config = LoRAServeConfig(coordinator=coordinator.endpoint, instance="one", heartbeat_s=0.1)
    agent = await start_agent(engine, vllm_config(), config, "http://127.0.0.1:8000", models)
    await until(lambda: len(coordinator.controller.members) == 1)
    yield coordinator, agent, engine, models
    await agent.stop()
    assert len(coordinator.controller.members) == 0, "left in good order"
    assert engine.generate.__func__ is FakeEngine.generate
    assert engine.logger_manager.stat_loggers == []
    await coordinator.stop()
    LoRAResolverRegistry.resolvers.pop(RESOLVER_NAME, None)


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


async def test_release_waits_for_running_requests(joined):
    coordinator, agent, engine, models = joined
    coordinator.add(record("a"))
    await until(lambda: "a" in models.lora_requests)
    stream = await begun(engine, models.lora_requests["a"])
    release = asyncio.create_task(agent.release(coordinator.registry.get("a")))
    await asyncio.sleep(0.4)
    assert "a" not in models.lora_requests, "no new request gets it"
    assert engine.held, "but the running one keeps it"
    await finish(engine, stream)
    await release
    assert not engine.held


async def test_a_superseded_release_is_answered_while_requests_run(joined):
    coordinator, agent, engine, models = joined
    coordinator.add(record("a"))
    await until(lambda: "a" in models.lora_requests)
    stream = await begun(engine, models.lora_requests["a"])
    await agent.release(coordinator.registry.get("a"), superseded=True)
    assert "a" not in models.lora_requests
    assert engine.held
    await finish(engine, stream)
    await until(lambda: not engine.held)


async def test_new_content_under_a_name_gets_a_new_id_and_another_path_spelling(joined):
    _, agent, engine, models = joined
    await agent.prefetch(record("a", "one"))
    first = models.lora_requests["a"]
    await agent.prefetch(record("a", "one"))
    assert models.lora_requests["a"] is first
    await agent.prefetch(record("a", "two"))
    second = models.lora_requests["a"]
    assert second.lora_int_id != first.lora_int_id
    assert second.lora_path == "/adapters/a/.", "vLLM's prefix cache is keyed by name and path"
    await until(lambda: list(engine.held) == [second.lora_int_id])
    await agent.prefetch(record("a", "one"))
    assert models.lora_requests["a"].lora_path == first.lora_path, "its old blocks are right again"


async def registered(joined, content="one"):
    """Registers content as 'a', in place of other; returns the LoRARequest that has the name once it is this one's."""
    coordinator, agent, _, models = joined
    coordinator.controller.add(record("a", content), time.monotonic(), replace=True)
    await until(lambda: "a" in models.lora_requests and agent.resolver.digest_of(models.lora_requests["a"]) == content)
    return models.lora_requests["a"]


async def test_content_that_takes_a_name_over_is_loaded_while_the_old_one_serves(joined):
    coordinator, _, engine, models = joined
    old = await registered(joined)
    stream = await begun(engine, old)
    engine.load_s = 0.5
    taking_over = asyncio.create_task(registered(joined, "two"))
    while not taking_over.done():
        assert "a" in models.lora_requests
        await asyncio.sleep(0.01)
    new = await taking_over
    assert new.lora_int_id in engine.held, "not before it was there"
    assert old.lora_int_id in engine.held, "a request runs with the old weights"
    await until(lambda: coordinator.controller.outdated(coordinator.registry.get("a")) == [])
    await finish(engine, stream)
    await until(lambda: set(engine.held) == {new.lora_int_id})


async def test_a_request_that_took_the_old_content_a_moment_ago_finds_it(joined, monkeypatch):
    """It is counted only when the engine client begins with it, after its prompt was read."""
    monkeypatch.setattr("vllm_loraserve.engine.agent.LINGER_S", 4.0)
    _, _, engine, _ = joined
    old = await registered(joined)
    await registered(joined, "two")
    await asyncio.sleep(0.2)
    stream = await begun(engine, old)
    await asyncio.sleep(4.5)
    assert old.lora_int_id in engine.held
    await finish(engine, stream)
    await until(lambda: old.lora_int_id not in engine.held)


async def test_the_last_of_several_replacements_wins(joined):
    coordinator, agent, engine, models = joined
    await registered(joined)
    engine.load_s = 0.4
    coordinator.controller.add(record("a", "two"), time.monotonic(), replace=True)
    await until(lambda: agent._turns["a"].locked())
    last = await registered(joined, "three")
    await until(lambda: list(engine.held) == [last.lora_int_id])
    assert models.lora_requests["a"] is last
    assert coordinator.controller.problems() == []


async def test_a_removal_in_the_middle_of_a_replacement_ends_both(joined):
    coordinator, agent, engine, models = joined
    old = await registered(joined)
    engine.load_s = 1000.0
    coordinator.controller.add(record("a", "two"), time.monotonic(), replace=True)
    await until(lambda: agent._turns["a"].locked())
    removed = coordinator.controller.remove("a", 0.0, time.monotonic())
    while not removed.is_set():
        assert models.lora_requests.get("a") in (None, old)
        await asyncio.sleep(0.01)
    assert "a" not in models.lora_requests
    await until(lambda: not agent._turns["a"].locked() and not engine.held)
    assert "a" not in models.lora_requests


@pytest.mark.parametrize("when", ["at once", "aside"])
async def test_a_replacement_that_can_not_be_loaded_is_not_hidden_by_the_old_content(joined, when):
    coordinator, agent, engine, models = joined
    await registered(joined)
    if when == "at once":
        engine.broken.add("a")
    else:
        engine.load_s = 1000.0
        agent._patience_s = 0.2
    fresh, _ = coordinator.controller.add(record("a", "two"), time.monotonic(), replace=True)
    await until(lambda: coordinator.controller.outdated(fresh) == [])
    assert "'one' can't load it: " in coordinator.controller.replaced(fresh)
    assert "a" not in models.lora_requests
    await until(lambda: not engine.held)


async def test_a_prefetch_whose_adapter_was_removed_holds_up_no_other(joined):
    _, agent, engine, models = joined
    engine.load_s = 1000.0
    first = asyncio.create_task(agent.prefetch(record("a")))
    await until(lambda: "a" in models.lora_requests)
    await agent.release(record("a"))
    engine.load_s = 0.0
    async with asyncio.timeout(agent._patience_s / 2):
        await agent.prefetch(record("a"))
        await first


async def test_a_prefetch_into_an_engine_that_loads_aside_ends_when_it_is_there(joined, monkeypatch):
    _, agent, engine, _ = joined
    engine.load_s = 0.3
    started = time.monotonic()
    await agent.prefetch(record("a"))
    assert time.monotonic() - started >= 0.3
    assert engine.held
    assert agent._patience_s > agent.config.load_timeout_s, "the engine's own verdict comes first"
    monkeypatch.setattr(agent, "_patience_s", 0.2)
    engine.load_s = 1000.0
    with pytest.raises(TimeoutError, match="has not loaded 'b'"):
        await agent.prefetch(record("b"))


async def test_residency_and_failures_are_asked_from_every_worker(joined):
    _, agent, engine, _ = joined
    agent._mixed_in = True
    await agent.prefetch(record("a"))
    await agent.prefetch(record("b", source="/adapters/b"))
    assert {(r.name, r.tier) for r in await agent._residency()} == {("a", "host"), ("b", "host")}, "in slots of all?"
    engine.load_s, engine.errors = 30.0, {3: "rank 512 is too large"}
    with pytest.raises(RuntimeError, match="rank 512 is too large"):
        await agent.prefetch(record("c", source="/adapters/c"))


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
    LoRAResolverRegistry.resolvers.pop(RESOLVER_NAME, None)
    await coordinator.start()
    engine = FakeEngine()
    engine.arena_rows = 100
    models = FakeModels(engine)
    config = LoRAServeConfig(coordinator=coordinator.endpoint, instance="one", heartbeat_s=0.1, transfer_key_file="k")
    agent = await start_agent(engine, vllm_config(WORKER_EXTENSION), config, "http://127.0.0.1:8000", models)
    await until(lambda: len(coordinator.controller.members) == 1)
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
    await agent._locate_all(await agent.resolver.refresh())
    assert [sorted(part) for part in engine.retained] == [["a", "b"], ["one", "two"]], "whatever else is gone"
    await agent.stop()
    await coordinator.stop()
    LoRAResolverRegistry.resolvers.pop(RESOLVER_NAME, None)


@pytest.mark.parametrize("by", ["command", "resolver"])
async def test_workers_hear_what_was_registered_before_they_load_it_also_without_transfers(coordinator, by):
    LoRAResolverRegistry.resolvers.pop(RESOLVER_NAME, None)
    await coordinator.start()
    engine = FakeEngine()
    models = FakeModels(engine)
    config = LoRAServeConfig(coordinator=coordinator.endpoint, instance="one", heartbeat_s=0.1)
    agent = await start_agent(engine, vllm_config(WORKER_EXTENSION), config, "http://127.0.0.1:8000", models)
    await until(lambda: len(coordinator.controller.members) == 1)
    if by == "command":
        coordinator.add(record("a"))
        await until(lambda: "a" in models.lora_requests)
    else:
        coordinator.controller.registry.add(record("a"))
        await models.resolve_lora("a")
    assert engine.located == [("a", "/adapters/a", "one", [])]
    assert engine.told_before_load == ["a"]
    await agent.stop()
    await coordinator.stop()
    LoRAResolverRegistry.resolvers.pop(RESOLVER_NAME, None)


async def test_a_busy_engine_keeps_a_restarted_coordinator_waiting_only_for_what_is_not_known_yet(
    coordinator, monkeypatch
):
    LoRAResolverRegistry.resolvers.pop(RESOLVER_NAME, None)
    monkeypatch.setattr("vllm_loraserve.engine.agent.ANSWER_TIMEOUT_S", 0.2)
    await coordinator.start()
    engine = FakeEngine()
    models = FakeModels(engine)
    answers, rpc = asyncio.Event(), engine.collective_rpc

    async def collective_rpc(method, args=()):
        await answers.wait()
        return await rpc(method, args)

    monkeypatch.setattr(engine, "collective_rpc", collective_rpc)
    config = LoRAServeConfig(coordinator=coordinator.endpoint, instance="one", heartbeat_s=0.1)
    agent = await start_agent(engine, vllm_config(WORKER_EXTENSION), config, "http://127.0.0.1:8000", models)
    await until(lambda: len(coordinator.controller.members) == 1)
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
    await agent.stop()
    await coordinator.stop()
    LoRAResolverRegistry.resolvers.pop(RESOLVER_NAME, None)


async def test_what_the_operator_loaded_is_left_alone(joined):
    coordinator, agent, engine, models = joined
    own = LoRARequest("mine", models.lora_id_counter.inc(1), "/own")
    await engine.add_lora(own)
    models.lora_requests["mine"] = own
    await agent.release(record("mine"))
    with pytest.raises(ValueError, match="outside the registry"):
        await agent.prefetch(record("mine"))
    assert models.lora_requests == {"mine": own}
    await asyncio.sleep(0.3)
    assert not coordinator.controller.members.get("one").resident


async def test_survives_the_coordinators_absence_and_is_back_with_everything(joined, monkeypatch):
    monkeypatch.setattr("vllm_loraserve.engine.resolver.AWAY_S", 1000.0)
    coordinator, agent, _, models = joined
    coordinator.add(record("a"))
    coordinator.add(record("b", source="/adapters/b"))
    await until(lambda: len(coordinator.controller.members.get("one").resident) == 2)
    await agent.resolver.refresh()
    await agent.release(record("b", source="/adapters/b"))
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
