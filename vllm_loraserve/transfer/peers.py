"""The peers that we are connected to: connected when first needed, kept, given a rest after a failure."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from vllm_loraserve.transfer.errors import AuthenticationError, PeerLostError, TransferError
from vllm_loraserve.transfer.peer import DEFAULT_ORDER, Peer
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
            gate = self._connecting.setdefault(endpoint, threading.Lock())
        with gate:  # one connection at a time to an endpoint; other endpoints do not wait for it
            with self._lock:
                peer = self._peers.get(endpoint)
                if peer is not None and peer.alive:
                    return peer
                self._peers.pop(endpoint, None)
            if peer is not None:
                peer.close()
            try:
                peer = Peer(endpoint, self._key, self._instance, self.local, order=self._order, streams=self._streams)
            except (PeerLostError, AuthenticationError):
                self.rest(endpoint)
                raise
            peer.keep_alive()
            with self._lock:
                if not self._closed:
                    self._peers[endpoint] = peer
                    return peer
            peer.close()
            raise PeerLostError("the pool is closed")

    def rest(self, endpoint: str) -> None:
        """The endpoint failed: for a while others go first."""
        with self._lock:
            self._rests[endpoint] = self._clock() + self._rest_s

    def rested_first(self, endpoints: Sequence[str]) -> list[str]:
        """The same endpoints, those that failed lately last; the order is kept otherwise."""
        now = self._clock()
        with self._lock:
            return sorted(endpoints, key=lambda endpoint: self._rests.get(endpoint, 0.0) > now)

    def forget(self, endpoint: str) -> None:
        """The instance left the cluster."""
        with self._lock:
            peer = self._peers.pop(endpoint, None)
            self._rests.pop(endpoint, None)
        if peer is not None:
            peer.close()

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
