"""NIXL (the `nixl` extra) as an optional rung behind the same interface; never chosen unless asked for.

Its traps, and what is done about them here:
- UCX must have `tcp` among its transports even for shared memory: UCX_TLS is completed where it is set without.
- The UCX plug-in crashes the interpreter at exit where there is no RDMA device: the rung refuses there, unless
  LORASERVE_NIXL_WITHOUT_RDMA=1 says that the process ends by os._exit (benchmarks and tests do).
- Its metadata opens the whole registered slab, not one lease's pages: weaker than the verbs rung, hence opt-in.
- Releasing the handle of a transfer under way asks for its cancellation, which says nothing about what the device still
  writes: a transfer that is given up is waited for, and where it does not end, its agent and the registration of the
  destination go before the memory can be used again.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_loraserve.memory.slab import Slab
from vllm_loraserve.transfer import wire
from vllm_loraserve.transfer.errors import RungFailedError, TransferError
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.pages import Destination, match
from vllm_loraserve.transfer.rungs.base import Link

logger = logging.getLogger(__name__)

STEP_S = 0.0002
"""Between two looks at a transfer: NIXL has no descriptor to wait on."""
ENDED = ("DONE", "ERR")
ABORT_S = 2.0
"""Longest wait for the end of a transfer that was given up."""


@functools.cache
def unusable() -> str:
    """Empty where NIXL can be used here, else why not."""
    if not (os.environ.get("LORASERVE_NIXL_WITHOUT_RDMA") == "1" or _has_rdma()):
        return "without an RDMA device NIXL's UCX crashes at interpreter exit"
    try:
        importlib.import_module("nixl._api")
    except ImportError as error:
        return f"the nixl extra is not installed ({error})"
    return ""


def with_tcp(transports: str) -> str:
    """A UCX_TLS value that NIXL can work with: shared memory alone has no handler for a failing peer."""
    if transports in ("", "all") or transports.startswith("^") or "tcp" in transports.split(","):
        return transports
    return transports + ",tcp"


def _has_rdma() -> bool:
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


def _agent(name: str) -> Any:
    if reason := unusable():
        raise RungFailedError(reason)
    if transports := os.environ.get("UCX_TLS"):
        os.environ["UCX_TLS"] = with_tcp(transports)
    api = importlib.import_module("nixl._api")
    try:
        return api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
    except Exception as error:  # nixl's own hierarchy is not importable without it
        raise RungFailedError(f"NIXL made no agent: {error}") from None


def _kind(slab: Slab) -> tuple[str, int]:
    return ("DRAM", 0) if slab.device < 0 else ("VRAM", slab.device)


class NixlServer:
    """The serving side: registers the slabs once; the metadata goes to authenticated peers only."""

    def __init__(self, instance: str, slabs: Sequence[Slab]) -> None:
        self._agent = _agent(f"{instance}-{os.urandom(4).hex()}")
        self._registered = []
        for slab in slabs:
            kind, device = _kind(slab)
            self._registered.append(self._agent.register_memory([(slab.address, slab.size, device, "")], kind))
        self.metadata = bytes(self._agent.get_agent_metadata())

    def close(self) -> None:
        while self._registered:
            self._agent.deregister_memory(self._registered.pop())


class NixlRung:
    """Reads through a NIXL agent of this process."""

    name = "nixl"
    rdma = False

    def __init__(self) -> None:
        self._agent: Any = None
        self._peer: Any = None
        self._registered: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()
        """The agent is for one thread at a time."""

    def probe(self, link: Link, destination_device: int) -> str:
        if reason := unusable():
            return reason
        if not link.welcome.nixl:
            return "the peer does not offer NIXL"
        try:
            self.prepare(link)
        except RungFailedError as error:
            return str(error)
        return ""

    def prepare(self, link: Link) -> None:
        if self._peer is None:  # else a read that is under way has the lock
            with self._lock:
                self._connect(link)

    def _connect(self, link: Link) -> None:
        if self._agent is None:
            self._agent = _agent(f"reader-{os.urandom(4).hex()}")
        if self._peer is None:
            self._peer = self._agent.add_remote_agent(link.welcome.nixl)

    def tend(self) -> None:
        """Nothing to do."""

    def read(self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight) -> None:
        with flight.holding(self._lock):
            try:
                self._connect(link)
                self._read(link, lease, destination, flight)
            except TransferError:
                raise
            except Exception as error:  # nixl's own hierarchy is not importable without it
                raise RungFailedError(f"NIXL: {error}") from error

    def _read(self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight) -> None:
        slab, info = destination.slab, link.welcome.slabs[lease.slab]
        key = (slab.address, slab.size)
        kind, device = _kind(slab)
        if key not in self._registered:
            self._registered[key] = self._agent.register_memory([(slab.address, slab.size, device, "")], kind)
        base = link.welcome.nixl_base[lease.slab]
        pieces = match(lease.pages.ranges, destination.ranges)
        flight.advance(lease.pages.size)
        remote_kind, remote_device = ("DRAM", 0) if info.device < 0 else ("VRAM", info.device)
        local = self._agent.get_xfer_descs([(slab.address + p.target, p.length, device) for p in pieces], kind)
        remote = self._agent.get_xfer_descs([(base + p.source, p.length, remote_device) for p in pieces], remote_kind)
        handle = self._agent.initialize_xfer("READ", local, remote, self._peer)
        try:
            state = self._agent.transfer(handle)
            while state not in ENDED:
                flight.check()
                time.sleep(STEP_S)
                state = self._agent.check_xfer_state(handle)
        except BaseException:
            self._abort(handle)
            raise
        self._agent.release_xfer_handle(handle)
        if state == "ERR":
            self._disconnect()
            raise RungFailedError("NIXL reports a failed transfer")

    def _abort(self, handle: Any) -> None:
        """Returns when nothing is written into the destination any more."""
        end = time.monotonic() + ABORT_S
        try:
            while (state := self._agent.check_xfer_state(handle)) not in ENDED and time.monotonic() < end:
                time.sleep(STEP_S)
            self._agent.release_xfer_handle(handle)
            if state == "DONE":
                return
        except Exception as error:  # NIXL's own: the transfer is not over, or nobody knows
            logger.warning("transfer: NIXL does not end a transfer (%s): its agent goes", error)
        self._disconnect()

    def _disconnect(self) -> None:
        """Registrations, peer and agent go: no transfer of this agent writes after that. The next read makes anew."""
        agent, peer, registered = self._agent, self._peer, list(self._registered.values())
        self._agent = self._peer = None
        self._registered.clear()
        if peer is not None:
            _try(agent.remove_remote_agent, peer)
        for memory in registered:
            _try(agent.deregister_memory, memory)

    def close(self) -> None:
        with self._lock:
            if self._agent is not None:
                self._disconnect()


def _try(call: Callable[[Any], object], argument: Any) -> None:
    """What fails on the way out keeps the rest from going no more than it must."""
    try:
        call(argument)
    except Exception as error:
        logger.warning("transfer: NIXL: %s", error)
