"""Relabelling: which physical server plays which part of a new placement, so that the fewest bytes move.

Servers of equal capacity and speed are interchangeable. Within such a class the parts of the new placement
are given to the servers by an optimal assignment, where the gain of (part, server) is the bytes of the
part's adapters that the server holds already (Jonker-Volgenant through scipy). Beyond `DENSE_LIMIT` servers
the dense matrix is too large; only the non-zero overlaps are then matched, greedily by gain, which is
within a factor of two of the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment

from vllm_loraserve.cluster.placement import Placement, PlacementInput

DENSE_LIMIT = 2000


def relabel(inp: PlacementInput, fresh: Placement) -> Placement:
    """`fresh` with its servers renamed inside classes of equal servers, for the least bytes moved from
    `inp.previous`."""
    if inp.previous is None or not inp.previous.phi:
        return fresh
    size = {a.name: a.bytes for a in inp.adapters}
    new = fresh.by_server()
    old_holders = {a: set(inp.previous.holders(a)) for a in size}
    classes: dict[tuple[int, int, int, float, int], list[str]] = {}
    for s in sorted(inp.servers, key=lambda s: s.name):
        classes.setdefault((s.capacity_rank_rows, s.host_bytes, s.slots, s.speed, s.max_rank), []).append(s.name)
    rename: dict[str, str] = {}
    for names in classes.values():
        gains: dict[tuple[int, int], int] = {}
        index = {s: j for j, s in enumerate(names)}
        for i, part in enumerate(names):
            for a in new.get(part, ()):
                for holder in old_holders.get(a, ()):
                    if holder in index:
                        key = (i, index[holder])
                        gains[key] = gains.get(key, 0) + size.get(a, 0)
        rename.update({names[i]: names[j] for i, j in _match(len(names), gains).items()})
    return rename_servers(fresh, rename)


def _match(n: int, gains: Mapping[tuple[int, int], int]) -> dict[int, int]:
    """Part -> server, every one once, with the largest total gain (staying put wins ties)."""
    if n <= DENSE_LIMIT:
        matrix = np.zeros((n, n))
        for (i, j), gain in gains.items():
            matrix[i, j] = gain
        matrix[np.arange(n), np.arange(n)] += 0.5
        rows, cols = linear_sum_assignment(matrix, maximize=True)
        return dict(zip(rows.tolist(), cols.tolist(), strict=True))
    out: dict[int, int] = {}
    taken: set[int] = set()
    for (i, j), _ in sorted(gains.items(), key=lambda kv: (-kv[1], kv[0][0] != kv[0][1], kv[0])):
        if i not in out and j not in taken:
            out[i] = j
            taken.add(j)
    free = [j for j in range(n) if j not in taken]
    own = set(free)
    rest = [i for i in range(n) if i not in out]
    for i in rest:
        if i in own:
            out[i] = i
            own.discard(i)
    left = sorted(own)
    for i in rest:
        if i not in out:
            out[i] = left.pop()
    return out


def rename_servers(placement: Placement, rename: Mapping[str, str]) -> Placement:
    """The placement with every server s called rename[s]."""
    return Placement(
        phi={a: dict(sorted((rename[s], v) for s, v in p.items())) for a, p in placement.phi.items()},
        standby={a: [rename[s] for s in ss] for a, ss in placement.standby.items()},
        unplaced=dict(placement.unplaced),
    )
