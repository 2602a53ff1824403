"""The instance's side of the cluster: registers, reports, and carries out what the coordinator asks.

Runs as tasks in the vLLM API server's event loop, beside the requests; nothing in it ever waits in a request's way.
While the coordinator is away it tries again at every heartbeat and the instance goes on serving; when the coordinator
is new, or has given the instance up, it registers again with all that it holds.

    heartbeat (load, demand, residency, results) -> HeartbeatReply(commands)
    commands: prefetch and release (`orders.py`)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import urllib.parse
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from vllm.lora.resolver import LoRAResolverRegistry

from vllm_loraserve.adapters.shapes import merged
from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.messages import (
    Command,
    CommandResult,
    Heartbeat,
    HeartbeatReply,
    Leave,
    Register,
    Registered,
    Residency,
)
from vllm_loraserve.engine.capacity import capacity_of, module_shapes, with_arena
from vllm_loraserve.engine.engine_config import WORKER_EXTENSION
from vllm_loraserve.engine.holdings import Holdings
from vllm_loraserve.engine.locator import Locator
from vllm_loraserve.engine.meter import LoadLogger, Meter
from vllm_loraserve.engine.orders import Orders
from vllm_loraserve.engine.resolver import LoRAServeResolver
from vllm_loraserve.engine.worker_desk import Workers

logger = logging.getLogger("vllm.loraserve.agent")

RESOLVER_NAME = "loraserve"
ANSWER_TIMEOUT_S = 2.0
RESIDENCY_S = 3.0
"""Time between two questions to the engine about what it holds, while requests come and adapters change."""
QUIET_RESIDENCY_S = 30.0
"""The same when nothing has happened for SETTLE_S: a question by `collective_rpc` wakes an engine that would sleep."""
SETTLE_S = 10.0
REFRESH_S = 30.0
"""Time between two looks at the whole registry, kept for the coordinator's absence."""


async def start_agent(
    engine_client: Any, vllm_config: Any, config: LoRAServeConfig, url: str, serving_models: Any
) -> Agent:
    """Joins this instance to the cluster of `config.coordinator` and returns at once; `await agent.stop()` leaves.

    `url`: HTTP base URL under which routers reach the instance. `serving_models`: vLLM's OpenAIServingModels.
    """
    agent = Agent(engine_client, vllm_config, config, url, serving_models)
    agent.start()
    return agent


def instance_name(config: LoRAServeConfig, url: str) -> str:
    """The configured name, else host-port of the URL."""
    if config.instance is not None:
        return config.instance
    parts = urllib.parse.urlsplit(url)
    return re.sub(r"[^\w.\-]+", "-", f"{parts.hostname}-{parts.port or 80}", flags=re.ASCII).strip("-._")


