"""Group the tokens of a batch by the adapter slot that they use, on the host, once per step.

A group is all tokens of one slot, wherever they stand in the batch. Base-model tokens (slot -1) are in no
group, so that nothing downstream can touch their rows.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenGroups:
    """Tokens sorted by slot, in batch order within a slot.

    slots: int32 [groups], ascending. starts: int32 [groups + 1] into rows. rows: int32 [tokens with a slot],
    the token's row in the batch.
    """

    slots: IntArray
    starts: IntArray
    rows: IntArray
    whole_batch: bool
    """True when one group holds every token in batch order, so that no row needs to be gathered."""

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor | slice]]:
        """(slot, rows) of each group; rows are ready to index a tensor's first dimension."""
        if self.whole_batch:
            yield int(self.slots[0]), slice(0, len(self.rows))
            return
        for index, slot in enumerate(self.slots.tolist()):
            rows = self.rows[self.starts[index] : self.starts[index + 1]]
            first, last = int(rows[0]), int(rows[-1])
            if last - first + 1 == len(rows):
                yield slot, slice(first, last + 1)
            else:
                yield slot, torch.from_numpy(rows)

    def only(self, wanted: Set[int]) -> "TokenGroups":
        """The groups whose slot is in `wanted`."""
        keep = [index for index, slot in enumerate(self.slots.tolist()) if slot in wanted]
        if len(keep) == len(self.slots):
            return self
        if not keep:
            return NO_GROUPS
        parts = [self.rows[self.starts[index] : self.starts[index + 1]] for index in keep]
        starts = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int32)
        return TokenGroups(self.slots[keep], starts, np.concatenate(parts), False)


_NONE = np.empty(0, np.int32)
NO_GROUPS = TokenGroups(_NONE, np.zeros(1, np.int32), _NONE, False)


def group_by_slot(slots: IntArray) -> TokenGroups:
    """Groups of `slots`, int32 [tokens], -1 for a token of the base model."""
    if not len(slots) or int(slots.max()) < 0:
        return NO_GROUPS
    order = np.argsort(slots, kind="stable").astype(np.int32)
    ordered = slots[order]
    first = int(np.searchsorted(ordered, 0))
    order, ordered = order[first:], ordered[first:]
    edges = np.flatnonzero(np.diff(ordered)) + 1
    starts = np.concatenate(([0], edges, [len(order)])).astype(np.int32)
    return TokenGroups(
        slots=ordered[starts[:-1]],
        starts=starts,
        rows=np.ascontiguousarray(order),
        whole_batch=len(starts) == 2 and first == 0,
    )


def slots_of(lora_ids: Sequence[int], slot_of_id: Mapping[int, int]) -> IntArray:
    """Slot of each LoRA id; -1 for id 0 (the base model).

    Raises KeyError for an adapter without a slot: computing without it would be a wrong answer.
    """
    ids = np.asarray(lora_ids, dtype=np.int64)
    if not len(ids):
        return _NONE
    distinct, inverse = np.unique(ids, return_inverse=True)
    table = np.fromiter((slot_of_id[int(i)] if i > 0 else -1 for i in distinct), dtype=np.int32, count=len(distinct))
    return table[inverse]
