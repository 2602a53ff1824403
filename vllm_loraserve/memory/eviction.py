"""Which adapters to evict: least (demand x cost to bring back) per byte first. Pure; the time is passed in.

An adapter is worth keeping if it will be wanted soon (demand) and is expensive to bring back (seconds); per
byte, because a byte is what eviction is after. With equal demand and a cost that grows with size this is
least-frequently-used with decay; a fixed cost per load makes small adapters stay longer.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Candidate(NamedTuple, Generic[Key]):
    """Something that may be evicted now."""

    key: Key
    size: int
    """Bytes, above 0."""
    load_seconds: float
    """Time to bring it back from the best source that is left."""
    demand: float
    """Recent uses, decayed; see `Demand`."""


def eviction_order(candidates: Iterable[Candidate[Key]]) -> list[Key]:
    """All candidates, the one that is best to lose first. Ties keep the given order."""
    ranked = sorted(candidates, key=lambda c: c.demand * c.load_seconds / max(c.size, 1))
    return [candidate.key for candidate in ranked]


def cheapest_stretch(
    free: Iterable[tuple[int, int]], held: Mapping[tuple[int, int], Candidate[Key]], size: int
) -> list[Key] | None:
    """Whom to evict for `size` contiguous bytes: what is lost (demand x cost to bring back) is as little as can be,
    then the bytes of it. None where no stretch is that long.

    free, held: (offset, length) of what is free and of what each candidate occupies; what is in neither stays.
    """
    pieces: list[tuple[int, int, Candidate[Key] | None]] = sorted(
        [(*place, None) for place in free] + [(*place, candidate) for place, candidate in held.items()],
        key=lambda piece: piece[0],
    )
    best: tuple[float, int, list[Key]] | None = None
    first = length = 0
    for at, (offset, piece, _) in enumerate(pieces):
        if at and sum(pieces[at - 1][:2]) != offset:
            first, length = at, 0
        length += piece
        while length - pieces[first][1] >= size:
            length -= pieces[first][1]
            first += 1
        if length >= size:
            inside = [candidate for _, _, candidate in pieces[first : at + 1] if candidate is not None]
            loss = sum(candidate.demand * candidate.load_seconds for candidate in inside)
            lost = sum(candidate.size for candidate in inside)
            if best is None or (loss, lost) < best[:2]:
                best = (loss, lost, [candidate.key for candidate in inside])
    return best[2] if best is not None else None


def load_seconds(size: int, bytes_per_second: float, fixed_seconds: float) -> float:
    """Estimated time to bring `size` bytes from a source."""
    return fixed_seconds + size / bytes_per_second


_NEGLIGIBLE = 1e-3
"""Recent uses; fewer count as none: one use, ten half-lives ago."""
_PRUNE_ABOVE = 1024
"""Keys, beyond twice those in demand, before the others are forgotten."""


class Demand(Generic[Key]):
    """Exponentially decayed count of uses: a use `half_life` seconds ago counts half."""

    def __init__(self, half_life: float = 60.0) -> None:
        self._rate = math.log(2) / half_life
        self._value: dict[Key, tuple[float, float]] = {}
        self._prune_at = _PRUNE_ABOVE

    def __len__(self) -> int:
        return len(self._value)

    def use(self, key: Key, now: float, amount: float = 1.0) -> None:
        self._value[key] = (self.of(key, now) + amount, now)
        if len(self._value) > self._prune_at:
            self._value = {key: value for key, value in self._value.items() if self.of(key, now) > _NEGLIGIBLE}
            self._prune_at = _PRUNE_ABOVE + 2 * len(self._value)

    def of(self, key: Key, now: float) -> float:
        value, since = self._value.get(key, (0.0, now))
        return value * math.exp(-self._rate * max(now - since, 0.0))

    def forget(self, key: Key) -> None:
        self._value.pop(key, None)


def fits(needed: Sequence[int], free: Sequence[int]) -> bool:
    """Whether `free` pages serve `needed` pages in every group."""
    return all(need <= have for need, have in zip(needed, free, strict=True))
