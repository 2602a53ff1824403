"""The last rung: TCP, several streams, received straight into the destination.

The sender hands the slab's memfd to sendfile, so that its side copies nothing; the receiver's recv_into is
then the one copy there is. Each stream takes a contiguous share of the page stream. Device memory takes a
detour over a host buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from vllm_loraserve.memory import extension
from vllm_loraserve.memory.extension import Segment
from vllm_loraserve.memory.slab import HostSlab, Slab
from vllm_loraserve.transfer import wire
from vllm_loraserve.transfer.auth import prove_as_client
from vllm_loraserve.transfer.errors import (
    DeadlineError,
    GenerationChangedError,
    PeerLostError,
    RungFailedError,
)
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.pages import AdapterPages, Destination, Range, slice_stream
from vllm_loraserve.transfer.rungs.base import Link

SEND_PIECE = 4 << 20
RECEIVE_PIECE = 1 << 20
MIN_SHARE = 1 << 20
"""Below this many bytes a stream is not worth its request."""


# ---- the serving side ----


def pull_ranges(pages: AdapterPages, request: wire.Pull) -> list[Range]:
    """The slab ranges of a Pull. Raises ValueError outside the lease's stream."""
    return slice_stream(pages.ranges, request.start, request.length)


def send_pieces(ranges: Sequence[Range]) -> Iterator[Range]:
    """The ranges cut so small that a revocation does not wait long."""
    for offset, length in ranges:
        for start in range(0, length, SEND_PIECE):
            yield Range(offset + start, min(SEND_PIECE, length - start))


def send_range(sock: socket.socket, slab: Slab, piece: Range) -> None:
    """Sends one piece of a slab, by sendfile where a file is behind it."""
    if slab.device >= 0:
        _send_from_device(sock, slab, piece)
        return
    if slab.fd >= 0:
        offset, left = piece
        while left:
            sent = os.sendfile(sock.fileno(), slab.fd, offset, left)
            if sent == 0:
                raise PeerLostError("the reader closed the connection")
            offset, left = offset + sent, left - sent
        return
    sock.sendall(memoryview((ctypes.c_ubyte * piece.length).from_address(slab.address + piece.offset)))


def _send_from_device(sock: socket.socket, slab: Slab, piece: Range) -> None:
    library = extension.load()
    if library is None:
        raise RungFailedError("sending device memory needs the extension")
    with HostSlab(piece.length, huge=False) as bounce:
        library.copy([Segment(slab.address + piece.offset, bounce.address, piece.length)], slab.device)
        view = bounce.view(0, piece.length)
        sock.sendall(view)
        del view


def limit_send(sock: socket.socket, seconds: float = 10.0) -> None:
    """A reader that takes nothing for so long loses its connection, so that it cannot hold up a revocation for ever."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), 0))


# ---- the reading side ----


def open_data(link: Link, address: str | tuple[str, int], timeout: float) -> socket.socket:
    """An authenticated data connection of this session. Raises RungFailedError where it cannot be had."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(address)
        prove_as_client(sock, link.key)
        wire.send(sock, wire.Attach(session=link.welcome.session))
        reply = wire.receive_reply(sock)
        if not isinstance(reply, wire.Done):
            raise RungFailedError(f"no data connection: {reply}")
    except (OSError, PeerLostError) as error:
        sock.close()
        raise RungFailedError(f"no data connection: {error}") from None
    except BaseException:
        sock.close()
        raise
    return sock


