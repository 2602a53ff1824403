"""The members' end of the protocol: `CoordinatorClient` asks, `TableSubscriber` listens. Both outlive the coordinator.

A request waits for a live connection, never in a queue for a later one, so nothing stale is delivered after a
restart: while the coordinator is away every request ends in CoordinatorUnavailable after its timeout, and the first
one after its return works. Sockets reconnect by themselves. Both classes belong to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

import msgspec
import zmq
import zmq.asyncio

from vllm_loraserve.coordinator.curve import MemberKeys, default_member_keys
from vllm_loraserve.coordinator.messages import (
    HEADER,
    MAX_MESSAGE_BYTES,
    TABLE_TOPIC,
    AddAdapter,
    Error,
    ErrorCode,
    Message,
    RemoveAdapter,
    Reply,
    RoutingTable,
)
from vllm_loraserve.coordinator.table_decoder import TableDecoder

logger = logging.getLogger(__name__)

ANSWER_S = 5.0
"""How long a request is waited for that the coordinator answers at once."""
INSPECTION_S = 120.0
"""Reading and hashing a checkpoint may take so long besides."""
REPLACE_S = 30.0
"""And what takes a name over so long until instances have let go of what was there."""
RELEASE_S = 15.0
"""A removal may take so long besides its drain."""
READ_PAUSE_S = 0.5
"""Before a socket that could not be read is read again."""
RECONNECT_MS, RECONNECT_MAX_MS = 50, 500
"""First and largest pause between two tries to connect."""
STALE_S = 10.0
"""A table of a smaller epoch is taken when the last one is this old: its coordinator was replaced."""
_UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError)
"""What decoding may raise."""
ReplyT = TypeVar("ReplyT", bound=Message)


class CoordinatorUnavailable(ConnectionError):
    """No answer within the timeout; the coordinator may be down, and may or may not have acted."""


class CoordinatorError(Exception):
    """The coordinator refused the request. `code` is for programs, `str(error)` one sentence for people."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: ErrorCode = code


def publish_endpoint(endpoint: str) -> str:
    """Where the table is published by a coordinator that answers at `endpoint`: the next port, or PATH.table."""
    if not endpoint.startswith("tcp://"):
        return endpoint + ".table"
    host, _, port = endpoint.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65535:
        raise ValueError(f"The coordinator endpoint '{endpoint}' has no usable port; give tcp://HOST:PORT.")
    return f"{host}:{int(port) + 1}"


def _configure(socket: zmq.asyncio.Socket, endpoint: str, keys: MemberKeys | None) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    # A peer that vanished without closing (power, network) is noticed by ZMTP pings, then reconnected to.
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    if keys is not None:
        keys.apply(socket)


async def _receive(socket: zmq.asyncio.Socket, endpoint: str) -> list[bytes]:
    """The next message. A failed read (no memory, an interrupted call) is tried again: whoever reads here does so for
    as long as the process lives, and nobody would notice its end."""
    while True:
        try:
            return await socket.recv_multipart()
        except zmq.ZMQError as error:
            if socket.closed:
                raise
            logger.warning("Reading from %s failed (%s), trying again", endpoint, error)
            await asyncio.sleep(READ_PAUSE_S)


def _own_time(message: Message) -> float:
    """Seconds that a request may take by its nature: a drain; reading and hashing a checkpoint."""
    if isinstance(message, RemoveAdapter):
        return message.drain_s + RELEASE_S
    if isinstance(message, AddAdapter):
        return INSPECTION_S + (REPLACE_S if message.replace else 0.0)
    return 0.0


