"""Agent, meter and resolver against a real coordinator and an engine client that only keeps books."""

import asyncio
import shutil
import tempfile
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from collections import defaultdict  # noqa: E402

from vllm.exceptions import RetryableRequestError  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.lora.resolver import LoRAResolverRegistry  # noqa: E402
from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: E402
from vllm.utils.counter import AtomicCounter  # noqa: E402

from vllm_loraserve.adapters.layout import ModuleShape, build_layout  # noqa: E402
from vllm_loraserve.cluster.placement import make_policy  # noqa: E402
from vllm_loraserve.config import ConfigError, LoRAServeConfig, parse_config  # noqa: E402
from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError, CoordinatorUnavailable  # noqa: E402
from vllm_loraserve.coordinator.control import Controller, ControlOptions  # noqa: E402
from vllm_loraserve.coordinator.messages import (  # noqa: E402
    AdapterRecord,
    Capacity,
    GetTable,
    Register,
    RemoveAdapter,
    Residency,
    RoutingTable,
)
from vllm_loraserve.coordinator.registry import Registry  # noqa: E402
from vllm_loraserve.coordinator.server import CoordinatorServer, ServerOptions  # noqa: E402
from vllm_loraserve.engine.agent import RESOLVER_NAME, instance_name, start_agent  # noqa: E402
from vllm_loraserve.engine.capacity import capacity_of, module_shapes  # noqa: E402
from vllm_loraserve.engine.engine_config import WORKER_EXTENSION, check_layout, prepare_engine_args  # noqa: E402
from vllm_loraserve.engine.meter import LoadLogger, Meter  # noqa: E402
from vllm_loraserve.engine.resolver import LoRAServeResolver  # noqa: E402

PATIENCE_S = 120.0
"""For what is certain to come, on any machine: only a defect uses it up."""
LLAMA = SimpleNamespace(
    model_type="llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
    num_hidden_layers=2,
)  # fmt: skip


def vllm_config(extension=""):
    return SimpleNamespace(
        lora_config=SimpleNamespace(max_loras=4, max_lora_rank=64, max_cpu_loras=8, lora_dtype=None),
        cache_config=SimpleNamespace(num_gpu_blocks=100, block_size=16),
        model_config=SimpleNamespace(hf_text_config=LLAMA, dtype="torch.bfloat16", max_model_len=1024),
        # Engines of which the agent asks workers by collective_rpc; for those with desks see test_worker_desk.py.
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=2, worker_extension_cls=extension),
        device_config=SimpleNamespace(device_type="cpu"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512, max_num_seqs=32),
    )


class FakeEngine:
    """An engine client that holds LoRARequests by id and generates tokens when told to."""

    def __init__(self) -> None:
        self.held: dict[int, LoRARequest] = {}
        self.broken: set[str] = set()
        self.logger_manager = SimpleNamespace(stat_loggers=[])
        self.gate = asyncio.Event()
        self.load_s = 0.0
        self.located: list[tuple] = []
        self.told_before_load: list[str] = []
        self.errors: dict[int, str] = {}
        self.closed = 0
        self.errored = False
        self.dead_error = RuntimeError("EngineCore encountered an issue.")

    async def add_lora(self, request):
        if request.lora_name in self.broken:
            raise RuntimeError("Call to add_lora failed:\nno adapter_config.json there")
        self.told_before_load += [row[0] for row in self.located if row[0] == request.lora_name]
        if not self.load_s:
            self.held[request.lora_int_id] = request
        else:
            asyncio.get_running_loop().call_later(self.load_s, self.held.__setitem__, request.lora_int_id, request)
        return True

    async def remove_lora(self, lora_id):
        return self.held.pop(lora_id, None) is not None

    async def list_loras(self):
        return set(self.held)

    async def collective_rpc(self, method, args=()):
        if method == "loraserve_transfer_endpoint":
            return ["127.0.0.1:7001", "127.0.0.1:7002"]
        if method == "loraserve_shapes":
            return [{"q_proj": [[64, 64]], "lm_head": []}, {"q_proj": [[64, 64]], "o_proj": [[64, 64]]}]
        if method == "loraserve_residency":
            generations = {str(i): 10 + i for i in self.held}
            return [
                ([i for i in self.held if i == 1], list(self.held), self.errors, generations),
                ([], list(self.held), {}, dict.fromkeys(generations, 1)),
            ]
        if method == "loraserve_retain":
            self.retained = args
            return [None, None]
        assert method == "loraserve_locate"
        self.located += args[0]
        return [None, None]

    async def encode(self, prompt, pooling_params, request_id, lora_request=None):
        self.encoding = True
        try:
            yield SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=SimpleNamespace(data=[0.5]))
        finally:
            self.encoding = False

    async def generate(self, prompt, sampling_params, request_id, *, lora_request=None):
        try:
            for i in range(1, 4):
                n = 1 if sampling_params.output_kind is RequestOutputKind.DELTA else i
                yield SimpleNamespace(prompt_token_ids=[1] * 5, outputs=[SimpleNamespace(token_ids=[7] * n)])
                if i == 1:
                    await self.gate.wait()
        finally:
            self.closed += 1


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