def default_streams() -> int:
    """As many as there are processors to feed them, from 2 to 4."""
    return max(2, min(4, (os.cpu_count() or 2) // 2))


class TcpRung:
    """Reads over up to `streams` connections at once, kept open between reads. 0: `default_streams`."""

    name = "tcp"
    rdma = False

    def __init__(self, streams: int = 0) -> None:
        self._streams = streams or default_streams()
        self._idle: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._busy: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def probe(self, link: Link, destination_device: int) -> str:
        return ""

    def prepare(self, link: Link) -> None:
        """Nothing to do."""

    def read(self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight) -> None:
        if destination.slab.device < 0:
            self._read(link, lease, destination, flight)
            return
        library = extension.load()
        if library is None:
            raise RungFailedError("receiving into device memory needs the extension")
        with HostSlab(lease.pages.size, huge=False) as bounce:
            self._read(link, lease, Destination(bounce, (Range(0, lease.pages.size),)), flight)
            at, segments = bounce.address, []
            for offset, length in destination.ranges:
                segments.append(Segment(at, destination.slab.address + offset, length))
                at += length
            library.copy(segments, destination.slab.device)

    def _read(self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight) -> None:
        size = lease.pages.size
        count = max(1, min(self._streams, size // MIN_SHARE))
        share = -(-size // count)
        parts = [(start, min(share, size - start)) for start in range(0, size, share)]
        if len(parts) == 1:
            self._read_part(link, lease, destination, flight, *parts[0])
            return
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._streams, thread_name_prefix="loraserve-tcp")
        futures = [self._pool.submit(self._read_part, link, lease, destination, flight, *part) for part in parts[1:]]
        failures: list[BaseException] = []
        try:
            self._read_part(link, lease, destination, flight, *parts[0])
        except BaseException as error:
            failures.append(error)
        for future in futures:  # all of them, so that nobody writes to the destination after we return
            failed = future.exception()
            if failed is not None:
                failures.append(failed)
        if failures:
            raise failures[0]

    def _read_part(
        self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight, start: int, length: int
    ) -> None:
        sock = self._take(link, flight)
        try:
            self._receive(sock, lease, destination, flight, start, length)
        except BaseException:
            self._drop(sock)
            raise
        with self._lock:
            self._busy.discard(sock)
            if not self._closed:
                self._idle.put(sock)
                return
        sock.close()

    def _receive(
        self,
        sock: socket.socket,
        lease: wire.Leased,
        destination: Destination,
        flight: Flight,
        start: int,
        length: int,
    ) -> None:
        targets = slice_stream(destination.ranges, start, length)
        try:
            wire.send(sock, wire.Pull(lease=lease.lease, start=start, length=length))
            reply = wire.receive_reply(sock)
        except PeerLostError as error:
            raise RungFailedError(str(error)) from None
        if isinstance(reply, wire.Refused):
            kind = GenerationChangedError if reply.code == "revoked" else RungFailedError
            raise kind(reply.message)
        if not isinstance(reply, wire.Data) or reply.length != length:
            raise RungFailedError(f"an unexpected answer to Pull: {reply}")
        for offset, size in targets:
            view = memoryview((ctypes.c_ubyte * size).from_address(destination.slab.address + offset)).cast("B")
            got = 0
            while got < size:
                step = min(size - got, RECEIVE_PIECE)
                flight.advance(step)
                _limit_wait(sock, flight.deadline.left(5.0))
                end = got + step
                while got < end:
                    try:
                        n = sock.recv_into(view[got:end], 0, socket.MSG_WAITALL)
                    except BlockingIOError:
                        flight.check()
                        raise DeadlineError("no byte arrived for 5 s") from None
                    except OSError as error:
                        raise RungFailedError(f"a data connection broke: {error}") from None
                    if n == 0:
                        raise RungFailedError("a data connection ended early: the lease ended or the peer died")
                    got += n

    def _take(self, link: Link, flight: Flight) -> socket.socket:
        with contextlib.suppress(queue.Empty):
            sock = self._idle.get_nowait()
            with self._lock:
                self._busy.add(sock)
            return sock
        sock = open_data(link, (link.host, link.port), flight.deadline.left(link.timeout))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        _limit_wait(sock, link.timeout)
        with self._lock:
            self._busy.add(sock)
        return sock

    def _drop(self, sock: socket.socket) -> None:
        with self._lock:
            self._busy.discard(sock)
        sock.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            busy = list(self._busy)
        for sock in busy:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                break
        if self._pool is not None:
            self._pool.shutdown()


def _limit_wait(sock: socket.socket, seconds: float) -> None:
    """A receive time-out of the kernel's: unlike settimeout it leaves the socket blocking, so that
    MSG_WAITALL works."""
    whole = int(seconds)
    sock.setsockopt(
        socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", whole, max(1000, int((seconds - whole) * 1e6)))
    )
