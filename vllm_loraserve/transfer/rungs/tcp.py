"""The last rung: TCP, several streams, received straight into the destination.

The sender hands the slab's memfd to sendfile, so that its side copies nothing; the receiver's recv_into is
then the one copy there is. Each stream takes a contiguous share of the page stream. Device memory takes a
detour over a host buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import queue
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

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
from vllm_loraserve.transfer.pages import AdapterPages, Destination, Range, page_offsets, slice_stream
from vllm_loraserve.transfer.rungs.base import Link

SEND_PIECE = 4 << 20
SEND_BLOCK = 256 << 10
RECEIVE_PIECE = 4 << 20
"""Bytes between two looks at cancellation and bandwidth, or one page where that is more."""
MIN_SHARE = 1 << 20
"""Below this many bytes a stream is not worth its request."""
STALL_S = 5.0
"""A stream on which nothing arrives for so long is given up."""


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
    """Sends one piece of a slab: to another host by sendfile, where a file is behind it, so that nothing is copied
    here.

    On one host the reader's copy pays for what the sender saves (its source is then cold memory, page by page), and
    plain sends of cache-sized blocks take less of the processors in sum.
    """
    if slab.device >= 0:
        _send_from_device(sock, slab, piece)
        return
    if slab.fd >= 0 and not _same_host(sock):
        offset, left = piece
        while left:
            sent = os.sendfile(sock.fileno(), slab.fd, offset, left)
            if sent == 0:
                raise PeerLostError("the reader closed the connection")
            offset, left = offset + sent, left - sent
        return
    library = extension.load()
    if library is not None:
        library.send(sock.fileno(), slab.address + piece.offset, piece.length)
        return
    view = memoryview((ctypes.c_ubyte * piece.length).from_address(slab.address + piece.offset)).cast("B")
    for start in range(0, piece.length, SEND_BLOCK):
        sock.sendall(view[start : start + SEND_BLOCK])


def _same_host(sock: socket.socket) -> bool:
    return bool(sock.getsockname()[0] == sock.getpeername()[0])


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
        deadline = wire.Deadline(timeout)
        prove_as_client(sock, link.key, deadline)
        wire.send(sock, wire.Attach(session=link.welcome.session))
        reply = wire.receive_reply(sock, deadline)
        sock.settimeout(timeout)
        if not isinstance(reply, wire.Done):
            raise RungFailedError(f"no data connection: {reply}")
    except (OSError, PeerLostError, DeadlineError) as error:
        sock.close()
        raise RungFailedError(f"no data connection: {error}") from None
    except BaseException:
        sock.close()
        raise
    return sock


class Part(NamedTuple):
    """What one stream brings: whole pages, `start` bytes into the page stream. Pages are (address here, length)."""

    start: int
    pages: list[tuple[int, int]]

    @property
    def size(self) -> int:
        return sum(length for _, length in self.pages)

    def runs(self) -> Iterator[list[tuple[int, int]]]:
        """Pages that together are no more than a piece (or a single page)."""
        run: list[tuple[int, int]] = []
        held = 0
        for address, length in self.pages:
            if run and held + length > RECEIVE_PIECE:
                yield run
                run, held = [], 0
            run.append((address, length))
            held += length
        if run:
            yield run


def cut_parts(page_lengths: Sequence[int], destination: Destination, streams: int) -> list[Part]:
    """The page stream in up to `streams` parts of about the same size, none much below MIN_SHARE."""
    size = sum(page_lengths)
    share = max(-(-size // streams), MIN_SHARE)
    parts: list[Part] = []
    at = held = 0
    for offset, length in zip(page_offsets(page_lengths, destination.ranges), page_lengths, strict=True):
        if not parts or held >= share:
            parts.append(Part(at, []))
            held = 0
        parts[-1].pages.append((destination.slab.address + offset, length))
        at, held = at + length, held + length
    return parts


def _receive_piece(sock: socket.socket, address: int, size: int, flight: Flight) -> None:
    """`size` bytes to `address`; blocks without the GIL."""
    view = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
    _limit_wait(sock, flight.deadline.left(STALL_S))
    got = 0
    while got < size:
        try:
            n = sock.recv_into(view[got:], 0, socket.MSG_WAITALL)
        except BlockingIOError:
            flight.check()
            raise DeadlineError(f"no byte arrived for {STALL_S:.0f} s") from None
        except OSError as error:
            raise RungFailedError(f"a data connection broke: {error}") from None
        if n == 0:
            raise RungFailedError("a data connection ended early: the lease ended or the peer died")
        got += n


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

    def tend(self) -> None:
        """Nothing to do."""

    def read(self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight) -> list[int] | None:
        if destination.slab.device < 0:
            return self._read(link, lease, destination, flight)
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
        return None  # what counts is what is on the device now

    def _read(self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight) -> list[int] | None:
        parts = cut_parts(lease.pages.page_lengths, destination, self._streams)
        if len(parts) == 1:
            return self._read_part(link, lease, parts[0], flight)
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._streams, thread_name_prefix="loraserve-tcp")
        futures = [self._pool.submit(self._read_part, link, lease, part, flight) for part in parts[1:]]
        failures: list[BaseException] = []
        sums: list[list[int] | None] = []
        try:
            sums.append(self._read_part(link, lease, parts[0], flight))
        except BaseException as error:
            failures.append(error)
        for future in futures:  # all of them, so that nobody writes to the destination after we return
            try:
                sums.append(future.result())
            except BaseException as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return [s for part in sums if part for s in part] if all(part is not None for part in sums) else None

    def _read_part(self, link: Link, lease: wire.Leased, part: Part, flight: Flight) -> list[int] | None:
        sock, kept = self._take(link, flight)
        try:
            try:
                self._pull(sock, lease, part)
            except RungFailedError:
                if not kept:
                    raise
                # The source may have closed a connection that lay idle; a fresh one tells whether there is more to it.
                self._drop(sock)
                sock, _ = self._take(link, flight, fresh=True)
                self._pull(sock, lease, part)
            sums = self._receive(sock, part, flight)
        except BaseException:
            self._drop(sock)
            raise
        with self._lock:
            self._busy.discard(sock)
            if not self._closed:
                self._idle.put(sock)
                return sums
        sock.close()
        return sums

    def _pull(self, sock: socket.socket, lease: wire.Leased, part: Part) -> None:
        """Asks for the part; on return its bytes follow."""
        try:
            wire.send(sock, wire.Pull(lease=lease.lease, start=part.start, length=part.size))
            reply = wire.receive_reply(sock)
        except PeerLostError as error:
            raise RungFailedError(str(error)) from None
        if isinstance(reply, wire.Refused):
            kind = GenerationChangedError if reply.code == "revoked" else RungFailedError
            raise kind(reply.message)
        if not isinstance(reply, wire.Data) or reply.length != part.size:
            raise RungFailedError(f"an unexpected answer to Pull: {reply}")

    def _receive(self, sock: socket.socket, part: Part, flight: Flight) -> list[int] | None:
        """The part's pages, and their checksums, taken while the bytes are still in the cache."""
        library = extension.load()
        sums: list[int] = []
        for run in part.runs():
            flight.advance(sum(length for _, length in run))
            if library is None:
                for address, length in run:
                    _receive_piece(sock, address, length, flight)
                continue
            try:
                sums += library.receive_checksums(sock.fileno(), run, STALL_S, flight.deadline.left())
            except extension.ExtensionError as error:
                if error.errno == errno.ETIMEDOUT:
                    flight.check()
                    raise DeadlineError(f"no byte arrived for {STALL_S:.0f} s") from None
                raise RungFailedError(f"a data connection broke: {error.strerror}") from None
        return sums if library is not None else None

    def _take(self, link: Link, flight: Flight, *, fresh: bool = False) -> tuple[socket.socket, bool]:
        """A connection, and whether it was kept from an earlier read."""
        while not self._idle.empty():
            with contextlib.suppress(queue.Empty):
                sock = self._idle.get_nowait()
                if fresh:
                    sock.close()  # as old as the one that failed
                    continue
                with self._lock:
                    self._busy.add(sock)
                return sock, True
        sock = open_data(link, (link.host, link.port), flight.deadline.left(link.timeout))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        _limit_wait(sock, link.timeout)
        with self._lock:
            self._busy.add(sock)
        return sock, False

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