def record(name: str, sha256: str = "one", source: str = "/adapters/a") -> AdapterRecord:
    return AdapterRecord(
        name=name, source=source, rank=8, target_modules=("q_proj",), size_bytes=1000, sha256=sha256, base_model="toy",
        added_at=1.0,
    )  # fmt: skip


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.02)


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
async def joined(coordinator):
    """(coordinator, agent, engine, models) of a running membership."""
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


async def test_release_waits_for_running_requests(joined):
    coordinator, agent, engine, models = joined
    coordinator.add(record("a"))
    await until(lambda: "a" in models.lora_requests)
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    stream = engine.generate("p", params, "r1", lora_request=models.lora_requests["a"])
    await anext(stream)
    release = asyncio.create_task(agent.release(coordinator.registry.get("a")))
    await asyncio.sleep(0.4)
    assert "a" not in models.lora_requests, "no new request gets it"
    assert engine.held, "but the running one keeps it"
    engine.gate.set()
    assert [len(o.outputs[0].token_ids) async for o in stream] == [1, 1]
    await release
    assert not engine.held


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
    models = FakeModels(engine)
    config = LoRAServeConfig(coordinator=coordinator.endpoint, instance="one", heartbeat_s=0.1, transfer_key_file="k")
    agent = await start_agent(engine, vllm_config(WORKER_EXTENSION), config, "http://127.0.0.1:8000", models)
    await until(lambda: len(coordinator.controller.members) == 1)
    controller = coordinator.controller
    await until(lambda: controller.members.get("one").hello.transfer == "127.0.0.1:7001,127.0.0.1:7002")
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


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
async def test_meter_counts_prompt_and_generated_tokens_once(kind):
    clock, engine = Clock(), FakeEngine()
    engine.gate.set()
    meter = Meter(clock)
    detach = meter.attach(engine)
    async for _ in engine.generate("p", SamplingParams(output_kind=kind), "r", lora_request=None):
        assert meter.running("") == 1
    clock.now = 4.0
    (base,) = meter.demand()
    assert (base.name, base.tokens_per_s, base.requests_per_s, base.running) == ("", 2.0, 0.25, 0)
    for clock.now in (10.0, 15.0):
        demand = meter.demand()
    assert demand == (), "out of the window"
    detach()
    assert engine.generate.__func__ is FakeEngine.generate


def test_without_statistics_everything_in_flight_is_running():
    meter = Meter()
    assert LoadLogger().load(meter, ()).running == 0


def test_sizes_are_reckoned_for_plain_dense_models_only():
    assert module_shapes(LLAMA)["down_proj"] == (128, 64)
    assert module_shapes(SimpleNamespace(model_type="mixtral")) == {}


