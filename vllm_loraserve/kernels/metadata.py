"""Step metadata: which tokens belong to which adapter, as compact lists of work that the kernels walk on the
device.

Built once per batch in numpy and sent by one asynchronous copy. Two lists are made from the tokens sorted by
slot:

- *tiles*: (slot, start, length, 0): up to `block_m` consecutive sorted tokens of one adapter;
- *items*: (slot, start, length, rank block): a tile times the `block_r`-wide blocks of its adapter's own
  rank.

There is no entry for an adapter without tokens, for a base-model token, or for ranks that an adapter does not
have. How many entries are live is read by the kernels on the device, so that a captured CUDA graph, whose
grid is fixed, follows every later batch.

Two regimes. A batch of up to `graph_tokens` tokens may be replayed by a CUDA graph: it is written into
buffers whose addresses never change, always with the same block sizes. A larger batch runs eagerly, so that
its lists get buffers and block sizes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_loraserve.kernels.tuning import EAGER_BLOCKS, GRAPH_BLOCK_M, GRAPH_BLOCK_R, cdiv, prefill_blocks

HEADER = 4
"""int32 words at the head of a packed buffer: live tiles, live items, live tokens, reserved."""
ENTRY = 4
"""int32 words of a tile or an item."""

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class StepPlan:
    """The lists of one batch on the device, and what the host knows about them.

    header int32 [4], perm int32 [>= n_sorted], tiles and items int32 [>= n, 4]; see the module docstring.
    `fixed` says that the addresses are those a CUDA graph may capture.
    """

    header: torch.Tensor
    perm: torch.Tensor
    tiles: torch.Tensor
    items: torch.Tensor
    n_tokens: int
    n_sorted: int
    n_tiles: int
    n_items: int
    n_active: int
    top_rank: int
    block_m: int
    block_r: int
    fixed: bool


@dataclass(frozen=True)
class HostLists:
    """The same lists in host memory: the outcome of the pure function `build_lists`."""

    perm: IntArray
    tiles: IntArray
    items: IntArray
    n_active: int
    top_rank: int


def aligned_room(words: int) -> int:
    """Room for `words` int32 after which the next begins on 16 bytes: Triton compiles anew for another alignment."""
    return cdiv(words, 4) * 4


def tile_bound(tokens: int, slots: int, block_m: int) -> int:
    """The most tiles that `tokens` tokens over at most `slots` adapters can make: sum of ceil(n_i /
    block_m)."""
    active = min(tokens, slots)
    return (tokens + active * (block_m - 1)) // block_m


def build_lists(token_slots: IntArray, slot_ranks: IntArray, block_m: int, block_r: int) -> HostLists:
    """Sort the tokens by slot (stable) and list tiles and items.

    token_slots int32 [tokens], -1 for the base model; slot_ranks int32 [slots]: the largest rank that the
    slot's adapter has in any module (a slot of rank 0 gets no work).
    """
    order = np.argsort(token_slots, kind="stable").astype(np.int32)
    ordered = token_slots[order]
    first = int(np.searchsorted(ordered, 0))
    slots, starts, counts = np.unique(ordered[first:], return_index=True, return_counts=True)
    ranks = slot_ranks[slots] if slots.size else np.zeros(0, np.int32)
    live = ranks > 0
    slots, starts, counts, ranks = slots[live], starts[live], counts[live], ranks[live]
    per_slot = -(-counts // block_m)
    tiles = np.zeros((int(per_slot.sum()), ENTRY), np.int32)
    owner = np.repeat(np.arange(slots.size), per_slot)
    within = _ramp(per_slot) * block_m
    tiles[:, 0] = slots[owner]
    tiles[:, 1] = starts[owner] + within
    tiles[:, 2] = np.minimum(counts[owner] - within, block_m)
    blocks = -(-ranks[owner] // block_r)
    items = np.repeat(tiles, blocks, axis=0)
    items[:, 3] = _ramp(blocks)
    return HostLists(order[first:], tiles, items, int(slots.size), int(ranks.max(initial=0)))


def _ramp(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """0..c-1 for each c of counts, concatenated."""
    total = int(counts.sum())
    ends = np.cumsum(counts)
    return np.arange(total) - np.repeat(ends - counts, counts)


class StepMetadata:
    """Keeps the device buffers and turns a batch's token -> slot mapping into a `StepPlan`.

    slots: how many adapters can be active; max_rank: the largest rank that a slot may hold; graph_tokens: the
    largest (padded) batch that may be captured in a CUDA graph; batch_invariant: the same block sizes for
    every batch, so that a token's result does not depend on its company; blocks:
    (tokens per tile, rank rows per item) for every batch instead of the formulas' choice (tuning). Not
    thread-safe: one model runner calls it, in step order.
    """

    def __init__(
        self,
        *,
        slots: int,
        max_rank: int,
        graph_tokens: int,
        device: torch.device | str,
        batch_invariant: bool = False,
        blocks: tuple[int, int] | None = None,
    ) -> None:
        if slots < 1 or max_rank < 1 or graph_tokens < 1:
            raise ValueError(
                f"slots, max_rank and graph_tokens must be at least 1, got {slots}, {max_rank}, {graph_tokens}"
            )
        self.slots = slots
        self.max_rank = max_rank
        self.graph_tokens = graph_tokens
        self.batch_invariant = batch_invariant
        self._blocks = blocks
        self._graph_blocks = blocks or (GRAPH_BLOCK_M, GRAPH_BLOCK_R)
        self.device = torch.device(device)
        self.slot_ranks: IntArray = np.full(slots, max_rank, np.int32)
        self._token_slots: IntArray = np.zeros(0, np.int32)
        self._pinned = self.device.type == "cuda"
        tiles = tile_bound(graph_tokens, slots, self._graph_blocks[0])
        self._graph_tiles = tiles
        self._graph_items = tiles * cdiv(max_rank, self._graph_blocks[1])
        self._graph_perm = aligned_room(graph_tokens)
        words = HEADER + self._graph_perm + (self._graph_tiles + self._graph_items) * ENTRY
        self._fixed = torch.zeros(words, dtype=torch.int32, device=self.device)
        self.plan = self.build(self._token_slots)

    def all_blocks(self) -> set[tuple[int, int]]:
        """(tokens per tile, rank rows per item) of all plans that `build` may make."""
        if self.batch_invariant:
            return {self._graph_blocks}
        return {self._graph_blocks, *((self._blocks,) if self._blocks else EAGER_BLOCKS)}

    def set_slot_rank(self, slot: int, rank: int) -> None:
        """State the largest rank in any module of the adapter that `slot` now holds (0: empty).

        Until told otherwise a slot counts as `max_rank`, which is correct and merely does more work. A rank
        that changes under an unchanged batch (an adapter reloaded in place) rebuilds the plan at once.
        """
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} does not exist: there are {self.slots} slots")
        if not 0 <= rank <= self.max_rank:
            raise ValueError(f"slot {slot}: rank {rank} is outside 0..{self.max_rank}; raise max_rank")
        if self.slot_ranks[slot] == rank:
            return
        self.slot_ranks[slot] = rank
        if bool((self._token_slots == slot).any()):
            self.build(self._token_slots)

    def build(self, token_slots: IntArray) -> StepPlan:
        """Make the plan of a batch current and return it; token_slots int32 [tokens], -1 for the base
        model."""
        if token_slots.size and (token_slots.min() < -1 or token_slots.max() >= self.slots):
            raise ValueError(
                f"token_slots must lie in -1..{self.slots - 1}, got {int(token_slots.min())}..{int(token_slots.max())}"
            )
        self._token_slots = token_slots.astype(np.int32, copy=True)
        fixed = token_slots.size <= self.graph_tokens
        if fixed or self.batch_invariant:
            block_m, block_r = self._graph_blocks
        else:
            block_m, block_r = self._blocks or prefill_blocks(self._token_slots, self.slot_ranks)
        lists = build_lists(self._token_slots, self.slot_ranks, block_m, block_r)
        self.plan = self._send(lists, token_slots.size, block_m, block_r, fixed)
        return self.plan

    def _send(self, lists: HostLists, n_tokens: int, block_m: int, block_r: int, fixed: bool) -> StepPlan:
        """Pack the lists behind their header and copy the live part to the device in one asynchronous
        transfer."""
        n_tiles, n_items, n_sorted = len(lists.tiles), len(lists.items), lists.perm.size
        perm_room = self._graph_perm if fixed else aligned_room(n_sorted)
        tile_room = self._graph_tiles if fixed else n_tiles
        item_room = self._graph_items if fixed else n_items
        tiles_at = HEADER + perm_room
        items_at = tiles_at + tile_room * ENTRY
        live = items_at + n_items * ENTRY
        # The caching host allocator hands a pinned block out again only after the copies that read it are
        # done: a buffer of our own would be overwritten by the next step while this copy still waits in the
        # stream.
        staging = torch.zeros(live, dtype=torch.int32, pin_memory=self._pinned)
        words = staging.numpy()
        words[:3] = n_tiles, n_items, n_sorted
        words[HEADER : HEADER + n_sorted] = lists.perm
        words[tiles_at : tiles_at + n_tiles * ENTRY] = lists.tiles.ravel()
        words[items_at:live] = lists.items.ravel()
        buffer = self._fixed if fixed else torch.empty(live, dtype=torch.int32, device=self.device)
        buffer[:live].copy_(staging, non_blocking=True)
        return StepPlan(
            header=buffer[:HEADER],
            perm=buffer[HEADER:tiles_at],
            tiles=buffer[tiles_at:items_at].view(-1, ENTRY),
            items=buffer[items_at : items_at + item_room * ENTRY].view(-1, ENTRY),
            n_tokens=n_tokens,
            n_sorted=n_sorted,
            n_tiles=n_tiles,
            n_items=n_items,
            n_active=lists.n_active,
            top_rank=lists.top_rank,
            block_m=block_m,
            block_r=block_r,
            fixed=fixed,
        )
