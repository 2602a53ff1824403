"""The serving side: lets authenticated peers lease adapters of our page stores and read them, on every rung.

One thread accepts, one serves each connection; a data connection carries raw bytes, a control connection
everything else (`wire.py`). The engine is never asked: what a peer needs is pages that stay put, and that is
what a lease is.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence

from vllm_loraserve.memory import extension
from vllm_loraserve.transfer import wire
from vllm_loraserve.transfer.auth import check_key, prove_as_server
from vllm_loraserve.transfer.errors import RungFailedError, TransferError
from vllm_loraserve.transfer.leases import Lease, LeaseTable
from vllm_loraserve.transfer.pages import PageStore, Range
from vllm_loraserve.transfer.rungs import nixl, samehost, tcp
from vllm_loraserve.transfer.rungs.verbs_server import VerbsServer, VerbsSession

logger = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
"""For the proof of the key and the first message together."""
RELEASED = 64
MAX_STRANGERS = 64
"""Connections that have not proved the key yet; more are closed at once."""


def boot_id() -> str:
    """What is equal for two processes under one kernel; empty where the system does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


class _Session:
    """One control connection."""

    def __init__(self, number: int, token: bytes, instance: str) -> None:
        self.number, self.token, self.instance = number, token, instance
        self.verbs: VerbsSession | None = None
        self.released: dict[int, Lease] = {}
        """Leases that ended well, by number, until the client says that their pages have landed: the last RELEASED."""


