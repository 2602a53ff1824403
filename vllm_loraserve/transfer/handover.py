"""Which of our copies the cluster can do without: no last copy of an adapter goes, unless its checkpoint can be read.

Placement moves an adapter at no cost: the first request at its new place fetches it from here, and this copy may go
when the new one is confirmed. So a copy relies on copies that were made from it, and on no others: those are younger,
so no two copies rely on each other, however late they hear of one another, and the youngest one stays. Pure: told, and
asked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable


class Handover:
    """What one instance knows of copies elsewhere."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._confirmed: dict[tuple[str, str], set[str]] = {}
        """(name, digest) -> peers that have verified a copy of ours."""
        self._holders: dict[tuple[str, str], set[str]] = {}
        """(name, digest) -> who holds it elsewhere, by the last table and what was confirmed since."""

    def landed(self, name: str, digest: str, peer: str) -> None:
        """`peer` has verified a copy of ours (`PageStore.landed`)."""
        with self._lock:
            self._confirmed.setdefault((name, digest), set()).add(peer)
            self._holders.setdefault((name, digest), set()).add(peer)

    def located(self, name: str, digest: str, holders: Iterable[str]) -> None:
        """The location table's row, without ourselves: a peer that is not in it any more does not count, nor does any
        for other content of the name."""
        with self._lock:
            self._holders = {key: peers for key, peers in self._holders.items() if key[0] != name}
            self._holders[name, digest] = set(holders)

    def forget(self, name: str) -> None:
        """Our copy is gone: nobody has copied the next one."""
        with self._lock:
            self._confirmed = {key: peers for key, peers in self._confirmed.items() if key[0] != name}

    def may_go(self, name: str, digest: str, *, checkpoint_readable: bool = False) -> bool:
        """Whether our copy of this content may be dropped now."""
        with self._lock:
            confirmed, holders = (known.get((name, digest), set()) for known in (self._confirmed, self._holders))
            return checkpoint_readable or bool(confirmed & holders)
