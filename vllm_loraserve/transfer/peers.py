"""The peers that we are connected to: connected when first needed, kept, given a rest after a failure."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from vllm_loraserve.transfer.errors import AuthenticationError, PeerLostError, TransferError
from vllm_loraserve.transfer.peer import Peer
from vllm_loraserve.transfer.rungs import DEFAULT_ORDER
from vllm_loraserve.transfer.rungs.verbs import LocalDevice

logger = logging.getLogger(__name__)


class PeerTable:
    """Connections of one process by endpoint. rest_s: seconds for which an endpoint that failed comes last."""

    def __init__(
        self,
        key: bytes,
        instance: str,
        *,
        order: Sequence[str] = DEFAULT_ORDER,
        streams: int = 0,
        verbs: str = "auto",
        rest_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key, self._instance, self._order, self._streams = key, instance, tuple(order), streams
        self._rest_s, self._clock = rest_s, clock
        self.local = LocalDevice(verbs)
        self._lock = threading.Lock()
        self._peers: dict[str, Peer] = {}
        self._connecting: dict[str, threading.Lock] = {}
        self._rests: dict[str, float] = {}
        self._closed = False

    def get(self, endpoint: str) -> Peer:
        """A live connection. Raises PeerLostError or AuthenticationError where there is none to be had."""
        with self._lock:
            if self._closed:
                raise PeerLostError("the pool is closed")
            if (peer := self._peers.get(endpoint)) is not None and peer.alive:
                return peer
            gate = self._connecting.setdefault(endpoint, threading.Lock())
        try:
            with gate:  # one connection at a time to an endpoint; other endpoints do not wait for it
                return self._connect(endpoint)
        finally:
            with self._lock:
                self._connecting.pop(endpoint, None)

    def _connect(self, endpoint: str) -> Peer:
        with self._lock:
            if (peer := self._peers.get(endpoint)) is not None and peer.alive:
                return peer
        try:
            made = Peer(
                endpoint,
                self._key,
                self._instance,
                self.local,
                order=self._order,
                streams=self._streams,
                on_lost=self._drop,
            )
        except (PeerLostError, AuthenticationError):
            self.rest(endpoint)
            raise
        made.keep_alive()
        with self._lock:
            before = self._peers.get(endpoint)
            if not self._closed and (before is None or not before.alive):
                self._peers[endpoint] = made
                return made
        made.close()
        if before is not None and before.alive:
            return before
        raise PeerLostError("the pool is closed")

    def _drop(self, peer: Peer) -> None:
        """The connection is lost: what it holds (a mapping of the peer's whole slab, for one) goes now, since a worker
        that comes again has another endpoint."""
        peer.close()  # before it is out of the table, so that `close` waits for it
        with self._lock:
            if self._peers.get(peer.endpoint) is peer:
                del self._peers[peer.endpoint]

    def rest(self, endpoint: str) -> None:
        """The endpoint failed: for a while others go first."""
        now = self._clock()
        with self._lock:
            self._rests = {other: end for other, end in self._rests.items() if end > now}
            self._rests[endpoint] = now + self._rest_s

    def rested_first(self, endpoints: Sequence[str]) -> list[str]:
        """The same endpoints, those that failed lately last; the order is kept otherwise."""
        now = self._clock()
        with self._lock:
            return sorted(endpoints, key=lambda endpoint: self._rests.get(endpoint, 0.0) > now)

    def forget(self, endpoint: str) -> None:
        """The instance left the cluster. Returns at once; the connection is closed aside."""
        with self._lock:
            peer = self._peers.get(endpoint)
            self._rests.pop(endpoint, None)
        if peer is not None:
            peer.hang_up()

    def close(self) -> None:
        """Ends every session. Twice is harmless."""
        with self._lock:
            self._closed = True
            peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            try:
                peer.close()
            except TransferError:
                logger.exception("transfer: %s did not close", peer.endpoint)
        self.local.close()