class TransferServer:
    """Serves `stores` (the first that holds an adapter wins) on a TCP port and, for the same host, a Unix
    socket.

    key: the cluster key. host, port: where to listen (0: any free port; then see `endpoint`). advertise: the
    host under which peers reach it. lease_s: seconds after which a silent reader loses its leases. verbs:
    "auto", "off" or the name of an RDMA device. offer_unix, offer_nixl: whether the same-host and the NIXL way are
    offered.
    """

    def __init__(
        self,
        stores: Sequence[PageStore],
        key: bytes,
        instance: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        lease_s: float = 30.0,
        verbs: str = "auto",
        offer_unix: bool = True,
        offer_nixl: bool = False,
    ) -> None:
        self._stores, self._key, self.instance = tuple(stores), check_key(key), instance
        self._leases = LeaseTable(lease_s)
        self._sessions: dict[bytes, _Session] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._strangers = threading.BoundedSemaphore(MAX_STRANGERS)
        self._closing = threading.Event()
        self._boot_id = boot_id()
        self._verbs = VerbsServer.find(verbs)
        self._nixl = nixl.NixlServer(instance, [s.slab for s in self._stores]) if offer_nixl else None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host.strip("[]"), port), family=family, backlog=128)
        self._unix_name = ""
        self._unix: socket.socket | None = None
        if offer_unix:
            self._unix_name = f"loraserve-{os.getpid()}-{secrets.token_hex(8)}"
            self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._unix.bind("\0" + self._unix_name)
            self._unix.listen(64)
        bound = self._listener.getsockname()
        shown = (advertise or bound[0]).strip("[]")
        self.endpoint = f"[{shown}]:{bound[1]}" if ":" in shown else f"{shown}:{bound[1]}"
        """host:port for peers."""
        self._spawn(self._accept, self._listener)
        if self._unix is not None:
            self._spawn(self._accept, self._unix)
        self._spawn(self._expire)
        rdma = self._verbs.reason or "yes"
        logger.info("transfer: %s serves adapters on %s (RDMA: %s)", instance, self.endpoint, rdma)

    # ---- for the owner of the stores ----

    def revoke(self, name: str) -> int:
        """Takes the adapter's pages back from all readers, now: registrations go, readers see a changed
        generation.

        Returns how many leases that ended, when none of their holders can read the pages any more over RDMA
        or TCP. A same-host reader may still look at recycled pages; its check of generation and checksums
        discards what it saw.
        """
        return self._leases.end_adapter(name)

    @property
    def lease_count(self) -> int:
        """Leases now live."""
        return len(self._leases)

    @property
    def session_count(self) -> int:
        """Peers now connected."""
        return len(self._sessions)

    def close(self) -> None:
        """Stops listening, ends every lease and connection, and waits for the threads. Twice is harmless."""
        if self._closing.is_set():
            return
        self._closing.set()
        with self._lock:
            sockets = [self._listener, *self._connections, *([self._unix] if self._unix else [])]
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._unix is not None:
            self._unix.close()
        for thread in list(self._threads):
            thread.join(timeout=10)
        self._verbs.close()
        if self._nixl is not None:
            self._nixl.close()

    def __enter__(self) -> TransferServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- threads ----

    def _spawn(self, target: object, *arguments: object) -> None:
        def run() -> None:
            try:
                target(*arguments)  # type: ignore[operator]
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=run, daemon=True, name="loraserve-transfer")
        self._threads.add(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:
                if self._closing.is_set():
                    return
                time.sleep(0.05)  # out of descriptors, say: go on when there are some again
                continue
            if not self._strangers.acquire(blocking=False):
                sock.close()
                continue
            with self._lock:
                self._connections.add(sock)
            self._spawn(self._serve, sock)

    def _expire(self) -> None:
        while not self._closing.wait(min(1.0, self._leases.ttl / 4)):
            ended = self._leases.end_expired(time.monotonic())
            if ended:
                logger.warning("transfer: %d leases expired: their readers have gone silent", ended)

    def _serve(self, sock: socket.socket) -> None:
        session: _Session | None = None
        try:
            try:
                deadline = wire.Deadline(HANDSHAKE_S)
                sock.settimeout(HANDSHAKE_S)
                prove_as_server(sock, self._key, deadline)
                first = wire.receive_request(sock, deadline)
            finally:
                self._strangers.release()
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(None)
            if isinstance(first, wire.Hello):
                session = self._welcome(sock, first)
                self._control(sock, session)
            elif isinstance(first, wire.Attach):
                self._data(sock, first)
        except TransferError as error:
            logger.info("transfer: a connection ended: %s", error)
        except OSError as error:
            if not self._closing.is_set():
                logger.info("transfer: a connection broke: %s", error)
        finally:
            if session is not None:
                self._forget(session)
            with self._lock:
                self._connections.discard(sock)
            sock.close()

    # ---- control ----

    def _welcome(self, sock: socket.socket, hello: wire.Hello) -> _Session:
        if hello.version != wire.VERSION:
            wire.send(sock, wire.Refused(code="unsupported", message=f"this instance speaks version {wire.VERSION}"))
            raise TransferError(f"{hello.instance} speaks version {hello.version} of the protocol")
        session = _Session(next(self._numbers), secrets.token_bytes(32), hello.instance)
        self._sessions[session.token] = session
        same_host = bool(self._boot_id) and hello.boot_id == self._boot_id
        wire.send(
            sock,
            wire.Welcome(
                version=wire.VERSION,
                instance=self.instance,
                boot_id=self._boot_id,
                session=session.token,
                slabs=tuple(samehost.describe(store.slab, same_host) for store in self._stores),
                lease_s=self._leases.ttl,
                unix=self._unix_name if same_host else "",
                verbs=self._verbs.reason,
                gpudirect=self._verbs.gpudirect_reason([store.slab for store in self._stores]),
                nixl=self._nixl.metadata if self._nixl else b"",
                nixl_base=tuple(store.slab.address for store in self._stores) if self._nixl else (),
            ),
        )
        return session

    def _control(self, sock: socket.socket, session: _Session) -> None:
        while (request := wire.receive_request(sock)) is not None:
            self._leases.renew(session.number, time.monotonic())
            if isinstance(request, wire.Landed):
                if (lease := session.released.pop(request.lease, None)) is not None:
                    lease.store.landed(lease.pages, session.instance)
                continue
            try:
                reply = self._answer(request, session)
            except (TransferError, extension.ExtensionError, ValueError) as error:
                reply = wire.Refused(code="internal", message=str(error))
            wire.send(sock, reply)

    def _forget(self, session: _Session) -> None:
        self._sessions.pop(session.token, None)
        ended = self._leases.end_session(session.number)
        if ended:
            logger.info("transfer: %s went away with %d leases open", session.instance, ended)
        if session.verbs is not None:
            session.verbs.close()

    def _answer(self, request: wire.Request, session: _Session) -> wire.Reply:
        match request:
            case wire.OpenLease():
                return self._open_lease(request, session)
            case wire.CheckLease(lease=number):
                lease = self._leases.get(number, session.number)
                return wire.LeaseState(valid=lease is not None, generation=lease.pages.generation if lease else -1)
            case wire.ReleaseLease(lease=number):
                lease = self._leases.get(number, session.number)
                if lease is None or not self._leases.end(lease):
                    return wire.LeaseState(valid=False, generation=-1)
                session.released[number] = lease
                if len(session.released) > RELEASED:
                    del session.released[next(iter(session.released))]
                return wire.LeaseState(valid=True, generation=lease.pages.generation)
            case wire.GetCatalogue():
                seen = {}
                for store in reversed(self._stores):
                    seen.update({pages.name: pages for pages in store.catalogue()})
                return wire.Catalogue(adapters=tuple(seen.values()))
            case wire.ConnectQueuePair():
                if session.verbs is not None:  # the client gave its queue pair up; so go the registrations
                    self._leases.end_registered(session.number)
                    session.verbs.close()
                    session.verbs = None
                session.verbs = self._verbs.connect(request)
                return session.verbs.answer
            case wire.Ping():
                return wire.Done()
        return wire.Refused(code="invalid", message=f"{type(request).__name__} does not belong on a control connection")

    def _open_lease(self, request: wire.OpenLease, session: _Session) -> wire.Reply:
        refusal: wire.Refused | None = None
        for index, store in enumerate(self._stores):
            pages = store.acquire(request.name)
            if pages is None:
                continue
            if pages.layout != request.layout:
                store.release(pages)
                refusal = wire.Refused(code="layout", message=f"{request.name}: the pages here have another layout")
                continue
            if request.digest and pages.digest != request.digest:
                store.release(pages)
                refusal = wire.Refused(code="digest", message=f"{request.name}: here it is {pages.digest[:12]}")
                continue
            lease = self._leases.open(session.number, store, index, pages, time.monotonic())
            remote: tuple[wire.RemoteRange, ...] = ()
            if request.rdma:
                if session.verbs is None:
                    self._leases.end(lease)
                    return wire.Refused(code="unsupported", message="no queue pair is connected on this session")
                try:
                    remote, deregister = session.verbs.register(store.slab, pages.ranges)
                except RungFailedError as error:
                    self._leases.end(lease)
                    return wire.Refused(code="unsupported", message=str(error))
                if not lease.guard(deregister):
                    return wire.Refused(code="revoked", message=f"{request.name} was taken back meanwhile")
            return wire.Leased(lease=lease.number, pages=pages, slab=index, remote=remote)
        return refusal or wire.Refused(code="not_held", message=f"{request.name} is not held here")

    # ---- data ----

    def _data(self, sock: socket.socket, attach: wire.Attach) -> None:
        session = self._sessions.get(attach.session)
        if session is None:
            wire.send(sock, wire.Refused(code="invalid", message="no such session"))
            return
        tcp.limit_send(sock)
        wire.send(sock, wire.Done())
        while (request := wire.receive_request(sock)) is not None:
            if attach.session not in self._sessions:
                return
            if isinstance(request, wire.Pull):
                self._pull(sock, request, session)
            elif isinstance(request, wire.GetMemory):
                self._give_memory(sock, request)
            else:
                wire.send(sock, wire.Refused(code="invalid", message="a data connection carries Pull and GetMemory"))

    def _pull(self, sock: socket.socket, request: wire.Pull, session: _Session) -> None:
        lease = self._leases.get(request.lease, session.number)
        if lease is None:
            wire.send(sock, wire.Refused(code="revoked", message="the lease has ended"))
            return
        try:
            ranges = tcp.pull_ranges(lease.pages, request)
        except ValueError as error:
            wire.send(sock, wire.Refused(code="invalid", message=str(error)))
            return
        wire.send(sock, wire.Data(length=request.length))
        self._send_ranges(sock, lease, ranges)

    def _send_ranges(self, sock: socket.socket, lease: Lease, ranges: Sequence[Range]) -> None:

        def interrupt() -> None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

        for piece in tcp.send_pieces(ranges):
            if not lease.enter(interrupt):  # closing the connection is what tells the reader
                raise TransferError("a lease ended while its pages were sent")
            try:
                tcp.send_range(sock, lease.store.slab, piece)
            finally:
                lease.leave(interrupt)

    def _give_memory(self, sock: socket.socket, request: wire.GetMemory) -> None:
        slab = self._stores[request.slab].slab if 0 <= request.slab < len(self._stores) else None
        if sock.family != socket.AF_UNIX or slab is None or slab.fd < 0:
            wire.send(sock, wire.Refused(code="unsupported", message="this memory cannot be shared with a process"))
            return
        samehost.send_memory(sock, slab)
