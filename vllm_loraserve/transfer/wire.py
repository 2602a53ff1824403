"""The messages of a transfer connection and how they are framed.

A frame is a 4-byte little-endian length and that many bytes of msgpack, at most MAX_FRAME. On a control connection the
client asks and the server answers, one at a time (but for `Landed`, which has no answer); EOF ends every lease of the
session. On a data connection the client sends `Pull` and the server answers `Data` followed by the raw bytes. Errors
are answers, not closed connections.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Literal

import msgspec

from vllm_loraserve.transfer.errors import DeadlineError, PeerLostError, TransferError
from vllm_loraserve.transfer.pages import AdapterPages

VERSION = 1
MAX_FRAME = 16 << 20
_LENGTH = struct.Struct("<I")


class Deadline:
    """A point in monotonic time, in seconds from now; `None` never comes."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self, at_most: float = 3600.0) -> float:
        """Seconds left, never more than `at_most`. Raises DeadlineError when none are."""
        if self._end is None:
            return at_most
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineError("the time given for the transfer is over")
        return min(left, at_most)


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of every message."""


class Hello(Message, frozen=True):
    """First on a control connection: who asks. Reply: Welcome."""

    version: int
    instance: str
    boot_id: str


class SlabInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One slab that the server serves from. `ipc`: CUDA IPC handle and offset of device memory."""

    size: int
    device: int = -1
    ipc: bytes = b""
    ipc_offset: int = 0


class Welcome(Message, frozen=True):
    """What the server offers. `session` opens data connections; `unix` is an abstract socket on the same host."""

    version: int
    instance: str
    boot_id: str
    session: bytes
    slabs: tuple[SlabInfo, ...]
    lease_s: float
    unix: str = ""
    verbs: str = ""
    """Empty where RDMA works, else the reason why it does not."""
    gpudirect: str = "no device memory is served"
    """Empty where device memory can be registered, else the reason."""
    nixl: bytes = b""
    """Agent metadata of the optional NIXL back end."""
    nixl_base: tuple[int, ...] = ()


class GetCatalogue(Message, frozen=True):
    """Reply: Catalogue."""


class Catalogue(Message, frozen=True):
    """Every adapter that may be read."""

    adapters: tuple[AdapterPages, ...]


class OpenLease(Message, frozen=True):
    """Asks to read an adapter. Reply: Leased, or Refused."""

    name: str
    layout: str
    digest: str = ""
    rdma: bool = False
    """Register the pages for this session's queue pair."""


class RemoteRange(msgspec.Struct, frozen=True, array_like=True):
    """Memory registered for one lease: `length` bytes at the remote `address`, opened by `rkey`."""

    address: int
    length: int
    rkey: int


class Leased(Message, frozen=True):
    """The pages stay until the lease is released, revoked, or not renewed (by any message) for `lease_s`."""

    lease: int
    pages: AdapterPages
    slab: int
    remote: tuple[RemoteRange, ...] = ()


class CheckLease(Message, frozen=True):
    """Is what I read still what you hold? Reply: LeaseState."""

    lease: int


class LeaseState(Message, frozen=True):
    """`valid` is False where the lease was revoked or the generation changed since it began."""

    valid: bool
    generation: int


class ReleaseLease(Message, frozen=True):
    """Ends a lease. Reply: LeaseState as it was until then, so that one question asks whether what was read is what the
    server held all the while, and gives the lease back."""

    lease: int


class Landed(Message, frozen=True):
    """A verified copy of what this lease, released since, had opened exists at the client. No reply: nobody waits."""

    lease: int


class Ping(Message, frozen=True):
    """Liveness; renews the session's leases. Reply: Done."""


class Done(Message, frozen=True):
    """Nothing more to say."""


class ConnectQueuePair(Message, frozen=True):
    """The client's end of a reliable connection. Reply: QueuePair, or Refused."""

    number: int
    gid: str
    psn: int
    lid: int = 0
    mtu: int = 3
    """`ibv_mtu`: 3 is 1024 bytes."""


