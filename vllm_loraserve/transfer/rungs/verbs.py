"""The RDMA rungs: one-sided READs of large contiguous pieces, many in flight, straight into the destination.

`VerbsRung("host")` reads host memory, `VerbsRung("gpudirect")` where either end is device memory. Waiting is
for three things at once: a completion, the death of the peer (the control connection hangs up), the deadline.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

from vllm_loraserve.memory.slab import Slab
from vllm_loraserve.transfer import wire
from vllm_loraserve.transfer.errors import PeerLostError, RungFailedError, TransferError
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.pages import Destination, Range, match
from vllm_loraserve.transfer.rungs.base import Link
from vllm_loraserve.transfer.rungs.verbs_device import (
    Connection,
    Registration,
    VerbsDevice,
    gpudirect_reason,
    open_device,
)

PIECE = 1 << 20
"""Bytes of one READ."""
SIGNALLED = 4
"""Of so many READs one says that it is done, and so are those before it: each that does wakes the reader."""
READ_S = 10.0
"""Without any completion for so long, the READs in flight are given up."""


class LocalDevice:
    """Our side of all RDMA reads of a process: the device, one protection domain, destinations registered
    once.

    The destination is registered for local writing only, so that sharing the domain opens nothing to any
    peer.
    """

    def __init__(self, choice: str = "auto") -> None:
        self._choice = choice
        self._lock = threading.Lock()
        self._opened = False
        self.device: VerbsDevice | None = None
        self.reason = ""
        self.pd: Any = None
        self._slabs: dict[tuple[int, int], Registration] = {}

    def open(self) -> str:
        """Opens the device once; the reason where that failed."""
        with self._lock:
            if not self._opened:
                self._opened = True
                self.device, self.reason = open_device(self._choice)
                if self.device is not None:
                    self.pd = self.device.pv.pd.PD(self.device.context)
            return self.reason

    def register(self, slab: Slab) -> tuple[int, int]:
        """(address of the slab's first byte for scatter entries, lkey)."""
        assert self.device is not None
        with self._lock:
            key = (slab.address, slab.size)
            if key not in self._slabs:
                access = self.device.pv.enums.IBV_ACCESS_LOCAL_WRITE
                self._slabs[key] = Registration(self.device, self.pd, slab, [Range(0, slab.size)], access)
            return self._slabs[key].local[0]

    def forget(self, slab: Slab) -> None:
        """Deregisters a slab that is about to be freed."""
        with self._lock:
            registration = self._slabs.pop((slab.address, slab.size), None)
            if registration is not None:
                registration.close()

    def close(self) -> None:
        """After every connection is closed. Twice is harmless."""
        with self._lock:
            while self._slabs:
                self._slabs.popitem()[1].close()
            if self.device is not None:
                with contextlib.suppress(Exception):
                    self.pd.close()
                    self.device.close()
                self.device = None


class VerbsRung:
    """RDMA READ between us and one peer."""

    rdma = True

    def __init__(self, local: LocalDevice, memory: Literal["host", "gpudirect"]) -> None:
        self.name = "verbs" if memory == "host" else "verbs_gpudirect"
        self._local, self._memory = local, memory
        self._connection: Connection | None = None
        self._reads = 1
        self._lock = threading.Lock()
        """One reader at a time on the queue pair."""

    def probe(self, link: Link, destination_device: int) -> str:
        if link.welcome.verbs:
            return f"the peer: {link.welcome.verbs}"
        if reason := self._local.open():
            return f"here: {reason}"
        remote = any(slab.device >= 0 for slab in link.welcome.slabs)
        if self._memory == "host" and destination_device >= 0:
            return "the destination is device memory"
        if self._memory == "host" and all(slab.device >= 0 for slab in link.welcome.slabs):
            return "the peer serves device memory only"
        if self._memory == "gpudirect":
            if destination_device < 0 and not remote:
                return "neither end is device memory"
            if remote and link.welcome.gpudirect:
                return f"the peer: {link.welcome.gpudirect}"
            if destination_device >= 0 and (reason := gpudirect_reason(self._local.device)):
                return f"here: {reason}"
        try:
            self.prepare(link)
        except TransferError as error:
            return str(error)
        return ""

    def prepare(self, link: Link) -> None:
        if self._connection is None:  # else a read that is under way has the lock, maybe for long
            with self._lock:
                self._connect(link)

    def _connect(self, link: Link) -> Connection:
        if self._connection is not None:
            return self._connection
        device = self._local.device
        if device is None:
            raise RungFailedError(self._local.reason or "the RDMA device is closed")
        try:
            connection = Connection(device, self._local.pd, depth=2 * device.max_reads)
        except device.pv.pyverbs_error.PyverbsError as error:
            raise RungFailedError(f"{device.name}: {error}") from None
        try:
            reply = link.ask(
                wire.ConnectQueuePair(
                    number=connection.number, gid=device.gid, psn=connection.psn, lid=device.lid, mtu=device.mtu
                )
            )
            if not isinstance(reply, wire.QueuePair):
                raise RungFailedError(f"the peer made no queue pair: {reply}")
            self._reads = min(device.max_reads, reply.max_reads)
            connection.connect(reply.number, reply.gid, reply.psn, reply.lid, reply.mtu, 0, self._reads)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def tend(self) -> None:
        """Nothing to do."""

    def read(self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight) -> None:
        if len(lease.remote) != len(lease.pages.ranges):
            raise RungFailedError("the lease came without registered memory")
        base, lkey = self._local.register(destination.slab)
        pieces = []
        for piece in match([Range(r.address, r.length) for r in lease.remote], destination.ranges, PIECE):
            rkey = next(r.rkey for r in lease.remote if r.address <= piece.source < r.address + r.length)
            pieces.append((piece.source, rkey, base + piece.target, lkey, piece.length))
        with flight.holding(self._lock):
            connection = self._connect(link)
            try:
                self._read(link, connection, pieces, flight)
            except BaseException:
                # READs may still be in flight into the destination: only a destroyed queue pair is sure to
                # write no more.
                connection.close()
                self._connection = None
                raise

    def _read(
        self, link: Link, connection: Connection, pieces: Sequence[tuple[int, int, int, int, int]], flight: Flight
    ) -> None:
        every = min(SIGNALLED, self._reads)  # so that at least one of those in flight will say so
        posted = done = 0
        while done < len(pieces):
            while posted < len(pieces) and posted - done < 2 * self._reads:
                flight.advance(pieces[posted][4])
                posted += 1
                self._post(connection, posted, posted % every == 0 or posted == len(pieces), *pieces[posted - 1])
            done = self._collect(link, connection, flight)

    def _post(
        self,
        connection: Connection,
        number: int,
        signalled: bool,
        remote: int,
        rkey: int,
        local: int,
        lkey: int,
        length: int,
    ) -> None:
        pv = connection.device.pv
        entry = pv.wr.SGE(local, length, lkey)
        request = pv.wr.SendWR(
            wr_id=number,
            num_sge=1,
            sg=[entry],
            opcode=pv.enums.IBV_WR_RDMA_READ,
            send_flags=pv.enums.IBV_SEND_SIGNALED if signalled else 0,
        )
        request.set_wr_rdma(rkey, remote)
        try:
            connection.qp.post_send(request)
        except pv.pyverbs_error.PyverbsError as error:
            raise RungFailedError(f"{connection.device.name}: a READ was not accepted: {error}") from None

    def _collect(self, link: Link, connection: Connection, flight: Flight) -> int:
        """Waits for at least one completion; the number of the last READ that has arrived."""
        if n := self._poll(connection):
            return n
        connection.cq.req_notify()
        if n := self._poll(connection):  # one may have come before the request to be told
            return n
        waiter = select.poll()
        waiter.register(connection.fd, select.POLLIN)
        waiter.register(link.control_fileno(), select.POLLRDHUP)
        give_up = time.monotonic() + READ_S
        while True:
            wait = min(flight.deadline.left(READ_S), max(0.0, give_up - time.monotonic()), 0.25)
            events = waiter.poll(int(wait * 1000) + 1)
            for fd, _ in events:
                if fd != connection.fd:
                    raise PeerLostError("the peer went away during a READ")
                with contextlib.suppress(connection.device.pv.pyverbs_error.PyverbsError):
                    connection.channel.get_cq_event(connection.cq)
                    connection.cq.ack_events(1)
            if n := self._poll(connection):
                return n
            flight.check()
            if time.monotonic() >= give_up:
                raise RungFailedError(f"no READ completed for {READ_S:.0f} s")
            if events:
                connection.cq.req_notify()

    def _poll(self, connection: Connection) -> int:
        """The number of the last READ that has arrived since the last look; 0: none has."""
        enums = connection.device.pv.enums
        last = 0
        _, completions = connection.cq.poll(connection.depth)
        for completion in completions:
            if completion.status == enums.IBV_WC_SUCCESS:
                last = int(completion.wr_id)
                continue
            status = int(completion.status)
            # Whether the peer is well, and our lease still valid, the control connection says (`Peer.fetch`).
            if status == int(enums.IBV_WC_REM_ACCESS_ERR):
                raise RungFailedError("the peer's device refuses the memory (remote access error)")
            if status == int(enums.IBV_WC_RETRY_EXC_ERR):
                raise RungFailedError("the peer's device does not answer (retries exceeded)")
            raise RungFailedError(f"{connection.device.name}: a READ failed with status {status}")
        return last

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
