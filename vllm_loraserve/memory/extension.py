"""The Python face of `csrc/pool`: finds the library, loads it by ctypes and gives its functions names and
errors.

ctypes releases the GIL around every call, so that copies and checksums of one thread do not hold up another.
Where the library was not built, `load()` returns None and the package goes on without it: host slabs become
plain memfd mappings, checksums are computed by numpy, and transfers use RDMA on host memory, the same host's memory and
TCP (`transfer/`). One warning says so.

Types on this page: addresses, sizes and offsets are bytes, as Python ints; a checksum is an unsigned 64-bit
int.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from vllm_loraserve import native

logger = logging.getLogger(__name__)

ABI = 2
LIBRARY = "loraserve_pool.so"
HOST = -1
"""As a device number: host memory."""


class ExtensionError(OSError):
    """A call into the extension failed; the sentence is the extension's own, `errno` its code."""


class Segment(NamedTuple):
    """One contiguous piece of a copy: `length` bytes from address `source` to address `target`."""

    source: int
    target: int
    length: int


class _Slab(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("fd", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("handle", ctypes.c_uint64),
    )


class _DmaBuf(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("base", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
    )


class DmaBuf(NamedTuple):
    """An exported range: close `fd` after registering it; the asked address lies `offset` bytes into the
    buffer."""

    fd: int
    base: int
    length: int
    offset: int


class CudaDevice(msgspec.Struct, frozen=True):
    """One GPU, as its driver describes it."""

    name: str
    bytes: int
    capability: str
    gpudirect: bool
    dma_buf: bool
    gpudirect_vmm: bool


class CudaReport(msgspec.Struct, frozen=True):
    """Whether libcuda loads, and what it drives. `driver` is 13000 for CUDA 13.0, 0 without a driver."""

    library: str
    loaded: bool
    error: str
    driver: int
    devices: tuple[CudaDevice, ...]
    dma_buf_export: bool


class VerbsDevice(msgspec.Struct, frozen=True):
    """One RDMA device; `dma_buf` is "supported" or says why it is not."""

    name: str
    dma_buf: str


class VerbsReport(msgspec.Struct, frozen=True):
    """Whether libibverbs loads, and the devices it sees."""

    library: str
    loaded: bool
    error: str
    devices: tuple[VerbsDevice, ...]


class Report(msgspec.Struct, frozen=True):
    """What the extension found on this machine."""

    abi: int
    cuda_kernels: bool
    hash: str
    cuda: CudaReport
    verbs: VerbsReport


HUGE, PINNED, POPULATE, VMM, LOCKED = 1, 2, 4, 8, 16
"""Allocation flags of `csrc/pool/pool.h`."""


class Extension:
    """The loaded library. Every method raises `ExtensionError` where the library reports a failure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        self._declare()
        found = int(self._lib.lsp_abi())
        if found != ABI:
            raise ExtensionError(f"{path} has ABI {found}, this package needs {ABI}; build the extension again")

    def _declare(self) -> None:
        u64, u32, i32, size = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int, ctypes.c_size_t
        slab, pointer = ctypes.POINTER(_Slab), ctypes.c_void_p
        signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "lsp_abi": (i32, ()),
            "lsp_error": (ctypes.c_char_p, ()),
            "lsp_probe": (size, (ctypes.c_char_p, size)),
            "lsp_host_alloc": (i32, (u64, u32, i32, slab)),
            "lsp_host_free": (i32, (slab,)),
            "lsp_device_alloc": (i32, (i32, u64, u32, slab)),
            "lsp_device_free": (i32, (slab,)),
            "lsp_dmabuf_export": (i32, (i32, u64, u64, i32, ctypes.POINTER(_DmaBuf))),
            "lsp_ipc_export": (i32, (i32, u64, ctypes.c_char_p, ctypes.POINTER(u64))),
            "lsp_ipc_open": (i32, (i32, ctypes.c_char_p, ctypes.POINTER(u64))),
            "lsp_ipc_close": (i32, (i32, u64)),
            "lsp_copy": (i32, (i32, pointer, size)),
            "lsp_gather": (i32, (i32, u64, pointer, size, u64, u64)),
            "lsp_scatter": (i32, (i32, u64, pointer, size, u64, u64)),
            "lsp_checksums": (i32, (i32, pointer, pointer, size, pointer)),
            "lsp_copy_checksums": (i32, (pointer, size, i32, pointer)),
            "lsp_send": (i32, (i32, u64, u64)),
            "lsp_recv_checksums": (i32, (i32, pointer, pointer, size, u64, u64, pointer)),
            "lsp_hash_variant": (ctypes.c_char_p, ()),
            "lsp_hash_force": (i32, (ctypes.c_char_p,)),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments

    def _check(self, code: int) -> None:
        if code < 0:
            raise ExtensionError(-code, self._lib.lsp_error().decode(errors="replace"))

    def probe(self) -> Report:
        """What this machine has. Asks the driver and the RDMA devices each time; milliseconds, more on a
        first call."""
        size = 1 << 16
        while True:
            text = ctypes.create_string_buffer(size)
            needed = self._lib.lsp_probe(text, size)
            if needed < size:
                return msgspec.json.decode(text.value, type=Report)
            size = needed + 1

    def host_alloc(self, size: int, flags: int, device: int = HOST) -> _Slab:
        """A memfd mapping of at least `size` bytes; `flags` of the result says what was granted.

        device: whose context page-locks it; HOST: the calling thread's current one, or that of the only GPU.
        """
        slab = _Slab()
        self._check(self._lib.lsp_host_alloc(size, flags, device, ctypes.byref(slab)))
        return slab

    def host_free(self, slab: _Slab) -> None:
        self._check(self._lib.lsp_host_free(ctypes.byref(slab)))

    def device_alloc(self, device: int, size: int, flags: int) -> _Slab:
        """Device memory outside torch's allocator, which RDMA may read. Raises without a GPU, or when it is
        full."""
        slab = _Slab()
        self._check(self._lib.lsp_device_alloc(device, size, flags, ctypes.byref(slab)))
        return slab

    def device_free(self, slab: _Slab) -> None:
        self._check(self._lib.lsp_device_free(ctypes.byref(slab)))

    def export_dmabuf(self, device: int, address: int, length: int, *, pcie: bool = False) -> DmaBuf:
        """A dma-buf over the allocation that holds the range, page-aligned (CUDA 11.7 and later)."""
        out = _DmaBuf()
        self._check(self._lib.lsp_dmabuf_export(device, address, length, int(pcie), ctypes.byref(out)))
        return DmaBuf(out.fd, out.base, out.length, out.offset)

    def export_ipc(self, device: int, address: int) -> tuple[bytes, int]:
        """CUDA IPC: the handle of the allocation that holds the address, and the address's offset in it."""
        handle, offset = ctypes.create_string_buffer(64), ctypes.c_uint64()
        self._check(self._lib.lsp_ipc_export(device, address, handle, ctypes.byref(offset)))
        return handle.raw, offset.value

    def open_ipc(self, device: int, handle: bytes) -> int:
        """Maps another process's allocation; the address of its first byte here."""
        if len(handle) != 64:
            raise ExtensionError(f"a CUDA IPC handle has 64 bytes, not {len(handle)}")
        base = ctypes.c_uint64()
        self._check(self._lib.lsp_ipc_open(device, handle, ctypes.byref(base)))
        return base.value

    def close_ipc(self, device: int, base: int) -> None:
        self._check(self._lib.lsp_ipc_close(device, base))

    def copy(self, segments: Sequence[Segment], device: int = HOST) -> None:
        """Copies the segments and waits for them. With a device: between any of host and device memory, on a
        stream of the extension's own; order it after the work that produced the bytes."""
        packed = _packed(segments)
        self._check(self._lib.lsp_copy(device, packed.ctypes.data, len(packed)))

    def copy_checksums(self, segments: Sequence[Segment], threads: int = 1) -> list[int]:
        """Copies host memory and returns the checksum of each segment as it arrived; one pass over memory.

        threads: how many may share a call of 8 MiB and more, segment by segment.
        """
        packed = _packed(segments)
        sums = np.empty(len(packed), np.uint64)
        self._check(self._lib.lsp_copy_checksums(packed.ctypes.data, len(packed), threads, sums.ctypes.data))
        return [int(s) for s in sums]

    def send(self, fd: int, address: int, length: int) -> None:
        """Sends host memory over a blocking socket; its SO_SNDTIMEO ends the call with errno ETIMEDOUT."""
        self._check(self._lib.lsp_send(fd, address, length))

    def receive_checksums(self, fd: int, pages: Sequence[tuple[int, int]], stall_s: float, limit_s: float) -> list[int]:
        """Receives pages (address, length) of host memory from a blocking socket; the checksum of each as it arrived.

        Raises ExtensionError with errno ETIMEDOUT where no byte came for `stall_s` or not all of them within
        `limit_s` seconds, EPIPE where the stream ended before. Sets the socket's SO_RCVTIMEO. Its `shutdown` ends the
        call from another thread.
        """
        where, long = np.array([a for a, _ in pages], np.uint64), np.array([n for _, n in pages], np.uint64)
        sums = np.empty(len(pages), np.uint64)
        waits = (max(1, int(stall_s * 1e3)), max(1, int(limit_s * 1e3)))
        self._check(
            self._lib.lsp_recv_checksums(fd, where.ctypes.data, long.ctypes.data, len(pages), *waits, sums.ctypes.data)
        )
        return [int(s) for s in sums]

    def checksums(self, addresses: Sequence[int], lengths: Sequence[int], device: int = HOST) -> list[int]:
        """The checksum of each (address, length); the algorithm is `memory/checksum.py`'s and
        `csrc/pool/page_hash.h`'s."""
        if len(addresses) != len(lengths):
            raise ValueError(f"{len(addresses)} addresses but {len(lengths)} lengths")
        where, long, sums = (
            np.array(addresses, np.uint64),
            np.array(lengths, np.uint64),
            np.empty(len(lengths), np.uint64),
        )
        self._check(self._lib.lsp_checksums(device, where.ctypes.data, long.ctypes.data, len(where), sums.ctypes.data))
        return [int(s) for s in sums]

    def gather(self, base: int, pages: Sequence[int], page_bytes: int, out: int, device: int = HOST) -> None:
        """Page `pages[i]` of the memory at `base` goes to row i at `out`; `page_bytes` and
        the addresses are multiples of 16."""
        table = np.array(pages, np.int64)
        self._check(self._lib.lsp_gather(device, base, table.ctypes.data, len(table), page_bytes, out))

    def scatter(self, rows: int, pages: Sequence[int], page_bytes: int, base: int, device: int = HOST) -> None:
        """Row i at `rows` goes to page `pages[i]` of the memory at `base`."""
        table = np.array(pages, np.int64)
        self._check(self._lib.lsp_scatter(device, rows, table.ctypes.data, len(table), page_bytes, base))

    @property
    def hash_variant(self) -> str:
        """Which implementation of the checksum the CPU runs: avx512, avx2 or scalar."""
        return str(self._lib.lsp_hash_variant().decode())

    def force_hash_variant(self, name: str) -> None:
        """For tests: picks an implementation; raises where this CPU cannot run it."""
        self._check(self._lib.lsp_hash_force(name.encode()))


def _packed(segments: Sequence[Segment]) -> np.ndarray:
    return np.array(segments, np.uint64).reshape(-1, 3)


def library_path() -> Path:
    """Where the library is looked for; `LORASERVE_POOL_LIBRARY` names another file."""
    return native.library_path(LIBRARY, "LORASERVE_POOL_LIBRARY")


_warned = threading.Event()


@functools.cache
def _load(path: Path) -> tuple[Extension | None, str]:
    if not path.exists():
        return None, f"{path} does not exist (the extension was not built)"
    try:
        return Extension(path), ""
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"


def load() -> Extension | None:
    """The extension, or None where it is missing; the first None is logged as one warning."""
    extension, why = _load(library_path())
    if extension is None and not _warned.is_set():
        _warned.set()
        logger.warning(
            "The pool extension is not available: %s. Without it there are no device slabs, no page-locked memory and "
            "no GPUDirect, and checksums are slow; adapters still move between instances by RDMA on host memory, by "
            "mapping on one host and by TCP. docs/development.md says how to build it.",
            why,
        )
    return extension


def missing_reason() -> str:
    """Why `load()` gives None, as one clause; empty where it loads."""
    return _load(library_path())[1]


def describe(report: Report) -> str:
    """The report as JSON, for logs."""
    return json.dumps(msgspec.to_builtins(report))
