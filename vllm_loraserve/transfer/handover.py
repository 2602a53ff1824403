"""Lazy migration, seen from the instance that gives an adapter away.

Placement moves an adapter at no cost: the first request at its new place fetches it from here. This copy may go only
when a new one has been confirmed, or when the checkpoint can be read and nobody needs this copy. Pure: told, and asked.
"""

from __future__ import annotations

import threading


class Handover:
    """Which of our adapters placement has taken from us, and which of those have arrived elsewhere."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leaving: dict[str, set[str]] = {}
        """name -> peers that have confirmed a copy since it began to leave."""

    def leave(self, name: str) -> None:
        """Placement no longer wants the adapter here. Again is harmless."""
        with self._lock:
            self._leaving.setdefault(name, set())

    def stay(self, name: str) -> None:
        """Placement wants it here again, or it is gone."""
        with self._lock:
            self._leaving.pop(name, None)

    def landed(self, name: str, peer: str) -> None:
        """`peer` has verified a copy (`PageStore.landed`)."""
        with self._lock:
            if name in self._leaving:
                self._leaving[name].add(peer)

    def may_go(self, name: str, *, copies_elsewhere: int = 0, checkpoint_readable: bool = False) -> bool:
        """Whether our copy may be dropped now.

        copies_elsewhere: other live holders by the last table. The last copy of all stays while its checkpoint cannot
        be read, whether or not placement wants it here.
        """
        with self._lock:
            confirmed = self._leaving.get(name)
        if confirmed is None:
            return checkpoint_readable or copies_elsewhere > 0
        return bool(confirmed) or copies_elsewhere > 0 or checkpoint_readable

    def ready(self) -> list[str]:
        """Adapters that are leaving and have arrived elsewhere, by name."""
        with self._lock:
            return sorted(name for name, peers in self._leaving.items() if peers)
