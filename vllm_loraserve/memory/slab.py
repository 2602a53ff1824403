"""A slab: the one allocation that holds a worker's adapter pages, in host or in device memory.

A slab is what RDMA registers and what a process on the same host maps, so it is made by the extension (a
memfd with page-locked, huge pages where there are any; or device memory outside torch's allocator). Without
the extension a host slab is a plain memfd mapping, which TCP and same-host transfers can serve just as well.

What is in the slab (pages, adapters, who may be evicted) is the business of the page allocator, not of this
module.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Any, Protocol

import numpy as np

from vllm_loraserve.memory import extension
from vllm_loraserve.memory.extension import ExtensionError


class Slab(Protocol):
    """What `transfer/` needs of a slab. `device` is -1 for host memory; `fd` is the memfd behind it, or
    -1."""

    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def fd(self) -> int: ...


class HostSlab:
    """Host memory of `size` bytes (rounded up to whole pages), all zero, shared as a memfd.

    huge: 2 MiB pages where the system has some reserved. pinned: page-locked and known to CUDA, where there
    is a GPU: in the context of device `gpu`; None: in the calling thread's current one, or that of the only GPU.
    populate: touch every page now, so that the first fetch does not pay for it. What was granted: `granted`.
    Sealed: nobody can change its size under a process that maps it.
    """

    device = extension.HOST

    def __init__(
        self, size: int, *, huge: bool = True, pinned: bool = True, populate: bool = False, gpu: int | None = None
    ) -> None:
        if size <= 0:
            raise ValueError(f"a host slab needs a size above 0 bytes, not {size}")
        self._library = extension.load()
        self._map: mmap.mmap | None = None
        if self._library is not None:
            flags = extension.HUGE * huge | extension.PINNED * pinned | extension.POPULATE * populate
            self._raw = self._library.host_alloc(size, flags, extension.HOST if gpu is None else gpu)
            self.address, self.size, self.fd = self._raw.address, self._raw.size, self._raw.fd
            self.granted = self._raw.flags
        else:
            self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            self.fd = os.memfd_create("loraserve-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, self.size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._map = mmap.mmap(self.fd, self.size, access=mmap.ACCESS_WRITE)
            if populate:
                self._map[:: mmap.PAGESIZE] = bytes(self.size // mmap.PAGESIZE)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
            self.granted = extension.POPULATE * populate
        self._open = True

    def view(self, offset: int = 0, length: int | None = None) -> memoryview:
        """Writable bytes of the slab, without a copy. The caller drops it before `close`."""
        length = self.size - offset if length is None else length
        check_range(self, offset, length)
        return memoryview((ctypes.c_ubyte * length).from_address(self.address + offset)).cast("B")

    def array(self) -> np.ndarray:
        """The slab as numpy uint8 of shape (size,), without a copy; `torch.from_numpy` takes it as it is."""
        return np.frombuffer(self.view(), np.uint8)

    def close(self) -> None:
        """Gives the memory back. Views and arrays taken before must no longer be used. Twice is harmless."""
        if not self._open:
            return
        self._open = False
        if self._library is not None:
            self._library.host_free(self._raw)
        else:
            self._map = None  # unmapped with the last reference
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> HostSlab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DeviceSlab:
    """Device memory of `size` bytes (rounded up to 2 MiB) that GPUDirect RDMA may read; contents undefined.

    vmm: cuMemCreate with the GPUDirect flag instead of cuMemAlloc (not shareable by legacy CUDA IPC).
    Raises `ExtensionError` without the extension, without a GPU, or when the device is full.
    """

    fd = -1

    def __init__(self, size: int, device: int = 0, *, vmm: bool = False) -> None:
        library = extension.load()
        if library is None:
            raise ExtensionError(f"a device slab needs the extension: {extension.missing_reason()}")
        if size <= 0:
            raise ValueError(f"a device slab needs a size above 0 bytes, not {size}")
        self._library = library
        self._raw = library.device_alloc(device, size, extension.VMM * vmm)
        self.address, self.size, self.device, self.granted = (
            self._raw.address,
            self._raw.size,
            device,
            self._raw.flags,
        )
        self._open = True

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """`torch.as_tensor(slab, device="cuda")` views the slab as uint8 of shape (size,), without a copy."""
        return {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
            "strides": None,
        }

    def close(self) -> None:
        """Gives the memory back; registrations and exports of it must be gone. Twice is harmless."""
        if self._open:
            self._open = False
            self._library.device_free(self._raw)

    def __enter__(self) -> DeviceSlab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_range(slab: Slab, offset: int, length: int) -> None:
    """Raises ValueError where the range is not inside the slab."""
    if offset < 0 or length < 0 or offset + length > slab.size:
        raise ValueError(f"range [{offset}, {offset + length}) is outside the slab of {slab.size} bytes")
