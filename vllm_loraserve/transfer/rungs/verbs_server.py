"""The serving side of RDMA: a protection domain and a queue pair per peer, memory registered per lease.

An rkey opens memory to queue pairs of its own protection domain only. A domain per peer and a registration per lease
make a key useless to anybody else, and useless to its holder once the lease has ended: the device itself refuses.
Registered for remote reading, never for writing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from vllm_loraserve.memory.slab import Slab
from vllm_loraserve.transfer.errors import RungFailedError
from vllm_loraserve.transfer.pages import Range
from vllm_loraserve.transfer.rungs.verbs_device import (
    Connection,
    Registration,
    VerbsDevice,
    gpudirect_reason,
    open_device,
)
from vllm_loraserve.transfer.wire import ConnectQueuePair, QueuePair, RemoteRange


class VerbsSession:
    """One peer's queue pair here."""

    def __init__(self, device: VerbsDevice, request: ConnectQueuePair) -> None:
        self._device = device
        self._enums = device.pv.enums
        self._lock = threading.Lock()
        self._live: set[Registration] = set()
        self._closed = False
        self._pd = device.pv.pd.PD(device.context)
        self._connection: Connection | None = None
        try:
            self._connection = Connection(device, self._pd, depth=1)
            self._connection.connect(
                request.number,
                request.gid,
                request.psn,
                request.lid,
                request.mtu,
                self._enums.IBV_ACCESS_REMOTE_READ,
                device.max_reads,
            )
        except BaseException:
            self.close()
            raise
        self.answer = QueuePair(
            number=self._connection.number,
            gid=device.gid,
            psn=self._connection.psn,
            lid=device.lid,
            mtu=device.mtu,
            max_reads=device.max_reads,
        )

    def register(self, slab: Slab, ranges: Sequence[Range]) -> tuple[tuple[RemoteRange, ...], Callable[[], None]]:
        """Opens the ranges to this peer; (what the peer needs to read them, what takes it back)."""
        with self._lock:
            if self._closed:
                raise RungFailedError("the session is closing")
            access = self._enums.IBV_ACCESS_LOCAL_WRITE | self._enums.IBV_ACCESS_REMOTE_READ
            registration = Registration(self._device, self._pd, slab, ranges, access)
            self._live.add(registration)
        return tuple(registration.remote), lambda: self._deregister(registration)

    def _deregister(self, registration: Registration) -> None:
        with self._lock:
            self._live.discard(registration)
            registration.close()

    def close(self) -> None:
        """Ends the queue pair and every registration. Twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._connection is not None:
                self._connection.close()
            while self._live:
                self._live.pop().close()
            with contextlib.suppress(Exception):
                self._pd.close()


class VerbsServer:
    """The device that peers read from, or the reason why there is none."""

    def __init__(self, device: VerbsDevice | None, reason: str) -> None:
        self._device, self.reason = device, reason
        self._gpudirect: str | None = None

    @classmethod
    def find(cls, choice: str) -> VerbsServer:
        """ "auto", "off", or a device's name."""
        return cls(*open_device(choice))

    def gpudirect_reason(self, slabs: Sequence[Slab]) -> str:
        """Empty where the device slabs among these can be read by RDMA, else why not."""
        if all(slab.device < 0 for slab in slabs):
            return "no device memory is served"
        if self._gpudirect is None:
            self._gpudirect = gpudirect_reason(self._device)
        return self._gpudirect

    def connect(self, request: ConnectQueuePair) -> VerbsSession:
        """A queue pair for this peer. Raises RungFailedError where it cannot be made."""
        if self._device is None:
            raise RungFailedError(f"no RDMA here: {self.reason}")
        try:
            return VerbsSession(self._device, request)
        except self._device.pv.pyverbs_error.PyverbsError as error:
            raise RungFailedError(f"{self._device.name}: {error}") from None

    def close(self) -> None:
        if self._device is not None:
            with contextlib.suppress(Exception):
                self._device.close()
            self._device = None
