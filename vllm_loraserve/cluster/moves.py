"""The difference of two placements as moves: what has to be copied, what can be dropped, how many bytes
that is."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from vllm_loraserve.cluster.placement import AdapterSpec, Placement


class Move(msgspec.Struct, frozen=True):
    """One copy to make (`kind` "copy") or to drop ("drop"). `sources`: servers that hold the adapter before
    the move; empty: it comes from the checkpoint. `bytes`: what crosses a link (0 for a drop)."""

    kind: str
    adapter: str
    server: str
    bytes: int
    sources: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True):
    """All moves from one placement to another; `held_bytes` is the size of all copies of the new
    placement."""

    moves: list[Move]
    bytes_copied: int
    held_bytes: int
    phi_changed: int

    @property
    def moved_fraction(self) -> float:
        """Bytes copied / bytes held."""
        return self.bytes_copied / self.held_bytes if self.held_bytes else 0.0


def diff(adapters: Iterable[AdapterSpec], before: Placement | None, after: Placement) -> Plan:
    """Copies and drops that lead from `before` to `after` (copies first: a drop waits for the copy).

    `phi_changed` counts adapters whose fractions changed by more than one percent, copies or not.
    """
    before = before if before is not None else Placement()
    copies, drops = [], []
    copied = held = changed = 0
    for a in sorted(adapters, key=lambda a: a.name):
        old, new = before.holders(a.name), after.holders(a.name)
        held += a.bytes * len(new)
        for server in new:
            if server not in old:
                copies.append(Move("copy", a.name, server, a.bytes, tuple(old)))
                copied += a.bytes
        drops += [Move("drop", a.name, server, 0) for server in old if server not in new]
        was, now = before.phi.get(a.name, {}), after.phi.get(a.name, {})
        changed += any(abs(was.get(s, 0.0) - now.get(s, 0.0)) > 0.01 for s in {*was, *now})
    return Plan(copies + drops, copied, held, changed)