def test_capacity_is_the_configured_memory_else_the_flags():
    shapes = module_shapes(LLAMA)
    row = 2 * 2 * sum(i + o for i, o in shapes.values())
    plain = capacity_of(vllm_config(), LoRAServeConfig(), shapes)
    assert (plain.rank_rows, plain.host_bytes, plain.host_adapters) == (4 * 64, 8 * 64 * row, 8)
    assert capacity_of(vllm_config(), LoRAServeConfig(arena_rank_rows=77), shapes).rank_rows == 77
    assert (plain.dtype, plain.kernels) == ("bfloat16", "rank-aware cpu")
    big = capacity_of(vllm_config(), LoRAServeConfig(arena_gib=1.0, host_gib=2.0), shapes)
    assert (big.rank_rows, big.host_bytes) == ((1 << 30) // row, 2 << 30)
    assert capacity_of(vllm_config(), LoRAServeConfig(max_rank=32), shapes).max_rank == 32
    nodes = vllm_config()
    nodes.parallel_config.nnodes = 2
    assert capacity_of(nodes, LoRAServeConfig(), shapes).max_rank == 64, "its part of the arena"


@pytest.mark.parametrize("tp", [1, 2])
def test_page_groups_are_those_of_the_layout(tp):
    """Rank rows of fused layers lie together; workers hold A (of column-parallel layers) or B each."""
    shapes = module_shapes(LLAMA)
    config = vllm_config()
    config.parallel_config.tensor_parallel_size = tp
    told = capacity_of(config, LoRAServeConfig(page_rows=16, host_gib=1.0, arena_gib=1.0), shapes)
    sizes = {name: (inner, outer // tp) for name, (inner, outer) in shapes.items()}
    sizes |= {name: (shapes[name][0] // tp, shapes[name][1]) for name in ("o_proj", "down_proj")}
    layers = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
    layers |= {"o": ("o_proj",), "down": ("down_proj",)}
    modules = [
        ModuleShape(f"{layer}.{i}", layer, sizes[parts[0]][0], tuple(sizes[p][1] for p in parts))
        for layer, parts in layers.items()
        for i in range(2)
    ]
    layout = build_layout(modules, model="m", dtype="bfloat16", page_rows=16, tp_rank=0, tp_size=tp)
    by_modules = {group.modules: group.row_bytes for group in told.page_groups}
    assert by_modules == {layers[group.name]: tp * layout.page_bytes(i) // 16 for i, group in enumerate(layout.groups)}
    assert (told.page_rows, told.host_bytes) == (16, tp << 30)
    assert told.rank_rows == (1 << 30) * 16 // layout.bytes_per_page_set
    config.lora_config.target_modules = ["q_proj", "down_proj"]
    some = capacity_of(config, LoRAServeConfig(), shapes).page_groups
    assert [group.modules for group in some] == [layers["qkv"], layers["down"]]


def test_a_transfer_key_that_can_not_be_used_is_refused_before_the_model_loads(tmp_path):
    key = tmp_path / "key"
    for prepare, says in ((lambda: None, "cannot be read"), (lambda: key.write_bytes(b"x" * 64), "chmod 600")):
        prepare()
        args = SimpleNamespace(additional_config={"loraserve": {"transfer_key_file": str(key)}}, max_cpu_loras=None)
        with pytest.raises(ConfigError, match=says) as refused:
            prepare_engine_args(args)
        assert "transfer_key_file=" in str(refused.value)


def test_curve_keys_that_can_not_be_used_are_refused_before_the_model_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASERVE_KEYS", str(tmp_path / "nothing"))
    alone = SimpleNamespace(additional_config={"loraserve": {}}, max_cpu_loras=1)
    assert prepare_engine_args(alone) is not None
    args = SimpleNamespace(additional_config={"loraserve": {"coordinator": "tcp://127.0.0.1:5700"}}, max_cpu_loras=1)
    with pytest.raises(ConfigError, match=r"LORASERVE_KEYS: .*nothing/member.key_secret' can't be read") as refused:
        prepare_engine_args(args)
    assert "\n" not in str(refused.value)


def test_a_server_that_can_not_be_one_instance_is_refused_before_the_model_loads():
    joined, alone = LoRAServeConfig(coordinator="tcp://127.0.0.1:1"), LoRAServeConfig()
    for engines, servers, says in (
        (2, 2, "start 2 servers without it"),
        (1, 3, "use --api-server-count 1"),
        (1, 1, ""),
    ):
        args = SimpleNamespace(data_parallel_size=engines, _api_process_count=servers)
        check_layout(args, alone)
        if not says:
            check_layout(args, joined)
            continue
        with pytest.raises(ConfigError, match=says) as refused:
            check_layout(args, joined)
        assert "\n" not in str(refused.value)


async def test_meter_counts_pooling_requests_too():
    class Pooling(FakeEngine):
        async def encode(self, prompt, pooling_params, request_id, lora_request=None):
            yield SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=SimpleNamespace(data=[0.5]))

    clock, engine = Clock(), Pooling()
    meter = Meter(clock)
    detach = meter.attach(engine)
    lora = SimpleNamespace(lora_name="one", lora_int_id=7)
    async for _ in engine.encode("p", None, "r", lora_request=lora):
        assert (meter.running("one"), meter.running_id(7)) == (1, 1)
    assert (meter.running("one"), meter.running_id(7)) == (0, 0)
    clock.now = 1.0
    (demand,) = meter.demand()
    assert (demand.name, demand.tokens) == ("one", 3)
    detach()
    assert engine.encode.__func__ is Pooling.encode


def test_two_sizes_for_the_arena_are_refused_before_the_model_loads():
    with pytest.raises(ConfigError, match="arena_gib=1 and arena_rank_rows=64 are both given"):
        parse_config({"arena_gib": 1.0, "arena_rank_rows": 64})
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="set transfer_advertise"):
            parse_config({"transfer_key_file": "/k", "transfer_host": host})
        parse_config({"transfer_key_file": "/k", "transfer_host": host, "transfer_advertise": "node-1"})


def test_ways_between_peers_are_those_that_there_are():
    assert parse_config({"transfer_ways": ["nixl", "tcp"]}).transfer_ways == ("nixl", "tcp")
    for ways, why in ((["pigeon"], "there is no way 'pigeon'; choose among cuda_ipc, memfd"), ([], "length >= 1")):
        with pytest.raises(ConfigError, match=f"transfer_ways=.*{why}"):
            parse_config({"transfer_ways": ways})


def test_instance_names():
    assert instance_name(LoRAServeConfig(instance="x"), "http://h:1") == "x"
    assert instance_name(LoRAServeConfig(), "http://127.0.0.1:8000") == "127.0.0.1-8000"
    assert instance_name(LoRAServeConfig(), "http://[::1]:8000") == "1-8000"
    assert instance_name(LoRAServeConfig(), "http://bücher.local:8000") == "b-cher.local-8000"
    assert instance_name(LoRAServeConfig(), "http://_h:80") == "h-80"
    for name in ("bücher", "n\u0661", "_h"):
        with pytest.raises(ConfigError, match="instance="):
            parse_config({"instance": name})


async def test_a_coordinator_in_trouble_does_not_unregister_what_is_known(monkeypatch):
    resolver = LoRAServeResolver(LoRAServeConfig(coordinator="tcp://127.0.0.1:1"))
    resolver.learn(record("a"))
    code = "internal"

    async def ask(name):
        raise CoordinatorError(code, f"no answer for {name}")

    monkeypatch.setattr(resolver, "_ask", ask)
    assert await resolver.lookup("a") == record("a")
    code = "not_found"
    assert await resolver.lookup("a") is None
    code = "internal"
    assert await resolver.lookup("a") is None


async def test_while_the_registry_can_not_be_asked_a_name_is_not_unknown_but_a_503(monkeypatch):
    monkeypatch.setattr("vllm_loraserve.engine.resolver.AWAY_S", 1000.0)
    resolver = LoRAServeResolver(LoRAServeConfig(coordinator="tcp://127.0.0.1:1"))

    async def away(*_, **__):
        raise CoordinatorUnavailable("no answer")

    monkeypatch.setattr(resolver._connection(), "ask", away)
    resolver.learn(record("a"))
    for _ in range(2):  # asked in vain, then not asked at all
        with pytest.raises(RetryableRequestError) as refused:
            await resolver.resolve_lora("toy", "b")
        assert refused.value.status_code == 503
    assert (await resolver.resolve_lora("toy", "a")).lora_name == "a"
    monkeypatch.setitem(LoRAResolverRegistry.resolvers, "another", object())
    assert await resolver.resolve_lora("toy", "b") is None, "another may know it"


def test_resolver_needs_a_coordinator():
    with pytest.raises(ValueError, match="set coordinator"):
        LoRAServeResolver(LoRAServeConfig())


async def test_meter_counts_pooling_requests_and_that_their_adapter_is_in_use():
    engine, meter = FakeEngine(), Meter()
    undo = meter.attach(engine)
    lora = LoRARequest("e", 7, "/adapters/e")
    stream = engine.encode(prompt="p", pooling_params=None, request_id="r", lora_request=lora)
    output = await anext(stream)
    assert output.outputs.data == [0.5]
    assert (meter.running_id(7), meter.running("e")) == (1, 1), "it must not be unloaded now"
    await stream.aclose()
    assert not engine.encoding
    assert meter.running_id(7) == 0
    async for _ in engine.encode("p", None, "r2", lora):
        pass
    (demand,) = meter.demand()
    assert (demand.name, demand.tokens, meter.requests()) == ("e", 6, 2)
    undo()
    assert engine.encode.__func__ is FakeEngine.encode
