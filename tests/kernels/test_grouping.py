"""kernels/grouping.py: every adapter token is in exactly one group, no base token in any."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_loraserve.kernels.grouping import group_by_slot, slots_of


@given(st.lists(st.integers(-1, 5), max_size=40), st.sets(st.integers(0, 5)))
def test_groups_partition_the_adapter_tokens(slots: list[int], wanted: set[int]) -> None:
    groups = group_by_slot(np.array(slots, np.int32))
    kept = group_by_slot(np.array([slot if slot in wanted else -1 for slot in slots], np.int32))
    only = groups.only(wanted)
    assert [(slot, np.arange(len(slots))[rows].tolist()) for slot, rows in only] == [
        (slot, np.arange(len(slots))[rows].tolist()) for slot, rows in kept
    ]
    rows: dict[int, list[int]] = {}
    for slot, index in groups:
        assert slot not in rows
        rows[slot] = list(range(len(slots)))[index] if isinstance(index, slice) else index.tolist()
    assert rows == {slot: [row for row, s in enumerate(slots) if s == slot] for slot in sorted(set(slots)) if slot >= 0}
    assert groups.whole_batch == (len(set(slots)) == 1 and slots[0] >= 0)


def test_slots_of_ids() -> None:
    assert slots_of([0, 7, 7, 0, 3], {7: 2, 3: 0}).tolist() == [-1, 2, 2, -1, 0]
    assert slots_of([], {}).tolist() == []
    with pytest.raises(KeyError):
        slots_of([9], {7: 2})
