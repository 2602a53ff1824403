"""Between the scheduler and the LoRA managers of its workers: which adapters to bring in, which are in.

The scheduler lives in the engine-core process, each manager in a worker process, and vLLM offers no way between them
but the step itself. This channel is beside the step: a ROUTER socket that the scheduler binds and reads without waiting
once per step, a DEALER socket in each worker that a side thread reads. So a load is ordered by the first step after its
request was queued and runs beside the steps, its end is known at the next step, and a step never waits for it.

Every worker says Hello when it is connected; the scheduler counts an adapter as ready when every rank has said Ready.
Both sides live and die together with their engine, so there is no reconnection protocol.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq
from vllm.logger import init_logger

logger = init_logger("vllm.loraserve.channel")


class Order(msgspec.Struct, frozen=True, tag=True):
    """Scheduler -> workers."""


class Prepare(Order, frozen=True, tag=True):
    """Bring an adapter in, aside, and hold it. Answered by Ready or Failed with the same `attempt`."""

    adapter: int
    attempt: int
    request: bytes
    """The LoRARequest, as msgpack."""


class Hold(Order, frozen=True, tag=True):
    """Requests wait for an adapter that is ready: it may not be evicted before it is activated. Not answered."""

    adapter: int


class Release(Order, frozen=True, tag=True):
    """Nobody waits for the adapter any more: it may be evicted. Not answered."""

    adapter: int


class Report(msgspec.Struct, frozen=True, tag=True):
    """Worker -> scheduler."""

    rank: int
    """Global rank of the worker in its engine."""


class Hello(Report, frozen=True, tag=True):
    """The worker can take orders. `rank_rows`: what its arena holds; None: only slots count. `prepared`: how many
    adapters it can hold ready that do not run yet, `host_rows`: rank rows of such in its host tier; None: no bound."""

    rank_rows: int | None
    page_rows: int = 1
    prepared: int | None = None
    host_rows: int | None = None


class Ready(Report, frozen=True, tag=True):
    """The adapter can be activated without reading or converting anything."""

    adapter: int
    attempt: int
    lora_rank: int
    """Its largest rank over all modules, in rank rows."""
    seconds: float
    path: str = ""


class Failed(Report, frozen=True, tag=True):
    """It can't; `transient`: trying again may help; `status`: the HTTP status that says so to a client; `no_room`: the
    host tier has none beside what it holds."""

    adapter: int
    attempt: int
    reason: str
    transient: bool
    status: int = 400
    no_room: bool = False


class Gone(Report, frozen=True, tag=True):
    """An adapter that was ready no longer is (evicted, removed)."""

    adapter: int


class Pinned(Report, frozen=True, tag=True):
    """The adapter keeps its place in the arena while nobody uses it, from now on (or no longer)."""

    adapter: int
    pinned: bool


class Stalled(Report, frozen=True, tag=True):
    """An adapter had to be read inside a step after all, for `seconds`."""

    adapter: int
    seconds: float


class Family(msgspec.Struct, frozen=True):
    """One metric of a worker, as prometheus has it; `samples`: (name, labels, value)."""

    name: str
    text: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


class Figures(Report, frozen=True, tag=True):
    """What the worker's adapter memory holds, and what it has brought in from peers since its start."""

    families: list[Family]


_encode = msgspec.msgpack.Encoder().encode
_decode_order = msgspec.msgpack.Decoder(Prepare | Hold | Release).decode
_decode_report = msgspec.msgpack.Decoder(Hello | Ready | Failed | Gone | Pinned | Stalled | Figures).decode


def address_of(vllm_config: Any, purpose: str = "loads") -> str | None:
    """Address for one engine, known to all its processes; None when its workers are on several machines."""
    parallel = vllm_config.parallel_config
    if getattr(parallel, "nnodes", 1) > 1:
        return None
    folder = Path(tempfile.gettempdir()) / f"vllm-loraserve-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise PermissionError(f"{folder} belongs to somebody else; remove it or set TMPDIR")
    return f"ipc://{folder}/{purpose}-{vllm_config.instance_id}-{parallel.data_parallel_index}"


class SchedulerEnd:
    """The scheduler's end. Not thread-safe; everything but `wait_for_workers` and `wait` returns at once."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self._peers: dict[int, bytes] = {}
        self._pending: list[Report] = []

    def wait_for_workers(self, count: int, timeout_s: float) -> list[Hello]:
        """The Hellos that came within the time; fewer than `count` when workers are missing."""
        deadline = time.monotonic() + timeout_s
        hellos: dict[int, Hello] = {}
        while len(hellos) < count and (left := deadline - time.monotonic()) > 0:
            if self._socket.poll(int(left * 1000) + 1):
                for report in self._receive():
                    if isinstance(report, Hello):
                        hellos[report.rank] = report
                    else:
                        self._pending.append(report)
        return list(hellos.values())

    def send(self, order: Order) -> None:
        """To every worker."""
        payload = _encode(order)
        for peer in self._peers.values():
            self._socket.send_multipart([peer, payload])

    def wait(self, timeout_s: float, descriptor: int | None = None) -> None:
        """Returns when a report has come, or `descriptor` can be read, or after the time."""
        if self._pending:
            return
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if descriptor is not None:
            poller.register(descriptor, zmq.POLLIN)
        poller.poll(int(timeout_s * 1000))

    def reports(self) -> list[Report]:
        """Everything that has come since the last call."""
        reports, self._pending = [*self._pending, *self._receive()], []
        return reports

    def _receive(self) -> Iterator[Report]:
        while True:
            try:
                peer, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            report: Report = _decode_report(payload)
            if isinstance(report, Hello):
                self._peers[report.rank] = peer  # where it hears orders; it reports by another connection
            yield report

    def close(self) -> None:
        self._socket.close()


class WorkerEnd:
    """A worker's end: one daemon thread that receives orders; any thread reports."""

    def __init__(self, address: str, hello: Hello, on_order: Callable[[Order], None]) -> None:
        self._address, self._on_order, self.rank = address, on_order, hello.rank
        inside = f"inproc://loraserve-{os.getpid()}-{id(self)}"
        self._wake: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._wake.bind(inside)
        self._stop: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._stop.connect(inside)
        # A connection of their own: a report that went through the thread would wait until that has the interpreter.
        self._reports, self._reporting = self._connect(), threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(hello,), name="loraserve-orders", daemon=True)
        self._thread.start()

    def _connect(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(0)
        socket.connect(self._address)
        return socket

    def report(self, report: Report) -> None:
        """From any thread; returns at once."""
        with self._reporting:
            if not self._reports.closed:
                self._reports.send(_encode(report))

    def _run(self, hello: Hello) -> None:
        orders = self._connect()
        orders.send(_encode(hello))
        poller = zmq.Poller()
        poller.register(orders, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while True:
            for socket, _ in poller.poll():
                message = socket.recv()
                if socket is self._wake:
                    orders.close()
                    self._wake.close()
                    return
                try:
                    self._on_order(_decode_order(message))
                except Exception:
                    # The load that was ordered runs into its timeout; the next orders must still be heard.
                    logger.exception("An order of the scheduler could not be carried out")

    def close(self) -> None:
        """Ends the thread."""
        self._stop.send(b"")
        self._thread.join(2)
        self._stop.close()
        with self._reporting:
            self._reports.close()
