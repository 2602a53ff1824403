"""The rung between processes of one host: map the peer's slab, then copy; one copy, no socket.

Host memory travels as a memfd over an authenticated Unix socket (SCM_RIGHTS), opened read-only on the way, so
that a reader cannot write into the owner's slab. Device memory travels as a CUDA IPC handle. The mapping is
kept while the peer is connected; what may be read, and until when, is still what the lease says: the
generation is checked after the copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import threading
from collections.abc import Iterator

import numpy as np

from vllm_loraserve.memory import extension
from vllm_loraserve.memory.extension import Segment
from vllm_loraserve.memory.prefault import populate
from vllm_loraserve.memory.slab import Slab
from vllm_loraserve.transfer import wire
from vllm_loraserve.transfer.errors import PeerLostError, RungFailedError, TransferError
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.pages import Destination, Piece, Range, match, page_offsets
from vllm_loraserve.transfer.rungs.base import Link
from vllm_loraserve.transfer.rungs.tcp import open_data

MAP_AHEAD = 4 << 20
"""Bytes that are mapped ahead in one go."""
PIECE = 64 << 20
"""Bytes between two looks at deadline, cancellation and bandwidth: some milliseconds of copying. Threads of a copy
begin and end with each."""


def copy_threads() -> int:
    """Threads of a large copy: two where a processor is idle now. One alone does not fill the memory bus, but of two
    the slower one would wait for a processor that a running step has; a third brings little."""
    processors = len(os.sched_getaffinity(0))
    try:
        with open("/proc/loadavg") as file:
            running = int(file.read().split()[3].split("/")[0])  # threads of the whole system, this one included
    except (OSError, ValueError, IndexError):
        running = processors
    return 2 if running < processors else 1


# ---- the serving side ----


def describe(slab: Slab, same_host: bool) -> wire.SlabInfo:
    """What a peer needs to know of a slab; the CUDA IPC handle goes to processes of this host only."""
    if slab.device >= 0 and same_host:
        library = extension.load()
        with contextlib.suppress(extension.ExtensionError):  # VMM memory has no legacy handle
            if library is not None:
                handle, offset = library.export_ipc(slab.device, slab.address)
                return wire.SlabInfo(size=slab.size, device=slab.device, ipc=handle, ipc_offset=offset)
    return wire.SlabInfo(size=slab.size, device=slab.device)


def send_memory(sock: socket.socket, slab: Slab) -> None:
    """Sends a read-only descriptor of the slab's memfd."""
    fd = os.open(f"/proc/self/fd/{slab.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        wire.send(sock, wire.Done())
        socket.send_fds(sock, [b"\0"], [fd])
    finally:
        os.close(fd)


# ---- the reading side ----


class _Mapping:
    """A peer's slab in our address space, read-only.

    The first read of each page would have to map it, which takes longer than to copy it; so `tend` maps ahead what the
    peer has filled since, on a thread of low priority. What the peer never touched stays so: to map that would take its
    memory.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._size = os.dup(fd), size
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self.address = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        self._lock = threading.Lock()
        self._open = True
        self._thread: threading.Thread | None = None
        self._mapped: set[int] = set()
        """Blocks of MAP_AHEAD bytes."""

    def tend(self) -> None:
        """Maps what has been filled, aside; returns at once."""
        with self._lock, contextlib.suppress(RuntimeError):  # no thread to be had: each read maps what it needs
            if self._open and self._thread is None:
                thread = threading.Thread(target=self._map_ahead, name="loraserve-map", daemon=True)
                thread.start()
                self._thread = thread

    def settle(self, timeout: float | None = None) -> None:
        """Waits for the thread, if one runs."""
        if (thread := self._thread) is not None:
            thread.join(timeout)

    def _map_ahead(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            for block in self._filled():
                with self._lock:
                    if not self._open:
                        return
                    if not populate(self.address + block * MAP_AHEAD, MAP_AHEAD, write=False):
                        self._mapped.update(range(self._size // MAP_AHEAD))  # not with this kernel
                        return
                    self._mapped.add(block)
        finally:
            with self._lock:
                self._thread = None

    def _filled(self) -> Iterator[int]:
        """Blocks that hold data all over and are not mapped."""
        end = 0
        while True:
            with self._lock:
                try:
                    if not self._open:
                        return
                    start = os.lseek(self._fd, end, os.SEEK_DATA)
                    end = os.lseek(self._fd, start, os.SEEK_HOLE)
                except OSError:  # no data from here on
                    return
            for block in range(-(-start // MAP_AHEAD), min(end, self._size) // MAP_AHEAD):
                if block not in self._mapped:
                    yield block

    def close(self) -> None:
        with self._lock:
            self._open = False
            os.close(self._fd)
            self._map.close()


class MemfdRung:
    """Copies out of the peer's mapped memfd; checksums are computed on the way where the extension is built.

    threads: of a copy of 8 MiB and more; 0: `copy_threads`, each time.
    """

    name = "memfd"
    rdma = False

    def __init__(self, threads: int = 0) -> None:
        self._threads = threads
        self._mappings: dict[int, _Mapping] = {}
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False

    def probe(self, link: Link, destination_device: int) -> str:
        if not link.welcome.unix:
            return "the peer is on another host, or offers no mapping"
        if destination_device >= 0 and extension.load() is None:
            return "copying to device memory needs the extension"
        if all(slab.device >= 0 for slab in link.welcome.slabs):
            return "the peer serves device memory only"
        try:
            first = next(i for i, slab in enumerate(link.welcome.slabs) if slab.device < 0)
            self._mapping(link, first)
        except (TransferError, OSError) as error:
            return f"its memory cannot be mapped: {error}"
        return ""

    def _mapping(self, link: Link, index: int) -> _Mapping:
        with self._lock:
            if self._closed:
                raise RungFailedError("the peer is being disconnected")
            found = self._mappings.get(index)
            if found is not None:
                return found
            sock = open_data(link, "\0" + link.welcome.unix, link.timeout)
            try:
                wire.send(sock, wire.GetMemory(slab=index))
                reply = wire.receive_reply(sock)
                if not isinstance(reply, wire.Done):
                    raise RungFailedError(f"the peer does not share its memory: {reply}")
                _, fds, _, _ = socket.recv_fds(sock, 1, 1)
            finally:
                sock.close()
            if len(fds) != 1:
                raise PeerLostError("the peer sent no memory")
            try:
                size = link.welcome.slabs[index].size
                if os.fstat(fds[0]).st_size < size:
                    raise RungFailedError("the peer's memory is smaller than it said")
                found = self._mappings[index] = _Mapping(fds[0], size)
                found.tend()
            finally:
                os.close(fds[0])
            return found

    def prepare(self, link: Link) -> None:
        """Nothing to do."""

    def tend(self) -> None:
        with self._lock:
            mappings = list(self._mappings.values())
        for mapping in mappings:
            mapping.tend()

    def read(self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight) -> list[int] | None:
        if link.welcome.slabs[lease.slab].device >= 0:
            raise RungFailedError("the adapter is in the peer's device memory")
        mapping = self._mapping(link, lease.slab)
        with self._lock:
            if self._closed:
                raise RungFailedError("the peer is being disconnected")
            self._users += 1
        try:
            return _copy(mapping.address, lease, destination, flight, self._threads or copy_threads())
        finally:
            with self._lock:
                self._users -= 1
                if self._closed and not self._users:
                    self._unmap()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if not self._users:
                self._unmap()

    def _unmap(self) -> None:
        for mapping in self._mappings.values():
            mapping.close()
        self._mappings.clear()


def _copy(base: int, lease: wire.Leased, destination: Destination, flight: Flight, threads: int) -> list[int] | None:
    library = extension.load()
    pages = lease.pages
    if library is None or destination.slab.device >= 0:
        for piece in match(pages.ranges, destination.ranges, PIECE):
            flight.advance(piece.length)
            if library is None:
                ctypes.memmove(destination.slab.address + piece.target, base + piece.source, piece.length)
            else:
                library.copy([_segment(base, destination, piece)], destination.slab.device)
        return None
    # Page by page, so that each page's checksum falls out of its copy.
    sums: list[int] = []
    batch: list[Segment] = []
    held = 0
    offsets = zip(
        page_offsets(pages.page_lengths, pages.ranges),
        page_offsets(pages.page_lengths, destination.ranges),
        pages.page_lengths,
        strict=True,
    )
    for source, target, length in offsets:
        batch.append(Segment(base + source, destination.slab.address + target, length))
        held += length
        if held >= PIECE:
            flight.advance(held)
            sums += library.copy_checksums(batch, threads)
            batch, held = [], 0
    if batch:
        flight.advance(held)
        sums += library.copy_checksums(batch, threads)
    return sums


def _segment(base: int, destination: Destination, piece: Piece) -> Segment:
    return Segment(base + piece.source, destination.slab.address + piece.target, piece.length)


class CudaIpcRung:
    """Device to device (or to host) between processes that share a GPU host, through a CUDA IPC mapping."""

    name = "cuda_ipc"
    rdma = False

    def __init__(self) -> None:
        self._bases: dict[int, tuple[int, int]] = {}
        """Slab index -> (device, mapped base)."""
        self._lock = threading.Lock()

    def probe(self, link: Link, destination_device: int) -> str:
        if not link.welcome.unix:
            return "the peer is on another host, or offers no mapping"
        if extension.load() is None:
            return "the extension is not built"
        if not any(slab.ipc for slab in link.welcome.slabs):
            return "the peer has no device memory that CUDA IPC can share"
        try:
            index = next(i for i, slab in enumerate(link.welcome.slabs) if slab.ipc)
            self._base(link, index, destination_device)
        except extension.ExtensionError as error:
            return f"CUDA IPC: {error}"
        return ""

    def _base(self, link: Link, index: int, destination_device: int) -> int:
        library = extension.load()
        assert library is not None
        slab = link.welcome.slabs[index]
        with self._lock:
            if index not in self._bases:
                device = destination_device if destination_device >= 0 else slab.device
                self._bases[index] = (device, library.open_ipc(device, slab.ipc))
            return self._bases[index][1] + slab.ipc_offset

    def prepare(self, link: Link) -> None:
        """Nothing to do."""

    def tend(self) -> None:
        """Nothing to do."""

    def read(self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight) -> None:
        library = extension.load()
        slab = link.welcome.slabs[lease.slab]
        if library is None or not slab.ipc:
            raise RungFailedError("the adapter is not in device memory that CUDA IPC shares")
        device = destination.slab.device if destination.slab.device >= 0 else slab.device
        try:
            base = self._base(link, lease.slab, destination.slab.device)
            for piece in match(lease.pages.ranges, destination.ranges, 32 << 20):
                flight.advance(piece.length)
                library.copy([_segment(base, destination, piece)], device)
        except extension.ExtensionError as error:
            raise RungFailedError(f"CUDA IPC: {error}") from None

    def close(self) -> None:
        library = extension.load()
        with self._lock:
            for device, base in self._bases.values():
                with contextlib.suppress(extension.ExtensionError):
                    if library is not None:
                        library.close_ipc(device, base)
            self._bases.clear()


__all__ = ["CudaIpcRung", "MemfdRung", "Range", "describe", "send_memory"]
