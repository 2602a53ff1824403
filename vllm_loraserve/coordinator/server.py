"""The coordinator's sockets: a ROUTER that answers requests, a PUB that publishes tables; one asyncio loop.

Whatever arrives is answered or dropped, and counted; nothing that a peer sends ends the process. Work that takes time
(reading a checkpoint, waiting for a drain) runs beside the loop, so that heartbeats are answered meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from vllm_loraserve.coordinator.admission import inspect_source, misfit
from vllm_loraserve.coordinator.client import INSPECTION_S, REPLACE_S, publish_endpoint
from vllm_loraserve.coordinator.control import Controller, ModuleTable
from vllm_loraserve.coordinator.curve import CoordinatorKeys, is_loopback
from vllm_loraserve.coordinator.insight import explain, plan
from vllm_loraserve.coordinator.inspections import Inspections
from vllm_loraserve.coordinator.membership import Refused
from vllm_loraserve.coordinator.messages import (
    HEADER,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    TABLE_TOPIC,
    AdapterRecord,
    AdapterReply,
    AddAdapter,
    Error,
    Explain,
    GetAdapter,
    GetPlan,
    GetStatus,
    GetTable,
    Heartbeat,
    Leave,
    Message,
    Ok,
    Register,
    RemoveAdapter,
    Request,
    Status,
)
from vllm_loraserve.coordinator.registry import RegistryError

logger = logging.getLogger(__name__)

TICK_S = 0.2
PUBLISH_S = 1.0
INSPECTIONS = 2
"""Checkpoints that are read at a time."""
COALESCE_S = 0.02
"""Changes within so short a time become one table."""


class ServerError(RuntimeError):
    """The coordinator can't start; the message is one sentence naming the fix."""


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the coordinator listens and what it may read."""

    bind: str = "tcp://127.0.0.1:5700"
    publish: str = ""
    """Endpoint of the table; empty: the port after `bind`'s."""
    adapter_roots: tuple[str, ...] = ()
    allow_download: bool = False
    insecure: bool = False
    """Allows to bind to other than loopback without keys."""


