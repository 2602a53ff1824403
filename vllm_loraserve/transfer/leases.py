"""The leases a server has given out: who may read which pages, until when, and how that ends.

A lease ends once: released by its holder, lost with its session, expired, or revoked by the store's owner. However it
ends, `on_end` runs exactly once (it takes back the memory registration) before the store's pin is undone. Pure
bookkeeping: time is passed in, sockets are elsewhere.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable

from vllm_loraserve.transfer.pages import AdapterPages, PageStore

logger = logging.getLogger(__name__)


class Lease:
    """One reader's hold on one adapter's pages."""

    def __init__(self, number: int, session: int, store: PageStore, store_index: int, pages: AdapterPages) -> None:
        self.number, self.session, self.store, self.store_index, self.pages = number, session, store, store_index, pages
        self.expires = 0.0
        self.on_end: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._readers: list[Callable[[], None] | None] = []
        self._ended = False

    @property
    def valid(self) -> bool:
        """False from the moment the lease ends."""
        return not self._ended

    def guard(self, on_end: Callable[[], None]) -> bool:
        """`on_end` is to run when the lease ends; False where it has ended already: then it has just run."""
        with self._lock:
            if not self._ended:
                self.on_end = on_end
                return True
        on_end()
        return False

    def enter(self, interrupt: Callable[[], None] | None = None) -> bool:
        """A server thread begins to read the pages on the holder's behalf; False where the lease has ended.

        `interrupt` makes it stop soon, when it would otherwise wait for a holder that takes nothing.
        """
        with self._lock:
            if self._ended:
                return False
            self._readers.append(interrupt)
            return True

    def leave(self, interrupt: Callable[[], None] | None = None) -> None:
        """Undoes one successful `enter` with the same argument."""
        with self._lock:
            self._readers.remove(interrupt)
            self._idle.notify_all()

    def end(self, *, interrupt: bool = True) -> bool:
        """Ends the lease: no new readers, those inside leave first, then the registration and the pin go.

        interrupt: tell those inside to stop; without it, wait until they are done. True for the one caller that ended
        it.
        """
        with self._lock:
            if self._ended:
                return False
            self._ended = True
            for stop in self._readers if interrupt else ():
                if stop is not None:
                    stop()
            while self._readers:
                self._idle.wait()
        try:
            if self.on_end is not None:
                self.on_end()
        finally:
            self.store.release(self.pages)
        return True


class LeaseTable:
    """All live leases of one server. `ttl` in seconds: a session that says nothing for so long loses its leases."""

    def __init__(self, ttl: float) -> None:
        self.ttl = ttl
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._leases: dict[int, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def open(self, session: int, store: PageStore, index: int, pages: AdapterPages, now: float) -> Lease:
        """A lease on pages that the caller has already acquired from the store; the lease now owns that pin."""
        with self._lock:
            lease = Lease(next(self._numbers), session, store, index, pages)
            lease.expires = now + self.ttl
            self._leases[lease.number] = lease
            return lease

    def get(self, number: int, session: int) -> Lease | None:
        """The live lease of this number, if this session holds it."""
        lease = self._leases.get(number)
        return lease if lease is not None and lease.session == session and lease.valid else None

    def renew(self, session: int, now: float) -> None:
        """The session gave a sign of life."""
        with self._lock:
            for lease in self._leases.values():
                if lease.session == session:
                    lease.expires = now + self.ttl

    def _end(self, chosen: Callable[[Lease], bool], *, interrupt: bool = True) -> int:
        """How many of the chosen leases that ended; one whose `on_end` fails keeps none of the others."""
        with self._lock:
            ending = [lease for lease in self._leases.values() if chosen(lease)]
            for lease in ending:
                del self._leases[lease.number]
        ended = 0
        for lease in ending:
            try:
                ended += lease.end(interrupt=interrupt)
            except Exception:
                ended += 1
                logger.exception("transfer: the end of a lease on %s did not go well", lease.pages.name)
        return ended

    def end(self, lease: Lease) -> bool:
        """The holder gives it back: it has all it wants, whoever is still inside is about to leave. False where the
        lease had ended before, so that its pages may have changed."""
        return self._end(lambda other: other is lease, interrupt=False) > 0

    def end_session(self, session: int) -> int:
        """The holder is gone; how many leases that ended."""
        return self._end(lambda lease: lease.session == session)

    def end_registered(self, session: int) -> int:
        """The session's registrations go with its queue pair; how many leases that ended."""
        return self._end(lambda lease: lease.session == session and lease.on_end is not None)

    def end_adapter(self, name: str) -> int:
        """Hard revocation: returns when nobody can read these pages any more; how many leases that ended."""
        return self._end(lambda lease: lease.pages.name == name)

    def end_expired(self, now: float) -> int:
        """Holders that hang; how many leases that ended."""
        return self._end(lambda lease: lease.expires < now)