class QueuePair(Message, frozen=True):
    """The server's end, ready to be read from."""

    number: int
    gid: str
    psn: int
    lid: int = 0
    mtu: int = 3
    max_reads: int = 16


class Attach(Message, frozen=True):
    """First on a data connection: the control connection it belongs to. Reply: Done."""

    session: bytes


class GetMemory(Message, frozen=True):
    """On the same host's socket: the memfd of a slab follows the Done."""

    slab: int


class Pull(Message, frozen=True):
    """On a data connection: `length` bytes of the lease's page stream from `start`."""

    lease: int
    start: int
    length: int


class Data(Message, frozen=True):
    """`length` raw bytes follow this frame."""

    length: int


Code = Literal["not_held", "layout", "digest", "revoked", "unsupported", "invalid", "busy", "internal"]


class Refused(Message, frozen=True):
    """The request was not carried out; one sentence says why."""

    code: Code
    message: str


Request = (
    Hello
    | GetCatalogue
    | OpenLease
    | CheckLease
    | ReleaseLease
    | Landed
    | Ping
    | ConnectQueuePair
    | Attach
    | GetMemory
    | Pull
)
Reply = Welcome | Catalogue | Leased | LeaseState | Done | QueuePair | Data | Refused

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def send(sock: socket.socket, message: Message) -> None:
    """Sends one frame. Raises PeerLostError where the connection is gone."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise TransferError(f"a {type(message).__name__} of {len(body)} bytes is larger than a frame may be")
    try:
        sock.sendall(_LENGTH.pack(len(body)) + body)
    except TimeoutError:
        raise DeadlineError("the peer did not take a message in time") from None
    except OSError as error:
        raise PeerLostError(f"the connection broke: {error}") from None


def receive_exactly(sock: socket.socket, size: int, deadline: Deadline | None = None) -> bytes | None:
    """`size` bytes, or None on EOF before the first of them. deadline: for all of them, where the socket's own time-out
    begins anew with each."""
    parts = bytearray(size)
    view, got = memoryview(parts), 0
    try:
        while got < size:
            if deadline is not None:
                sock.settimeout(deadline.left())
            n = sock.recv_into(view[got:])
            if n == 0:
                if got == 0:
                    return None
                raise PeerLostError("the connection ended inside a message")
            got += n
    except (TimeoutError, BlockingIOError):
        raise DeadlineError("the peer did not answer in time") from None
    except OSError as error:
        raise PeerLostError(f"the connection broke: {error}") from None
    return bytes(parts)


def _receive(sock: socket.socket, deadline: Deadline | None) -> bytes | None:
    head = receive_exactly(sock, _LENGTH.size, deadline)
    if head is None:
        return None
    (size,) = _LENGTH.unpack(head)
    if size > MAX_FRAME:
        raise TransferError(f"a frame of {size} bytes is larger than the {MAX_FRAME} allowed")
    body = receive_exactly(sock, size, deadline) if size else b""
    if body is None:
        raise PeerLostError("the connection ended inside a message")
    return body


def receive_request(sock: socket.socket, deadline: Deadline | None = None) -> Request | None:
    """The next request, or None on EOF. Raises TransferError on bytes that are no request."""
    body = _receive(sock, deadline)
    if body is None:
        return None
    try:
        return _requests.decode(body)
    except msgspec.MsgspecError as error:
        raise TransferError(f"not a request: {error}") from None


def receive_reply(sock: socket.socket, deadline: Deadline | None = None) -> Reply:
    """The next reply. Raises PeerLostError on EOF."""
    body = _receive(sock, deadline)
    if body is None:
        raise PeerLostError("the peer closed the connection")
    try:
        return _replies.decode(body)
    except msgspec.MsgspecError as error:
        raise TransferError(f"not a reply: {error}") from None
