"""The instance's side of the cluster: registers, reports, and carries out what the coordinator asks.

Runs as tasks in the vLLM API server's event loop, beside the requests; nothing in it ever waits in a request's way.
While the coordinator is away it tries again at every heartbeat and the instance goes on serving; when the coordinator
is new, or has given the instance up, it registers again with all that it holds.

    heartbeat (load, demand, residency, results) -> HeartbeatReply(commands)
    prefetch: the engine loads the adapter and vLLM's server serves its name, before any request asks for it
    release:  the name is no longer served; when its last running request is done, the engine forgets the adapter
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import urllib.parse
import uuid
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry

from vllm_loraserve.adapters.shapes import merged
from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.messages import (
    AdapterRecord,
    Command,
    CommandResult,
    Heartbeat,
    HeartbeatReply,
    Leave,
    Location,
    Register,
    Registered,
    Residency,
    RoutingTable,
)
from vllm_loraserve.engine.capacity import capacity_of, module_shapes, with_arena
from vllm_loraserve.engine.engine_config import WORKER_EXTENSION
from vllm_loraserve.engine.meter import LoadLogger, Meter
from vllm_loraserve.engine.resolver import LoRAServeResolver, locations_of
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
DRAIN_POLL_S = 0.1
LINGER_S = 2.0
"""Replaced content stays in the engine until no request has used it for so long."""
LOAD_GRACE_S = 5.0
"""Added to `load_timeout_s`: a prefetch that is not in the engine by then has failed; a request for the adapter tells
why."""


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


class Inside(NamedTuple):
    """Ids that every worker holds in slots, ids that it has in host memory, why others could not be loaded, and for
    those in the host tier of every worker the sum of their generations: it rises with each change on any."""

    arena: set[int]
    host: set[int]
    errors: dict[int, str]
    generations: dict[int, int]

    def __contains__(self, lora_id: object) -> bool:
        return lora_id in self.arena or lora_id in self.host


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
        self._patience_s = config.load_timeout_s + LOAD_GRACE_S
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
        self._mixed_in = getattr(vllm_config.parallel_config, "worker_extension_cls", "") == WORKER_EXTENSION
        if self._extended:
            self.resolver.on_located = self._locate
        self._epoch: int | None = None
        self._draining = False
        self._hurry, self._told = asyncio.Event(), asyncio.Event()
        self._reachable = True
        self._resident: tuple[Residency, ...] = ()
        self._asked: asyncio.Task[None] | None = None
        self._look = asyncio.Event()
        self._taken: dict[tuple[int, int], CommandResult | None] = {}
        self._outbox: dict[tuple[int, int], CommandResult] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._withdrawn: set[int] = set()
        """Numbers of requests that had a name and lost it; none is given twice."""
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._undo: list[Callable[[], None]] = []

    @property
    def _extended(self) -> bool:
        """Whether the workers can be asked what `worker_extension.py` answers."""
        return self._workers.beside_the_engine or self._mixed_in

    @property
    def _transfers(self) -> bool:
        return self._extended and self.config.transfer_key_file is not None

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
        tasks = list(self._tasks)
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
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        await self._leave()

    async def _ask_engine(self) -> None:
        """What a coordinator is told when this instance joins and only the engine knows."""
        try:
            self._resident = await self._residency()
            hello = self._hello
            if self._extended:
                modules = merged(await self._workers.ask("loraserve_shapes"))
                rows = [rows for rows in await self._workers.ask("loraserve_arena_rows") if rows is not None]
                capacity = with_arena(hello.capacity, min(rows)) if rows else hello.capacity
                hello = msgspec.structs.replace(hello, modules=modules, capacity=capacity)
            if self._transfers:
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
                self._resident = await self._residency()
            except Exception:
                # An engine that is busy compiling, or gone; the server itself decides what that means.
                logger.debug("The engine did not say what it holds", exc_info=True)
                await asyncio.sleep(1.0)

    async def _residency(self) -> tuple[Residency, ...]:
        """What the engine holds of the registry's adapters."""
        inside = await self._inside()
        out = []
        for name, request in list(self.models.lora_requests.items()):
            digest, number = self.resolver.digest_of(request), request.lora_int_id
            if digest is not None and number in inside:
                tier: Literal["arena", "host"] = "arena" if number in inside.arena else "host"
                generation = inside.generations.get(number, 0)
                out.append(Residency(name=name, sha256=digest, tier=tier, generation=generation))
        return tuple(out)

    async def _inside(self) -> Inside:
        if not self._extended:
            return Inside(set(await self.engine.list_loras()), set(), {}, {})
        answers = await self._workers.ask("loraserve_residency")
        arena = set.intersection(*(set(a) for a, _, _, _ in answers))
        held = set.intersection(*(set(a) | set(h) for a, h, _, _ in answers))
        # Keys of a map may arrive as text.
        errors = {int(i): text for _, _, failed, _ in answers for i, text in failed.items()}
        counts = [{int(i): n for i, n in generations.items()} for _, _, _, generations in answers]
        generations = {i: sum(c[i] for c in counts) for i in set.intersection(*(set(c) for c in counts))}
        return Inside(arena, held - arena, errors, generations)

    async def _refresh_registry(self) -> None:
        while True:
            table = await self.resolver.refresh()
            if table is not None and self._transfers:
                await self._locate_all(table)
            await asyncio.sleep(REFRESH_S)

    # ---- peers ----

    def _row(self, request: LoRARequest, locations: Sequence[Location]) -> tuple[str, str, str, list[tuple[str, str]]]:
        others = [(x.instance, x.endpoint) for x in locations if x.instance != self.name]
        return request.lora_name, request.lora_path, self.resolver.digest_of(request) or "", others

    async def _locate(self, request: LoRARequest, locations: Sequence[Location]) -> None:
        """Tells the workers what content an adapter that they are about to load was registered with, and who holds it.

        Best effort: an engine that answers late still hears this before the load, which is queued behind it.
        """
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._workers.ask("loraserve_locate", [self._row(request, locations)])
        except Exception:
            logger.warning("The workers did not answer who holds '%s'", request.lora_name, exc_info=True)

    async def _locate_all(self, table: RoutingTable) -> None:
        """Keeps what the workers know about holders fresh, for adapters that were evicted and are asked for again, and
        lets them forget adapters and instances that are gone."""
        rows = []
        for name, request in list(self.models.lora_requests.items()):
            digest = self.resolver.digest_of(request)
            if digest is not None:
                rows.append(self._row(request, locations_of(table, name, digest)))
        adapters, instances = self.resolver.names(), [i.name for i in table.instances]
        with contextlib.suppress(Exception):
            if table.settled:  # else its members of before are still on their way back
                await self._workers.ask("loraserve_retain", adapters, instances)
            if rows:
                await self._workers.ask("loraserve_locate", rows)

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
                await self.prefetch(command.adapter, command.locations)
            else:
                await self.release(command.adapter, superseded=command.superseded)
            result = CommandResult(id=command.id, ok=True)
        except Exception as error:
            text = f"{error}".strip().splitlines()
            result = CommandResult(id=command.id, ok=False, error=(text[-1] if text else type(error).__name__)[:500])
            logger.warning("Could not %s '%s': %s", command.action, command.adapter.name, result.error)
        with contextlib.suppress(Exception):
            self._resident = await self._residency()
        self._taken[key] = self._outbox[key] = result

    async def prefetch(self, record: AdapterRecord, locations: Sequence[Location] = ()) -> None:
        """Loads this content under the adapter's name; raises what the engine raises.

        Other content that has the name serves it until this one is there, or can't be loaded. Prefetches of one name
        take turns; one whose content is no longer what the name stands for, or whose adapter is being removed, ends.
        """
        self.resolver.learn(record)
        async with self._turns[record.name]:
            if self._wanted(record):
                await self._prefetch(record, locations)

    async def _prefetch(self, record: AdapterRecord, locations: Sequence[Location]) -> None:
        replaced: LoRARequest | None = None
        async with self.models.lora_resolver_lock[record.name]:
            request = self.models.lora_requests.get(record.name)
            if request is not None and self.resolver.digest_of(request) != record.sha256:
                if self.resolver.digest_of(request) is None:
                    raise ValueError(f"'{record.name}' was loaded here from outside the registry; unload it.")
                replaced, request = request, None
            if request is None:
                request = self.resolver.request_for(record, self.models.lora_id_counter.inc(1))
            if request.lora_int_id not in await self._inside():
                if self._extended:
                    await self._locate(request, locations)
                try:
                    await self.engine.add_lora(request)
                except Exception:
                    if replaced is not None:
                        self._unserve(record.name, replaced, LINGER_S)
                    raise
            if replaced is None:
                self.models.lora_requests[record.name] = request
        # Outside of the lock: an engine that loads aside has answered before the adapter is there, and requests that
        # name it meanwhile wait for it there, or are told why it can't be loaded.
        serving = replaced or request
        try:
            held = await self._held(record, request)
            if not held and not self._is_over(record, request):
                raise TimeoutError(f"The engine has not loaded '{record.name}' within {self._patience_s:g} s.")
        except (RuntimeError, TimeoutError):
            if self.models.lora_requests.get(record.name) is serving:
                self._unserve(record.name, serving, LINGER_S if replaced is not None else 0.0)
            if replaced is not None:
                await self.engine.remove_lora(request.lora_int_id)
            raise
        if replaced is not None:
            # By identity: vLLM's requests of one name are equal.
            present = self.models.lora_requests.get(record.name)
            if not self._wanted(record) or not (present is None or present is replaced):
                await self.engine.remove_lora(request.lora_int_id)
                return
            if present is not None:
                self._unserve(record.name, replaced, LINGER_S)
            self.models.lora_requests[record.name] = request
        if held:
            logger.info("Prefetched adapter '%s' (rank %d) from '%s'", record.name, record.rank, record.source)

    def _wanted(self, record: AdapterRecord) -> bool:
        """Whether the name still stands for this content, by what was last heard."""
        known = self.resolver.known(record.name)
        return known is not None and known.sha256 == record.sha256

    def _is_over(self, record: AdapterRecord, request: LoRARequest) -> bool:
        """Whether nobody waits for the load any more: other content has the name, or this request lost it."""
        return not self._wanted(record) or request.lora_int_id in self._withdrawn

    async def _held(self, record: AdapterRecord, request: LoRARequest) -> bool:
        """Waits until the engine holds the adapter; False when it has not come in time, or is no longer wanted.

        Raises RuntimeError with the reason where the engine says that it can't be loaded.
        """
        end, pause = time.monotonic() + self._patience_s, 0.05
        while True:
            inside = await self._inside()
            if request.lora_int_id in inside:
                return True
            if request.lora_int_id in inside.errors:
                raise RuntimeError(inside.errors[request.lora_int_id])
            if time.monotonic() > end or self._is_over(record, request):
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    async def release(self, record: AdapterRecord, *, superseded: bool = False) -> None:
        """Stops serving the adapter's name, waits for its running requests, and lets the engine forget it.

        `superseded`: returns without that wait; the engine forgets it later. Otherwise, where other content is about to
        give way to this one, that goes too. vLLM's own unloading removes the name only; the engine would keep the
        weights.
        """
        last = self._wanted(record) and not superseded
        if last:
            self.resolver.forget(record.name)
        async with self.models.lora_resolver_lock[record.name]:
            present = self.models.lora_requests.get(record.name)
            digest = self.resolver.digest_of(present) if present is not None else None
            if present is None or digest is None or (digest != record.sha256 and not last):
                return
            removal = self._unserve(record.name, present, LINGER_S if superseded else 0.0)
        if not superseded:
            await removal
        logger.info("Released adapter '%s'", record.name)

    def _unserve(self, name: str, request: LoRARequest, linger_s: float = 0.0) -> asyncio.Task[None]:
        """No new request gets `request` from now on; the task returned ends when the engine has forgotten it.

        `linger_s`: it must have been idle for so long. Requests that took it a moment ago are not counted yet, and
        where routes were not taken away first there may be some.
        """
        del self.models.lora_requests[name]
        self._withdrawn.add(request.lora_int_id)

        async def remove() -> None:
            # An adapter removed under a running request would be loaded again by that request's next step.
            idle_since = time.monotonic()
            while (runs := self.meter.running_id(request.lora_int_id)) or time.monotonic() - idle_since < linger_s:
                if runs:
                    idle_since = time.monotonic()
                await asyncio.sleep(DRAIN_POLL_S)
            await self.engine.remove_lora(request.lora_int_id)
            self._look.set()

        task = asyncio.create_task(remove())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
