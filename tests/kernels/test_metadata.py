"""The tile and item lists: complete, disjoint, bounded, and equal to what the device buffers say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_loraserve.kernels.metadata import ENTRY, HEADER, StepMetadata, build_lists, tile_bound

batches = st.integers(1, 6).flatmap(
    lambda slots: st.tuples(
        st.lists(st.integers(-1, slots - 1), max_size=90),
        st.lists(st.sampled_from([0, 1, 7, 8, 16, 17, 64, 128]), min_size=slots, max_size=slots),
    )
)


@settings(deadline=None)
@given(batches, st.sampled_from([16, 64]), st.sampled_from([16, 32, 64]))
def test_every_token_is_in_exactly_one_tile_of_its_adapter(batch, block_m, block_r):
    token_slots, ranks = np.asarray(batch[0], np.int32), np.asarray(batch[1], np.int32)
    lists = build_lists(token_slots, ranks, block_m, block_r)
    seen = []
    for slot, start, length, _ in lists.tiles:
        assert 1 <= length <= block_m
        tokens = lists.perm[start : start + length]
        assert (token_slots[tokens] == slot).all()
        seen += tokens.tolist()
    wanted = [t for t, slot in enumerate(token_slots) if slot >= 0 and ranks[slot] > 0]
    assert sorted(seen) == wanted
    assert len(lists.tiles) <= tile_bound(len(token_slots), len(ranks), block_m)


@settings(deadline=None)
@given(batches, st.sampled_from([16, 32]))
def test_items_cover_each_adapters_own_rank_and_no_more(batch, block_r):
    token_slots, ranks = np.asarray(batch[0], np.int32), np.asarray(batch[1], np.int32)
    lists = build_lists(token_slots, ranks, 16, block_r)
    expected = [
        (slot, start, length, block)
        for slot, start, length, _ in lists.tiles.tolist()
        for block in range(-(-int(ranks[slot]) // block_r))
    ]
    assert [tuple(item) for item in lists.items.tolist()] == expected


@settings(deadline=None, max_examples=50)
@given(batches, st.sampled_from([8, 200]))
def test_the_device_buffers_hold_the_lists(batch, graph_tokens):
    metadata = StepMetadata(slots=len(batch[1]), max_rank=128, graph_tokens=graph_tokens, device="cpu")
    for slot, rank in enumerate(batch[1]):
        metadata.set_slot_rank(slot, rank)
    token_slots = np.asarray(batch[0], np.int32)
    plan = metadata.build(token_slots)
    lists = build_lists(token_slots, metadata.slot_ranks, plan.block_m, plan.block_r)
    assert plan.header.tolist()[:3] == [len(lists.tiles), len(lists.items), lists.perm.size]
    assert plan.tiles[: plan.n_tiles].tolist() == lists.tiles.tolist()
    assert plan.items[: plan.n_items].tolist() == lists.items.tolist()
    assert plan.perm[: plan.n_sorted].tolist() == lists.perm.tolist()
    assert plan.fixed == (len(batch[0]) <= graph_tokens)


def test_graph_buffers_never_move_and_hold_the_worst_batch():
    metadata = StepMetadata(slots=7, max_rank=128, graph_tokens=100, device="cpu")
    first = metadata.build(np.zeros(1, np.int32))
    worst = metadata.build(np.arange(100, dtype=np.int32) % 7)
    for name in ("header", "perm", "tiles", "items"):
        assert getattr(first, name).data_ptr() == getattr(worst, name).data_ptr()
        assert getattr(first, name).shape == getattr(worst, name).shape
    assert worst.n_items <= worst.items.shape[0]
    assert worst.n_items == worst.n_tiles * 8


def test_a_short_batch_sends_only_its_own_words():
    metadata = StepMetadata(slots=64, max_rank=256, graph_tokens=512, device="cpu")
    metadata._fixed.fill_(-7)
    plan = metadata.build(np.zeros(1, np.int32))
    touched = HEADER + 512 + metadata._graph_tiles * ENTRY + plan.n_items * ENTRY
    assert (metadata._fixed[touched:] == -7).all()
    assert touched < metadata._fixed.numel() / 2


def test_an_unknown_slot_rank_counts_as_the_largest():
    metadata = StepMetadata(slots=2, max_rank=64, graph_tokens=16, device="cpu")
    assert metadata.build(np.zeros(1, np.int32)).n_items == 4
    metadata.set_slot_rank(0, 8)
    assert metadata.plan.n_items == 1, "the current plan follows a rank that changes under it"


def test_a_change_of_an_unused_slot_leaves_the_plan_alone():
    metadata = StepMetadata(slots=2, max_rank=64, graph_tokens=16, device="cpu")
    plan = metadata.build(np.zeros(1, np.int32))
    metadata.set_slot_rank(1, 8)
    assert metadata.plan is plan


def test_batch_invariance_keeps_the_same_blocks_for_every_batch():
    metadata = StepMetadata(slots=2, max_rank=64, graph_tokens=4, device="cpu", batch_invariant=True)
    small, large = metadata.build(np.zeros(2, np.int32)), metadata.build(np.zeros(999, np.int32))
    assert (small.block_m, small.block_r) == (large.block_m, large.block_r)
    assert not large.fixed


def test_bad_input_is_named():
    metadata = StepMetadata(slots=2, max_rank=64, graph_tokens=16, device="cpu")
    with pytest.raises(ValueError, match=r"-1\.\.1, got 0\.\.2"):
        metadata.build(np.asarray([0, 2], np.int32))
    with pytest.raises(ValueError, match="slot 2 does not exist"):
        metadata.set_slot_rank(2, 8)
    with pytest.raises(ValueError, match=r"rank 65 is outside 0\.\.64"):
        metadata.set_slot_rank(0, 65)
    with pytest.raises(ValueError, match="at least 1"):
        StepMetadata(slots=0, max_rank=64, graph_tokens=16, device="cpu")
