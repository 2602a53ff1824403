"""The reading side: one authenticated control connection to a peer, and the rungs that work between the two
of us.

`fetch` is the whole of a transfer: lease, reserve, read, release (and check), verify, commit. A failed rung is
given a rest and the next one tried; a changed generation or a bad page is read again; everything else is for
the pool to decide, which has other sources.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

from vllm_loraserve.memory.checksum import checksums
from vllm_loraserve.transfer import wire
from vllm_loraserve.transfer.auth import check_key, prove_as_client
from vllm_loraserve.transfer.errors import (
    CorruptPageError,
    DeadlineError,
    DigestMismatchError,
    GenerationChangedError,
    LayoutMismatchError,
    NotHeldError,
    PeerLostError,
    RungFailedError,
    TransferError,
)
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.pages import AdapterPages, Destination, Landing, Wanted, page_offsets
from vllm_loraserve.transfer.rungs import DEFAULT_ORDER
from vllm_loraserve.transfer.rungs.base import Rung
from vllm_loraserve.transfer.rungs.nixl import NixlRung
from vllm_loraserve.transfer.rungs.samehost import CudaIpcRung, MemfdRung
from vllm_loraserve.transfer.rungs.tcp import TcpRung
from vllm_loraserve.transfer.rungs.verbs import LocalDevice, VerbsRung
from vllm_loraserve.transfer.server import boot_id

logger = logging.getLogger(__name__)

REST_S = 30.0
"""A rung that failed is not tried again for so long."""
ATTEMPTS = 3
"""Times that one peer is read from before a changed generation or a bad page counts as its failure."""


def make_rungs(order: Sequence[str], local: LocalDevice, streams: int) -> list[Rung]:
    """Fresh rungs for one peer, in this order. Raises ValueError for a name that is none."""
    makers: dict[str, Callable[[], Rung]] = {
        "cuda_ipc": CudaIpcRung,
        "memfd": MemfdRung,
        "verbs_gpudirect": lambda: VerbsRung(local, "gpudirect"),
        "verbs": lambda: VerbsRung(local, "host"),
        "tcp": lambda: TcpRung(streams),
        "nixl": NixlRung,
    }
    unknown = [name for name in order if name not in makers]
    if unknown:
        raise ValueError(f"no rung called {unknown[0]!r}; there are {', '.join(makers)}")
    return [makers[name]() for name in order]


class Peer:
    """One other instance. Connects in the constructor; raises PeerLostError or AuthenticationError.

    endpoint: host:port of its TransferServer. order: rungs to consider, best first. timeout: seconds for one
    question. on_lost: called once by the thread of `keep_alive` when the connection has ended.
    """

    def __init__(
        self,
        endpoint: str,
        key: bytes,
        instance: str,
        local: LocalDevice | None = None,
        *,
        order: Sequence[str] = DEFAULT_ORDER,
        streams: int = 0,
        timeout: float = 5.0,
        on_lost: Callable[[Peer], None] | None = None,
    ) -> None:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise PeerLostError(f"{endpoint!r} is no transfer endpoint; it should be host:port")
        self.endpoint, self.host, self.port, self.key = endpoint, host.strip("[]"), int(port), check_key(key)
        self.timeout = timeout
        self._lock = threading.Lock()
        self._rests: dict[str, float] = {}
        self._verdicts: dict[int, list[tuple[Rung, str]]] = {}
        self._closed = False
        self._ping: threading.Thread | None = None
        self._stop = threading.Event()
        self._on_lost = on_lost
        self._ending = threading.Lock()
        self._owns_local = local is None
        self._local = local or LocalDevice()
        self._rungs = make_rungs(order, self._local, streams)
        try:
            self._sock = socket.create_connection((self.host, self.port), timeout=timeout)
        except OSError as error:
            raise PeerLostError(f"{endpoint} cannot be reached: {error}") from None
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            deadline = wire.Deadline(timeout)
            prove_as_client(self._sock, self.key, deadline)
            wire.send(self._sock, wire.Hello(version=wire.VERSION, instance=instance, boot_id=boot_id()))
            reply = wire.receive_reply(self._sock, deadline)
            self._sock.settimeout(timeout)
            if not isinstance(reply, wire.Welcome):
                raise PeerLostError(f"{endpoint} did not welcome us: {getattr(reply, 'message', reply)}")
        except (OSError, DeadlineError) as error:
            self._sock.close()
            raise PeerLostError(f"{endpoint}: {error}") from None
        except BaseException:
            self._sock.close()
            raise
        self.welcome: wire.Welcome = reply

    # ---- the control connection ----

    @property
    def alive(self) -> bool:
        """False once the control connection has failed; the peer must then be connected anew."""
        return not self._closed

    def control_fileno(self) -> int:
        return self._sock.fileno()

    def ask(self, request: wire.Message) -> wire.Reply:
        """One question. Raises PeerLostError, after which this object is of no more use."""
        with self._lock:
            if self._closed:
                raise PeerLostError(f"{self.endpoint} is not connected any more")
            try:
                wire.send(self._sock, request)
                return wire.receive_reply(self._sock)
            except TransferError as error:
                # An answer that comes late would be taken for the answer to the next question.
                self.hang_up()
                raise PeerLostError(f"{self.endpoint}: {error}") from None

    def keep_alive(self) -> None:
        """Starts a thread that pings three times per lease time, so that long reads keep their leases."""
        if self._ping is None:
            self._ping = threading.Thread(target=self._pings, daemon=True, name="loraserve-peer")
            self._ping.start()

    def _pings(self) -> None:
        while not self._stop.wait(self.welcome.lease_s / 3):
            try:
                self.ask(wire.Ping())
            except PeerLostError as error:
                logger.info("transfer: %s", error)
            self._tend()
        if self._on_lost is not None:
            self._on_lost(self)

    def _tend(self) -> None:
        for rung in self._rungs:
            rung.tend()

    def hang_up(self) -> None:
        """No more questions; the thread of `keep_alive` tells `on_lost`. Returns at once."""
        self._closed = True
        self._stop.set()

    def catalogue(self) -> tuple[AdapterPages, ...]:
        """Every adapter that the peer offers now."""
        reply = self.ask(wire.GetCatalogue())
        if not isinstance(reply, wire.Catalogue):
            raise PeerLostError(f"{self.endpoint} gave no catalogue: {reply}")
        return reply.adapters

    # ---- one small interface: lease, read, verify, release ----

    def lease(self, wanted: Wanted, *, rdma: bool = False) -> wire.Leased:
        """The right to read these pages until `release`. Raises NotHeldError, LayoutMismatchError,
        DigestMismatchError."""
        reply = self.ask(wire.OpenLease(name=wanted.name, layout=wanted.layout, digest=wanted.digest, rdma=rdma))
        if isinstance(reply, wire.Leased):
            try:
                if reply.pages.layout != wanted.layout:
                    raise LayoutMismatchError(f"{self.endpoint} offers another layout of {wanted.name}")
                if wanted.digest and reply.pages.digest != wanted.digest:
                    raise DigestMismatchError(f"{self.endpoint} offers other content under {wanted.name}")
                reply.pages.validate(self.welcome.slabs[reply.slab].size)
            except (ValueError, IndexError) as error:
                self.release(reply)
                raise RungFailedError(f"{self.endpoint} describes {wanted.name} wrongly: {error}") from None
            except TransferError:
                self.release(reply)
                raise
            return reply
        if isinstance(reply, wire.Refused):
            kinds: dict[str, type[TransferError]] = {
                "not_held": NotHeldError,
                "layout": LayoutMismatchError,
                "digest": DigestMismatchError,
                "revoked": GenerationChangedError,
            }
            raise kinds.get(reply.code, RungFailedError)(f"{self.endpoint}: {reply.message}")
        raise PeerLostError(f"{self.endpoint} answered a lease with {type(reply).__name__}")

    def verify(self, lease: wire.Leased, destination: Destination, sums: Sequence[int] | None) -> None:
        """After reading: is every page what the source said? Raises CorruptPageError."""
        if sums is None:
            offsets = page_offsets(lease.pages.page_lengths, destination.ranges)
            addresses = [destination.slab.address + offset for offset in offsets]
            sums = checksums(addresses, lease.pages.page_lengths, destination.slab.device)
        bad = [i for i, (got, want) in enumerate(zip(sums, lease.pages.checksums, strict=True)) if got != want]
        if bad:
            raise CorruptPageError(
                f"{lease.pages.name} from {self.endpoint}: page {bad[0]} arrived damaged ({len(bad)} of {len(sums)})"
            )

    def check(self, lease: wire.Leased, what: str) -> None:
        """Raises GenerationChangedError where the lease has ended or the source holds another generation now."""
        self._check_state(self.ask(wire.CheckLease(lease=lease.lease)), lease, what)

    def _check_state(self, state: wire.Reply, lease: wire.Leased, what: str) -> None:
        if not isinstance(state, wire.LeaseState) or not state.valid or state.generation != lease.pages.generation:
            raise GenerationChangedError(f"{self.endpoint} replaced {lease.pages.name} meanwhile ({what})")

    def finish(self, lease: wire.Leased) -> None:
        """Gives the lease back after reading. Raises GenerationChangedError where the source did not hold that
        generation all the while."""
        self._check_state(self.ask(wire.ReleaseLease(lease=lease.lease)), lease, "it was read")

    def release(self, lease: wire.Leased) -> None:
        """Gives the lease back, whatever became of it. A lost peer has released it already."""
        try:
            self.ask(wire.ReleaseLease(lease=lease.lease))
        except PeerLostError as error:
            logger.info("transfer: %s", error)

    def landed(self, lease: wire.Leased) -> None:
        """Tells the peer that a verified copy exists here; it need not answer, and may have gone."""
        with self._lock:
            if not self._closed:
                try:
                    wire.send(self._sock, wire.Landed(lease=lease.lease))
                except TransferError as error:
                    self.hang_up()  # half a message may be on the wire
                    logger.info("transfer: %s: %s", self.endpoint, error)

    # ---- rungs ----

    def rungs(self, destination_device: int = -1) -> list[Rung]:
        """The rungs that work for such a destination, best first; probed once, and logged with the
        reasons."""
        if destination_device not in self._verdicts:
            verdicts = [(rung, rung.probe(self, destination_device)) for rung in self._rungs]
            self._verdicts[destination_device] = verdicts
            chosen = next((rung.name for rung, why in verdicts if not why), "none")
            logger.info(
                "transfer: %s (%s) is read by %s; %s",
                self.welcome.instance,
                self.endpoint,
                chosen,
                "; ".join(f"{rung.name}: {why or 'works'}" for rung, why in verdicts),
            )
        now = time.monotonic()
        works = [rung for rung, why in self._verdicts[destination_device] if not why]
        return [rung for rung in works if self._rests.get(rung.name, 0.0) <= now] or works[-1:]

    def reasons(self, destination_device: int = -1) -> dict[str, str]:
        """For each rung: empty where it works, else why not."""
        self.rungs(destination_device)
        return {rung.name: why for rung, why in self._verdicts[destination_device]}

    def _rest(self, rung: Rung, error: TransferError) -> None:
        self._rests[rung.name] = time.monotonic() + REST_S
        logger.warning("transfer: %s by %s failed, next way for %.0f s: %s", self.endpoint, rung.name, REST_S, error)

    # ---- the whole of it ----

    def fetch(self, wanted: Wanted, landing: Landing, flight: Flight, device: int = -1) -> tuple[AdapterPages, str]:
        """Brings an adapter into `landing` and commits it there. Returns (the source's pages, the rung's
        name).

        device: of the landing's slab, for the choice of the rung. Raises a TransferError; the reservation is
        then undone.
        """
        failure: TransferError = RungFailedError(f"no way to {self.endpoint} works")
        attempts = 0
        for rung in self.rungs(device):
            while attempts < ATTEMPTS:
                try:
                    rung.prepare(self)
                    return self._fetch_once(rung, wanted, landing, flight), rung.name
                except RungFailedError as error:
                    self._rest(rung, error)
                    failure = error
                    break
                except (GenerationChangedError, CorruptPageError) as error:
                    attempts += 1
                    failure = error
                    logger.warning("transfer: try %d of %d: %s", attempts, ATTEMPTS, error)
                    flight.check()
            if attempts >= ATTEMPTS or not self.alive:
                break
        raise failure

    def _fetch_once(self, rung: Rung, wanted: Wanted, landing: Landing, flight: Flight) -> AdapterPages:
        lease = self.lease(wanted, rdma=rung.rdma)
        held, landed = True, False
        destination: Destination | None = None
        try:
            flight.begin(lease.pages.size)
            destination = landing.reserve(lease.pages)
            try:
                sums = rung.read(self, lease, destination, flight)
            except RungFailedError as error:
                # A revoked lease may show as a broken connection, and so may a dead peer: then it is the source, not
                # the way.
                try:
                    self.check(lease, str(error))
                except PeerLostError as lost:
                    raise PeerLostError(f"{error}; {lost}") from None
                raise
            held = False
            self.finish(lease)
            self.verify(lease, destination, sums)
            flight.check()
            landing.commit(lease.pages, destination)
            landed = True
        finally:
            if destination is not None and not landed:
                landing.abandon(destination)
            if held:
                self.release(lease)
        self.landed(lease)
        return lease.pages

    def close(self) -> None:
        """Ends the session; the peer takes all leases back. Twice is harmless."""
        self._stop.set()
        self._closed = True
        with self._ending:
            for rung in self._rungs:
                rung.close()
            self._sock.close()
        if self._ping is not None and self._ping is not threading.current_thread():
            self._ping.join(timeout=self.timeout + 1)
        if self._owns_local:
            self._local.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
