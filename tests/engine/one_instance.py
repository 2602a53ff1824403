"""One instance's agent, whose engine client only keeps books, in the cluster of a real coordinator."""

import asyncio
import time
from collections import defaultdict
from contextlib import asynccontextmanager
from types import SimpleNamespace

from fake_engine import vllm_config
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.counter import AtomicCounter

from vllm_loraserve.cluster.placement import make_policy
from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.coordinator.control import Controller, ControlOptions
from vllm_loraserve.coordinator.registry import Registry
from vllm_loraserve.coordinator.server import CoordinatorServer, ServerOptions
from vllm_loraserve.engine.agent import RESOLVER_NAME, start_agent

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


class Coordinator:
    """Starts (and restarts) a coordinator at one endpoint on one database."""

    def __init__(self, database, endpoint) -> None:
        self.database, self.endpoint = database, endpoint
        self.server = self.controller = None

    async def start(self):
        self.registry = Registry(self.database)
        # Nobody is given up because the machine is busy; what happens then, a test says.
        options = ControlOptions(expiry_s=1000.0, settle_s=1000.0)
        self.controller = Controller(self.registry, make_policy("rank-weighted"), options, time.monotonic())
        self.server = CoordinatorServer(self.controller, ServerOptions(bind=self.endpoint))
        await self.server.start()
        return self

    async def stop(self):
        await self.server.stop()
        self.registry.close()

    def add(self, r):
        return self.controller.add(r, time.monotonic())[0]


@asynccontextmanager
async def membership(coordinator, engine, *, extension="", **options):
    """(agent, models) of instance 'one', which joins as its coordinator starts, and leaves before that ends."""
    LoRAResolverRegistry.resolvers.pop(RESOLVER_NAME, None)
    await coordinator.start()
    models = FakeModels(engine)
    config = LoRAServeConfig(coordinator=coordinator.endpoint, instance="one", heartbeat_s=0.1, **options)
    agent = await start_agent(engine, vllm_config(extension), config, "http://127.0.0.1:8000", models)
    await until(lambda: len(coordinator.controller.members) == 1)
    try:
        yield agent, models
    finally:
        await agent.stop()
        await coordinator.stop()
        LoRAResolverRegistry.resolvers.pop(RESOLVER_NAME, None)
