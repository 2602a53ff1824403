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
        self._confirmed: dict[str, set[str]] = {}
        """name -> peers that have verified a copy of ours."""
        self._holders: dict[str, set[str]] = {}
        """name -> who holds it elsewhere, by the last table and what was confirmed since."""

    def landed(self, name: str, peer: str) -> None:
        """`peer` has verified a copy of ours (`PageStore.landed`)."""
        with self._lock:
            self._confirmed.setdefault(name, set()).add(peer)
            self._holders.setdefault(name, set()).add(peer)

    def located(self, name: str, holders: Iterable[str]) -> None:
        """The location table's row, without ourselves: a peer that is not in it any more does not count."""
        with self._lock:
            self._holders[name] = set(holders)

    def forget(self, name: str) -> None:
        """Our copy is gone, or is other content now: nobody has copied this one."""
        with self._lock:
            self._confirmed.pop(name, None)

    def may_go(self, name: str, *, checkpoint_readable: bool = False) -> bool:
        """Whether our copy may be dropped now."""
        with self._lock:
            return checkpoint_readable or bool(self._confirmed.get(name, set()) & self._holders.get(name, set()))