class CoordinatorClient:
    """Asks the coordinator at `endpoint`; any number of requests may be in flight. Connects on first use."""

    def __init__(self, endpoint: str, *, timeout_s: float = ANSWER_S, keys: MemberKeys | None = None) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self._keys = keys if keys is not None else default_member_keys()
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: dict[bytes, asyncio.Future[Reply]] = {}
        self._ids = itertools.count(1)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

    async def __aenter__(self) -> CoordinatorClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def request(self, message: Message, *, timeout_s: float | None = None) -> Reply:
        """Sends `message` and returns the reply, which is never an Error.

        Raises CoordinatorError for an Error reply, CoordinatorUnavailable when none came within `timeout_s` seconds
        (default: the client's, and what the request itself takes). Repeating a request is always safe.
        """
        timeout = self.timeout_s + _own_time(message) if timeout_s is None else timeout_s
        socket = self._open()
        correlation = next(self._ids).to_bytes(8, "big")
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = answer
        try:
            async with asyncio.timeout(timeout):
                await socket.send_multipart([HEADER, correlation, self._encoder.encode(message)])
                reply = await answer
        except TimeoutError:
            raise CoordinatorUnavailable(
                f"The coordinator at {self.endpoint} did not answer within {timeout:g} s; is it running, with our keys?"
            ) from None
        finally:
            self._waiting.pop(correlation, None)
        if isinstance(reply, Error):
            raise CoordinatorError(reply.code, reply.message)
        return reply

    async def ask(self, message: Message, kind: type[ReplyT], *, timeout_s: float | None = None) -> ReplyT:
        """`request` for callers that know what comes back; another reply raises CoordinatorError `internal`."""
        reply = await self.request(message, timeout_s=timeout_s)
        if not isinstance(reply, kind):
            raise CoordinatorError("internal", f"Expected a {kind.__name__} but got a {type(reply).__name__}.")
        return reply

    async def close(self) -> None:
        """Closes the socket; requests in flight raise CoordinatorUnavailable."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(CoordinatorUnavailable("The connection to the coordinator was closed."))

    def _open(self) -> zmq.asyncio.Socket:
        if self._socket is None:
            socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
            _configure(socket, self.endpoint, self._keys)
            # Without this a message sent while the coordinator is away would reach the next one, long after its sender
            # gave up.
            socket.setsockopt(zmq.IMMEDIATE, 1)
            try:
                socket.connect(self.endpoint)
            except zmq.ZMQError as error:
                socket.close()
                raise CoordinatorUnavailable(
                    f"'{self.endpoint}' is no coordinator endpoint ({zmq.strerror(error.errno or 0)}); give tcp://HOST:PORT."
                ) from None
            self._socket = socket
            self._reader = asyncio.create_task(self._read(socket), name="coordinator-client")
        return self._socket

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await _receive(socket, self.endpoint)
            if len(frames) != 3 or frames[0] != HEADER:
                logger.warning(
                    "Dropped a reply of %d frames from %s: not this protocol version", len(frames), self.endpoint
                )
                continue
            answer = self._waiting.get(frames[1])
            if answer is None or answer.done():
                continue  # its sender has given up
            try:
                answer.set_result(self._decoder.decode(frames[2]))
            except _UNDECODABLE as error:
                answer.set_exception(CoordinatorError("malformed", f"The coordinator's reply is malformed: {error}."))


TableCallback = Callable[[RoutingTable], Awaitable[None] | None]


class TableSubscriber:
    """Keeps the newest routing table that the coordinator published; survives its absence with the last one.

    `on_table` is called (and awaited, if it is a coroutine function) for every table that is newer by (epoch,
    version), as `offer` says. What it raises is logged and does not end the subscription.
    """

    def __init__(
        self,
        endpoint: str,
        on_table: TableCallback | None = None,
        *,
        publish: str | None = None,
        keys: MemberKeys | None = None,
    ) -> None:
        """`endpoint` is the coordinator's request endpoint; `publish` overrides the publish endpoint."""
        self.endpoint = publish or publish_endpoint(endpoint)
        self.table: RoutingTable | None = None
        self._heard: float | None = None
        self._taken = 0.0
        self._on_table = on_table
        self._keys = keys if keys is not None else default_member_keys()
        self._socket: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self._decoder = TableDecoder()

    @property
    def silence_s(self) -> float:
        """Seconds since the coordinator was last heard; infinite if never. Over 3 s: it is away, or the network is."""
        return float("inf") if self._heard is None else time.monotonic() - self._heard

    def start(self) -> None:
        """Subscribes and begins to read."""
        if self._task is not None:
            return
        socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        _configure(socket, self.endpoint, self._keys)
        socket.setsockopt(zmq.SUBSCRIBE, TABLE_TOPIC)
        # Only the newest table matters; a slow reader must not collect old ones.
        socket.setsockopt(zmq.RCVHWM, 16)
        socket.connect(self.endpoint)
        self._socket = socket
        self._task = asyncio.create_task(self._read(socket), name="table-subscriber")

    async def first_table(self, timeout_s: float) -> RoutingTable:
        """The table, once there is one; raises TimeoutError after `timeout_s` seconds."""
        async with asyncio.timeout(timeout_s):
            await self._arrived.wait()
        assert self.table is not None
        return self.table

    async def stop(self) -> None:
        """Unsubscribes; `table` stays."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def offer(self, table: RoutingTable) -> bool:
        """Takes a table that came another way (a reply to GetTable); True if it was newer, and not one with holes.

        A replaced coordinator without the old registry, and with a clock behind, begins at a smaller epoch: its tables
        count as newer once the old ones have stopped for `STALE_S`.
        """
        last = self.table
        now = time.monotonic()
        if not table.settled:
            return False
        if last is not None and (table.epoch, table.version) <= (last.epoch, last.version):
            replaced = table.epoch < last.epoch and now - self._taken >= STALE_S
            if not replaced:
                return False
        self.table = table
        self._taken = now
        self._arrived.set()
        if self._on_table is not None:
            try:
                done = self._on_table(table)
                if done is not None:
                    await done
            except Exception:
                logger.exception("The handler of routing table %d.%d failed", table.epoch, table.version)
        return True

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await _receive(socket, self.endpoint)
            if len(frames) != 3 or frames[1] != HEADER:
                logger.warning("Dropped a table of another protocol version from %s", self.endpoint)
                continue
            try:
                table = self._decoder.decode(frames[2])
            except _UNDECODABLE as error:
                logger.warning("Dropped a malformed table from %s: %s", self.endpoint, error)
                continue
            self._heard = time.monotonic()
            await self.offer(table)
