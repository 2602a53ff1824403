"""RDMA devices through pyverbs: choosing one, its address, reliable connections, registering memory of ours.

Facts that shape this code: retry_cnt 7 means for ever on some devices, so 6 it is; a dead peer shows as no completion
at all for seconds, so every READ has a deadline of its own and the control connection tells about death sooner; the
event channel's descriptor is what poll can wait on, pyverbs' own get_cq_event would block with the GIL held.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vllm_loraserve.memory import extension
from vllm_loraserve.memory.slab import Slab
from vllm_loraserve.transfer.errors import RungFailedError
from vllm_loraserve.transfer.pages import Range
from vllm_loraserve.transfer.rungs import pyverbs_loader
from vllm_loraserve.transfer.wire import RemoteRange

logger = logging.getLogger(__name__)

RETRIES = 6
TIMEOUT = 16
"""4.096 us * 2**16 = 0.27 s between retries."""
MAX_READS = 16
"""READs in flight on one connection, at most what both devices allow."""
PORT = 1
_channel_lock = threading.Lock()


class VerbsDevice:
    """One opened RDMA device, its port 1 and the GID that the pool uses."""

    def __init__(self, pyverbs: SimpleNamespace, name: str) -> None:
        self.pv, self.name = pyverbs, name
        self.context = pyverbs.device.Context(name=name)
        port = self.context.query_port(PORT)
        self.mtu, self.lid = int(port.active_mtu), int(port.lid)
        self.gid_index, self.gid = self._choose_gid(int(port.gid_tbl_len))
        attributes = self.context.query_device()
        self.max_reads = max(1, min(MAX_READS, int(attributes.max_qp_rd_atom)))

    def _choose_gid(self, size: int) -> tuple[int, str]:
        """The IPv4-mapped RoCE v2 GID where there is one, else the first that is not empty."""
        gids = []
        for index in range(min(size, 32)):
            with contextlib.suppress(Exception):  # holes in the table raise
                gids.append((index, str(self.context.query_gid(PORT, index))))
        full = [(i, g) for i, g in gids if g.replace(":", "").strip("0")]
        mapped = [(i, g) for i, g in full if g.startswith(("0000:0000:0000:0000:0000:ffff:", "::ffff:"))]
        if not full:
            raise RungFailedError(f"{self.name}: port {PORT} has no GID (is the interface up?)")
        return (mapped or full)[0]

    def close(self) -> None:
        self.context.close()


def open_device(choice: str = "auto") -> tuple[VerbsDevice | None, str]:
    """The named device, or the first with an active port; (None, reason) where there is none."""
    if choice == "off":
        return None, "RDMA is switched off"
    pyverbs, reason = pyverbs_loader.load()
    if pyverbs is None:
        return None, reason
    try:
        names = [device.name.decode() for device in pyverbs.device.get_device_list()]
    except pyverbs.pyverbs_error.PyverbsError:
        return None, "the kernel has no RDMA (ib_uverbs is not loaded)"
    if choice != "auto":
        if choice not in names:
            return None, f"no RDMA device {choice!r}; there are {', '.join(names) or 'none'}"
        names = [choice]
    why = "no RDMA device"
    for name in names:
        try:
            device = VerbsDevice(pyverbs, name)
            if int(device.context.query_port(PORT).state) == int(pyverbs.enums.IBV_PORT_ACTIVE):
                return device, ""
            device.close()
            why = f"{name}: port {PORT} is not active"
        except (pyverbs.pyverbs_error.PyverbsError, RungFailedError) as error:
            why = f"{name}: {error}"
    return None, why


class Connection:
    """A queue pair with its completion queue and event channel."""

    def __init__(self, device: VerbsDevice, pd: Any, depth: int) -> None:
        pv = device.pv
        self.device, self.depth = device, depth
        with _channel_lock:  # pyverbs does not tell the descriptor: it is the one that appears
            before = _event_descriptors()
            self.channel = pv.cq.CompChannel(device.context)
            new = _event_descriptors() - before
        if len(new) != 1:
            raise RungFailedError("cannot find the event channel's descriptor")
        self.fd = new.pop()
        os.set_blocking(self.fd, False)
        self.cq = pv.cq.CQ(device.context, depth + 1, None, self.channel, 0)
        capacity = pv.qp.QPCap(max_send_wr=depth, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        # Only what is posted as signalled completes with an entry; what fails always does.
        init = pv.qp.QPInitAttr(qp_type=pv.enums.IBV_QPT_RC, scq=self.cq, rcq=self.cq, cap=capacity, sq_sig_all=0)
        self.qp = pv.qp.QP(pd, init)
        self.number = int(self.qp.qp_num)
        self.psn = int.from_bytes(os.urandom(3), "big")

    def connect(self, number: int, gid: str, psn: int, lid: int, mtu: int, access: int, reads: int) -> None:
        """To the state in which both sides may send. Raises RungFailedError where the device refuses."""
        pv, device = self.device.pv, self.device
        attributes = pv.qp.QPAttr(port_num=PORT)
        attributes.dest_qp_num, attributes.qp_access_flags = number, access
        attributes.path_mtu = min(device.mtu, mtu)
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = reads
        attributes.min_rnr_timer, attributes.rnr_retry = 12, 6
        attributes.timeout, attributes.retry_cnt = TIMEOUT, RETRIES
        attributes.rq_psn, attributes.sq_psn = psn, self.psn
        route = pv.addr.GlobalRoute(dgid=pv.addr.GID(gid), sgid_index=device.gid_index, hop_limit=64)
        attributes.ah_attr = pv.addr.AHAttr(port_num=PORT, is_global=1, gr=route, dlid=lid)
        try:
            self.qp.to_rts(attributes)
        except pv.pyverbs_error.PyverbsError as error:
            raise RungFailedError(f"{device.name}: the queue pair cannot be connected: {error}") from None

    def close(self) -> None:
        for part in (self.qp, self.cq, self.channel):
            with contextlib.suppress(Exception):
                part.close()


def _event_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found


def peermem_loaded() -> bool:
    """Whether the kernel can register plain CUDA addresses (nvidia-peermem)."""
    return any(
        os.path.exists(path)
        for path in (
            "/sys/kernel/mm/memory_peers/nv_mem/version",
            "/sys/kernel/mm/memory_peers/nvidia-peermem/version",
            "/sys/module/nvidia_peermem/version",
        )
    )


def gpudirect_reason(device: VerbsDevice | None) -> str:
    """Empty where device memory of this machine can be registered with this RDMA device, else why not."""
    if device is None:
        return "no RDMA device"
    library = extension.load()
    if library is None:
        return "the extension is not built"
    report = library.probe()
    if not report.cuda.devices:
        return f"no GPU ({report.cuda.error or 'the driver sees none'})"
    mine = next((d for d in report.verbs.devices if d.name == device.name), None)
    if mine is not None and mine.dma_buf == "supported" and any(d.dma_buf for d in report.cuda.devices):
        return ""
    if peermem_loaded():
        return ""
    return f"no dma-buf registration ({mine.dma_buf if mine else 'unknown'}) and nvidia-peermem is not loaded"


class Registration:
    """Memory regions over ranges of one slab."""

    def __init__(self, device: VerbsDevice, pd: Any, slab: Slab, ranges: Sequence[Range], access: int) -> None:
        self._pv = device.pv
        self.regions: list[Any] = []
        self.remote: list[RemoteRange] = []
        self.local: list[tuple[int, int]] = []
        """(address to put into a scatter entry for the range's first byte, lkey)."""
        try:
            for offset, length in ranges:
                region, address = self._register(pd, slab, slab.address + offset, length, access)
                self.regions.append(region)
                self.remote.append(RemoteRange(address=address, length=length, rkey=int(region.rkey)))
                self.local.append((address, int(region.lkey)))
        except device.pv.pyverbs_error.PyverbsError as error:
            self.close()
            raise RungFailedError(f"{device.name} cannot register the memory: {error}") from None
        except BaseException:
            self.close()
            raise

    def _register(self, pd: Any, slab: Slab, address: int, length: int, access: int) -> tuple[Any, int]:
        mr = self._pv.mr
        if slab.device < 0:
            return mr.MR(pd, length, access, address=address), address
        library = extension.load()
        if library is None:
            raise RungFailedError("registering device memory needs the extension")
        try:
            exported = library.export_dmabuf(slab.device, address, length)
        except extension.ExtensionError as error:
            if not peermem_loaded():
                raise RungFailedError(f"no dma-buf ({error}) and nvidia-peermem is not loaded") from None
            return mr.MR(pd, length, access, address=address), address
        try:
            # pyverbs registers with the offset as the address of the first byte.
            return mr.DmaBufMR(pd, length, access, dmabuf=exported.fd, offset=exported.offset), exported.offset
        except self._pv.pyverbs_error.PyverbsError:
            if not peermem_loaded():
                raise
            return mr.MR(pd, length, access, address=address), address
        finally:
            os.close(exported.fd)

    def close(self) -> None:
        """Deregisters: from here on the device refuses every READ with these keys. Twice is harmless."""
        while self.regions:
            region = self.regions.pop()
            try:
                region.close()
            except self._pv.pyverbs_error.PyverbsError:
                logger.exception("transfer: a memory region could not be deregistered")