class _Curve:
    """Lets only known member keys in. pyzmq's own authenticator compares with files; these are in memory."""

    def __init__(self, keys: CoordinatorKeys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._keys.members


class CoordinatorServer:
    """Serves one Controller until `stop`; `start` returns when both sockets are bound."""

    def __init__(self, controller: Controller, options: ServerOptions, keys: CoordinatorKeys | None = None) -> None:
        self.controller = controller
        self.options = options
        self.counters: Counter[str] = Counter()
        self.started = time.monotonic()
        self._keys = keys
        self._authenticator: AsyncioAuthenticator | None = None
        self._context = zmq.asyncio.Context()
        self._router: zmq.asyncio.Socket | None = None
        self._pub: zmq.asyncio.Socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Request)
        self._inspections = Inspections(INSPECTIONS, INSPECTION_S)
        self._name_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    # ---- life ----

    async def start(self) -> None:
        """Binds and serves; raises ServerError when it must not or can't listen there."""
        publish = self.options.publish or publish_endpoint(self.options.bind)
        if self._keys is None and not self.options.insecure:
            for endpoint in (self.options.bind, publish):
                if not is_loopback(endpoint):
                    raise ServerError(
                        f"{endpoint} can be reached from other machines; give --keys (see `vllm-loraserve keygen`), or "
                        "--insecure where the network itself is trusted."
                    )
        if self._keys is not None:
            self._authenticator = AsyncioAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback(credentials_provider=_Curve(self._keys))
        self._router = self._bind(zmq.ROUTER, self.options.bind)
        self._pub = self._bind(zmq.PUB, publish)
        for work in (self._serve(), self._tick(), self._publish(), self._recheck()):
            self._spawn(work)
        logger.info(
            "Coordinator epoch %d at %s, tables at %s: %d adapters, policy %s",
            self.controller.registry.epoch,
            self.options.bind,
            publish,
            len(self.controller.registry),
            self.controller.loop.policy.name,
        )

    def _bind(self, kind: int, endpoint: str) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 200)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        if kind == zmq.PUB:
            socket.setsockopt(zmq.SNDHWM, 16)  # a subscriber that does not read loses tables, not our memory
        if self._keys is not None:
            self._keys.apply(socket)
        if "[" in endpoint:
            socket.setsockopt(zmq.IPV6, 1)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise ServerError(
                f"Can't listen at {endpoint} ({zmq.strerror(error.errno or 0)}); choose another --bind."
            ) from None
        return socket

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("A coordinator task ended", exc_info=error)

    async def stop(self) -> None:
        """Stops serving and closes the sockets; the registry stays open."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._authenticator is not None:
            self._authenticator.stop()
        for socket in (self._router, self._pub):
            if socket is not None:
                socket.close()
        self._context.term()

    # ---- requests ----

    async def _serve(self) -> None:
        assert self._router is not None
        while True:
            try:
                frames = await self._router.recv_multipart()
            except zmq.ZMQError as error:
                if error.errno == zmq.ETERM:
                    return
                self._count("receive_failed")
                logger.warning("Receiving failed: %s", error)
                await asyncio.sleep(0.05)
                continue
            try:
                await self._take(frames)
            except Exception:
                # The last line of defence: one bad message must not cost the cluster its coordinator.
                self._count("internal_error")
                logger.exception("A message could not be handled")

    async def _take(self, frames: Sequence[bytes]) -> None:
        peer = frames[0]
        if len(frames) != 4 or len(frames[1]) != len(HEADER) or frames[1][:3] != HEADER[:3]:
            self._count("malformed")
            # Nobody can match this answer to a request, but whoever speaks the wrong protocol gets to see it.
            await self._reply(
                peer, b"", Error(code="malformed", message="Not a vllm-loraserve message of three frames.")
            )
            return
        _, header, correlation, payload = frames
        if header != HEADER:
            self._count("version")
            text = f"Protocol version {header[3]} is not spoken here, only {PROTOCOL_VERSION}; upgrade the older side."
            await self._reply(peer, correlation, Error(code="version", message=text))
            return
        try:
            message = self._decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, MemoryError, OverflowError) as error:
            await self._reply(peer, correlation, self._undecodable(payload, error))
            return
        self._count(type(message).__name__)
        match message:
            case AddAdapter() | RemoveAdapter():
                self._spawn(self._answer_later(peer, correlation, message))
            case _:
                await self._reply(peer, correlation, self._answer(message))

    def _undecodable(self, payload: bytes, error: BaseException) -> Error:
        try:
            tag = msgspec.msgpack.decode(payload, type=_Tagged).type
        except Exception:
            tag = None
        known = {t.__name__ for t in Request.__args__}
        if tag is not None and tag not in known:
            self._count("unknown_message")
            return Error(
                code="unknown_message",
                message=f"There is no message '{tag[:80]}' in protocol version {PROTOCOL_VERSION}.",
            )
        self._count("malformed")
        return Error(code="malformed", message=f"The message can't be decoded: {str(error)[:300]}.")

    def _count(self, kind: str) -> None:
        self.counters[kind] += 1

    async def _reply(self, peer: bytes, correlation: bytes, reply: Message) -> None:
        assert self._router is not None
        if isinstance(reply, Error):
            self._count(f"error_{reply.code}")
        with contextlib.suppress(zmq.ZMQError):  # the peer is gone
            await self._router.send_multipart([peer, HEADER, correlation, self._encoder.encode(reply)])

    def _answer(self, message: Message) -> Message:
        now = time.monotonic()
        try:
            match message:
                case Heartbeat():
                    return self.controller.heartbeat(message, now)
                case Register():
                    return self.controller.register(message, now)
                case Leave():
                    self.controller.leave(message.instance, message.incarnation, now)
                    return Ok()
                case GetAdapter():
                    record = self.controller.registry.get(message.name)
                    if record is None or record.state == "draining":
                        raise Refused("not_found", f"There is no adapter '{message.name[:200]}'.")
                    if record.state == "failed":
                        raise Refused("not_found", f"The adapter '{record.name}' can't be served: {record.reason}")
                    return AdapterReply(adapter=record, locations=self.controller.locations(record))
                case GetTable():
                    return self.controller.table(now)
                case GetStatus():
                    return self._status(now)
                case GetPlan():
                    return plan(self.controller, message.policy, now)
                case Explain():
                    return explain(self.controller, message.name, now)
            raise Refused("unknown_message", f"{type(message).__name__} is not a request.")
        except Refused as refused:
            return Error(code=refused.code, message=str(refused))
        except RegistryError as error:
            logger.error("%s failed: %s", type(message).__name__, error)
            return Error(code="internal", message=str(error))
        except Exception as error:
            logger.exception("%s failed", type(message).__name__)
            return Error(
                code="internal", message=f"{type(message).__name__} failed: {type(error).__name__}; see the log."
            )

    def _status(self, now: float) -> Status:
        controller = self.controller
        return Status(
            table=controller.table(now),
            uptime_s=now - self.started,
            demand=controller.demand(),
            counters=dict(sorted(self.counters.items())),
            pending=controller.commands.pending(),
            policy=controller.loop.policy.name,
            problems=tuple(controller.problems()),
            decisions=tuple(controller.loop.decisions)[-20:],
            speeds=controller.loop.speeds.learned(),
        )

    async def _answer_later(self, peer: bytes, correlation: bytes, message: AddAdapter | RemoveAdapter) -> None:
        reply: Message
        try:
            reply = await (self._add(message) if isinstance(message, AddAdapter) else self._remove(message))
        except Refused as refused:
            reply = Error(code=refused.code, message=str(refused))
        except RegistryError as error:
            logger.error("%s '%s' failed: %s", type(message).__name__, message.name, error)
            reply = Error(code="internal", message=str(error))
        except Exception as error:
            logger.exception("%s '%s' failed", type(message).__name__, message.name)
            reply = Error(
                code="internal", message=f"{type(message).__name__} failed: {type(error).__name__}; see the log."
            )
        await self._reply(peer, correlation, reply)

    async def _add(self, message: AddAdapter) -> AdapterReply:
        controller = self.controller
        controller.check_name(message.name)
        # Two additions of one name are looked at one after the other: the second sees the first's content.
        lock = self._name_locks.setdefault(message.name, asyncio.Lock())
        try:
            async with lock:
                modules: ModuleTable | None = None
                # Again where the base model became known meanwhile.
                while modules is not controller.modules:
                    modules = controller.modules
                    look = functools.partial(
                        inspect_source,
                        message.name,
                        message.source,
                        roots=self.options.adapter_roots,
                        max_rank=controller.max_rank(),
                        module_shapes=modules or None,
                        base_model=controller.base_model,
                        allow_download=self.options.allow_download,
                    )
                    inspected = await self._inspections.run(message.source, look)
                record, created = controller.add(inspected, time.monotonic(), replace=message.replace)
                if message.replace and (created or controller.is_replacing(record)):
                    await self._taken_over(record)
        finally:
            del lock  # names come from clients; an exception's frames would keep the lock, and it the name
        return AdapterReply(adapter=record, created=created)

    async def _taken_over(self, record: AdapterRecord) -> None:
        """Waits until instances no longer begin requests with what the name stood for before; Refused when they don't
        come to it, or can't load the new content."""
        controller, end = self.controller, time.monotonic() + REPLACE_S
        while (late := controller.outdated(record)) or not controller.settled:
            if controller.registry.get(record.name) is None:
                return
            if time.monotonic() > end:
                raise Refused(
                    "internal",
                    f"Adapter '{record.name}' is replaced, but {', '.join(late) or 'an instance'} did not take the new "
                    f"content within {REPLACE_S:g} s; see `vllm-loraserve status`.",
                )
            await asyncio.sleep(TICK_S)
        if problem := controller.replaced(record):
            raise Refused("internal", f"Adapter '{record.name}' is replaced, and {problem}")

    async def _remove(self, message: RemoveAdapter) -> Ok:
        await self.controller.remove(message.name, max(0.0, message.drain_s), time.monotonic()).wait()
        return Ok()

    # ---- time, table ----

    async def _recheck(self) -> None:
        """Compares the registered adapters with the base model's modules whenever more is known of those.

        What an instance holds fits: it was compared with the layers themselves.
        """
        controller = self.controller
        while True:
            await controller.modules_changed.wait()
            controller.modules_changed.clear()
            modules = controller.modules
            for record in controller.registry.all():
                if record.state == "draining" or controller.members.holders(record.name, record.sha256):
                    continue
                look = functools.partial(misfit, record.source, roots=self.options.adapter_roots, module_shapes=modules)
                try:
                    problem = await self._inspections.run(record.source, look)
                    if problem:
                        controller.fail(record, problem)
                    elif problem is not None:
                        controller.found_to_fit(record, time.monotonic())
                except (Refused, RegistryError) as error:
                    logger.warning("Adapter '%s' could not be compared with the base model: %s", record.name, error)
                except Exception:
                    self._count("internal_error")
                    logger.exception("Adapter '%s' could not be compared with the base model", record.name)
            try:
                controller.all_compared(modules)
            except RegistryError as error:
                logger.warning("%s The adapters will be compared with the base model again.", error)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.controller.tick(time.monotonic())
            except Exception:
                self._count("internal_error")
                logger.exception("A control step failed")

    async def _publish(self) -> None:
        assert self._pub is not None
        dirty = self.controller.dirty
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PUBLISH_S):
                    await dirty.wait()
                    await asyncio.sleep(COALESCE_S)
            dirty.clear()
            if not self.controller.settled:
                continue
            try:
                table = self.controller.table(time.monotonic())
                await self._pub.send_multipart([TABLE_TOPIC, HEADER, self._encoder.encode(table)])
                self._count("tables_published")
            except Exception:
                self._count("internal_error")
                logger.exception("A table could not be published")


class _Tagged(msgspec.Struct):
    type: str