class Agent:
    """One instance's membership."""

    def __init__(
        self, engine_client: Any, vllm_config: Any, config: LoRAServeConfig, url: str, serving_models: Any
    ) -> None:
        if config.coordinator is None:
            raise ValueError("loraserve-config: the agent needs a coordinator; set coordinator")
        self.engine = engine_client
        self.models = serving_models
        self.config = config
        self.meter = Meter()
        self.load = LoadLogger()
        self.resolver = self._find_resolver(config)
        self.name = instance_name(config, url)
        shapes = module_shapes(vllm_config.model_config.hf_text_config)
        self._hello = Register(
            instance=self.name,
            incarnation=uuid.uuid4().hex,
            url=url,
            base_model=serving_models.base_model_paths[0].name,
            capacity=capacity_of(vllm_config, config, shapes),
        )
        self._client = CoordinatorClient(config.coordinator, timeout_s=ANSWER_TIMEOUT_S)
        self._workers = Workers(engine_client, vllm_config)
        mixed_in = getattr(vllm_config.parallel_config, "worker_extension_cls", "") == WORKER_EXTENSION
        extended = self._workers.beside_the_engine or mixed_in
        self.holdings = Holdings(engine_client, self._workers, serving_models, self.resolver, extended=extended)
        self.locator = Locator(self._workers, serving_models, self.resolver, self.name) if extended else None
        if self.locator is not None:
            self.resolver.on_located = self.locator.locate
        self._epoch: int | None = None
        self._draining = False
        self._hurry, self._told = asyncio.Event(), asyncio.Event()
        self._reachable = True
        self._resident: tuple[Residency, ...] = ()
        self._asked: asyncio.Task[None] | None = None
        self._look = asyncio.Event()
        self.orders = Orders(
            engine_client,
            serving_models,
            self.resolver,
            self.meter,
            self.holdings,
            self.locator,
            config.load_timeout_s,
            self._look.set,
        )
        self._taken: dict[tuple[int, int], CommandResult | None] = {}
        self._outbox: dict[tuple[int, int], CommandResult] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._undo: list[Callable[[], None]] = []

    def _find_resolver(self, config: LoRAServeConfig) -> LoRAServeResolver:
        """The resolver that vLLM asks in this process; registers one where the plugin has not."""
        if RESOLVER_NAME not in LoRAResolverRegistry.get_supported_resolvers():
            LoRAResolverRegistry.register_resolver(RESOLVER_NAME, LoRAServeResolver(config))
        resolver = LoRAResolverRegistry.get_resolver(RESOLVER_NAME)
        if resolver not in self.models.lora_resolvers:
            self.models.lora_resolvers.append(resolver)
        assert isinstance(resolver, LoRAServeResolver)
        return resolver

    # ---- life ----

    def start(self) -> None:
        """Begins to measure, to register and to report."""
        self._undo.append(self.meter.attach(self.engine))
        manager = getattr(self.engine, "logger_manager", None)
        if manager is not None:
            manager.stat_loggers.append(self.load)
            self._undo.append(lambda: manager.stat_loggers.remove(self.load))
        for work in (self._beat(), self._watch_residency(), self._refresh_registry()):
            self._spawn(work)

    async def drain(self) -> None:
        """Has the coordinator give this instance nothing new; returns when it knows, or is away. Reports go on."""
        self._draining = True
        if self.engine.errored:
            return  # reports have ended, and it has left or is about to
        self._told.clear()
        self._hurry.set()
        await self._told.wait()

    async def stop(self) -> None:
        """Leaves the cluster in good order; the instance serves on, alone."""
        tasks = [*self._tasks, *self.orders.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._leave()
        for undo in self._undo:
            undo()
        await self._client.close()
        await self.resolver.close()
        self._workers.close()

    async def _leave(self) -> None:
        # Also where no registration was answered yet: it may have arrived all the same.
        with contextlib.suppress(CoordinatorError, CoordinatorUnavailable):
            leave = Leave(instance=self.name, incarnation=self._hello.incarnation)
            await self._client.request(leave, timeout_s=2.0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("A task of the agent ended", exc_info=error)

    # ---- reports ----

    async def _beat(self) -> None:
        while not self.engine.errored:
            started = time.monotonic()
            try:
                if self._epoch is None:
                    await self._register()
                if self._epoch is not None:
                    await self._report()
                if not self._reachable:
                    logger.info("The coordinator at %s answers again", self.config.coordinator)
                self._reachable = True
            except CoordinatorUnavailable as error:
                if self._reachable:
                    logger.warning("%s This instance serves on, and goes on trying.", error)
                self._reachable = False
                self._told.set()  # there is nobody to be told
            except Exception:
                logger.exception("A heartbeat failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.05, self.config.heartbeat_s - (time.monotonic() - started))):
                    await self._hurry.wait()
            self._hurry.clear()
        # Answering errors at once, it would look idle and attract requests until its membership expired.
        self._told.set()
        if not self._draining:
            logger.error("The engine is dead (%s): this instance leaves the cluster", self.engine.dead_error)
        for task in (self._tasks | self.orders.tasks) - {asyncio.current_task()}:
            task.cancel()
        await self._leave()

    async def _ask_engine(self) -> None:
        """What a coordinator is told when this instance joins and only the engine knows."""
        try:
            self._resident = await self.holdings.residency()
            hello = self._hello
            if self.holdings.extended:
                modules = merged(await self._workers.ask("loraserve_shapes"))
                rows = [rows for rows in await self._workers.ask("loraserve_arena_rows") if rows is not None]
                capacity = with_arena(hello.capacity, min(rows)) if rows else hello.capacity
                hello = msgspec.structs.replace(hello, modules=modules, capacity=capacity)
                if self.config.transfer_key_file is not None:
                    endpoints = await self._workers.ask("loraserve_transfer_endpoint")
                    hello = msgspec.structs.replace(hello, transfer=",".join(endpoints))
        except Exception:
            logger.warning("The engine did not say what it holds", exc_info=True)
            self._asked = None
            return
        if hello != self._hello:
            self._hello = hello
            self._epoch = None  # who has registered meanwhile does so again, with all of it

    async def _register(self) -> None:
        if self._asked is None:
            self._asked = self._spawn(self._ask_engine())
        # An engine in a long step (or compiling) answers late; the membership must not wait for it. Once it has
        # answered, what is known is kept fresh besides, and a coordinator that was restarted gets it at once.
        await asyncio.wait({self._asked}, timeout=ANSWER_TIMEOUT_S)
        told = self._hello
        try:
            hello = msgspec.structs.replace(told, resident=self._resident, draining=self._draining)
            reply = await self._client.ask(hello, Registered)
        except CoordinatorError as error:
            logger.error("The coordinator does not take this instance: %s", error)
            self._told.set()
            await asyncio.sleep(5.0)
            return
        self._epoch = reply.epoch if told is self._hello else None
        self._look.set()
        logger.info("Registered as '%s' at %s, epoch %d", self.name, self.config.coordinator, reply.epoch)

    async def _report(self) -> None:
        demand = self.meter.demand()
        # Ids mean something only to the coordinator that gave them.
        self._outbox = {key: result for key, result in self._outbox.items() if key[0] == self._epoch}
        sent = dict(self._outbox)
        beat = Heartbeat(
            instance=self.name,
            incarnation=self._hello.incarnation,
            load=self.load.load(self.meter, demand),
            demand=demand,
            resident=self._resident,
            results=tuple(sent.values()),
            draining=self._draining,
        )
        try:
            reply = await self._client.ask(beat, HeartbeatReply)
        except CoordinatorError as error:
            if error.code != "unknown_instance":
                logger.warning("The coordinator refused a heartbeat: %s", error)
                return
            self._epoch = None
            await self._register()
            return
        self.meter.acknowledge(demand)
        if beat.draining:
            self._told.set()
        for key in sent:
            self._outbox.pop(key, None)
        if reply.epoch != self._epoch:
            self._epoch = None
            await self._register()
            return
        for command in reply.commands:
            self._take(command)

    # ---- residency ----

    async def _watch_residency(self) -> None:
        seen: object = None
        changed = asked = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESIDENCY_S):
                    await self._look.wait()
            now = time.monotonic()
            served = {name: request.lora_int_id for name, request in self.models.lora_requests.items()}
            activity = (self.meter.requests(), served)
            if activity != seen or self.meter.running() or self._look.is_set():
                seen, changed = activity, now
            if now - changed > SETTLE_S and now - asked < QUIET_RESIDENCY_S:
                continue
            self._look.clear()
            asked = now
            try:
                self._resident = await self.holdings.residency()
            except Exception:
                # An engine that is busy compiling, or gone; the server itself decides what that means.
                logger.debug("The engine did not say what it holds", exc_info=True)
                await asyncio.sleep(1.0)

    async def _refresh_registry(self) -> None:
        while True:
            table = await self.resolver.refresh()
            if table is not None and self.locator is not None and self.config.transfer_key_file is not None:
                await self.locator.locate_all(table)
            await asyncio.sleep(REFRESH_S)

    # ---- commands ----

    def _take(self, command: Command) -> None:
        """Starts a command once; one that is repeated because its answer was lost is only answered again."""
        assert self._epoch is not None
        key = (self._epoch, command.id)
        if key in self._taken:
            result = self._taken[key]
            if result is not None:
                self._outbox[key] = result
            return
        self._taken = {k: r for k, r in self._taken.items() if k[0] == self._epoch}
        self._taken[key] = None
        self._spawn(self._carry_out(key, command))

    async def _carry_out(self, key: tuple[int, int], command: Command) -> None:
        try:
            if command.action == "prefetch":
                await self.orders.prefetch(command.adapter, command.locations)
            else:
                await self.orders.release(command.adapter, superseded=command.superseded)
            result = CommandResult(id=command.id, ok=True)
        except Exception as error:
            text = f"{error}".strip().splitlines()
            result = CommandResult(id=command.id, ok=False, error=(text[-1] if text else type(error).__name__)[:500])
            logger.warning("Could not %s '%s': %s", command.action, command.adapter.name, result.error)
        with contextlib.suppress(Exception):
            self._resident = await self.holdings.residency()
        self._taken[key] = self._outbox[key] = result
