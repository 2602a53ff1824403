"""Who holds which pages of the arena: active adapters, staged ones, and the warm-up adapters' shared zeros.

The bookkeeping beside the allocators (`memory/allocator.py` only knows that a page has an owner): what an adapter
owns, which generation of its host entry was copied, and which adapters have to go so that another one fits. Knows
nothing of slots or of vLLM.

A staged adapter has its pages before it is active; a side thread fills them (`staging.py`). All else is for the
engine's thread. `lock` guards the pages: who looks for room and then takes it holds it meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Sequence

from vllm_loraserve.memory.arena import Arena
from vllm_loraserve.memory.eviction import fits

_WARM_UP = "warm-up"


class ArenaFullError(RuntimeError):
    """A batch needs more rank rows than the arena has."""


class Staged:
    """Pages that a side thread fills, and then sets `filled`; `intact`: with all of the adapter."""

    __slots__ = ("filled", "intact", "pages", "since")

    def __init__(self, pages: list[list[int]]) -> None:
        self.pages = pages
        self.filled = threading.Event()
        self.intact = False
        self.since = time.monotonic()


class ArenaResidents:
    """The pages of the adapters in `arena`."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.lock = threading.RLock()
        self._staged: dict[int, Staged] = {}
        self._pages: dict[int, list[list[int]]] = {}
        self._generations: dict[int, int] = {}
        self._zeros: list[list[int]] | None = None

    def size_bytes(self, lora_id: int) -> int:
        """Bytes of the arena that an adapter holds; 0 if none."""
        layout = self.arena.layout
        return sum(len(pages) * layout.page_bytes(group) for group, pages in enumerate(self._pages.get(lora_id, [])))

    def is_current(self, lora_id: int, generation: int) -> bool:
        """Whether the adapter is active with pages copied from this generation of its host entry."""
        return lora_id not in self._staged and self._generations.get(lora_id) == generation

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, lora_id: int) -> bool:
        """Whether the adapter has pages, active or staged."""
        return lora_id in self._pages

    def capacity_problem(self, pages: Sequence[int], beside: int = 0) -> str | None:
        """Why an adapter with so many pages in each group could never be active, or not beside so many others of its
        size; None: it could."""
        if max(pages, default=0) <= self.arena.pages_per_group // (beside + 1):
            return None
        rows, has = max(pages) * self.arena.layout.page_rows, f"the arena has {self.arena.rank_rows}"
        if beside:
            has += f", which {beside + 1} adapters share (--max-loras)"
        return f"it takes {rows} rank rows and {has}; raise --loraserve-config.arena_rank_rows."

    def to_evict(self, lora_id: int, needed: Sequence[int], victims: Iterable[int]) -> list[int]:
        """Those of `victims` (best to lose first) that must go until `needed` pages are free for `lora_id`.

        Raises ArenaFullError when all of them are not enough. Changes nothing.
        """
        chosen: list[int] = []
        free = list(self.arena.free_pages())
        for victim in victims:
            if fits(needed, free):
                break
            owned = self._pages.get(victim, [])
            if any(owned[group] for group in range(len(owned)) if needed[group] > free[group]):
                chosen.append(victim)
                free = [have + len(pages) for have, pages in zip(free, owned, strict=True)]
        if not fits(needed, free):
            raise ArenaFullError(
                f"LoRA {lora_id} needs {max(needed) * self.arena.layout.page_rows} rank rows beside the adapters in "
                f"use; the arena has {self.arena.rank_rows} (--loraserve-config.arena_rank_rows)."
            )
        return chosen

    def reserve(self, lora_id: int, needed: Sequence[int], generation: int) -> list[list[int]]:
        """Take `needed` free pages, which are to hold this generation of the adapter's host entry."""
        with self.lock:
            pages = self._take(lora_id, needed, generation)
        assert pages is not None, "room was made before"
        return pages

    def _take(self, lora_id: int, needed: Sequence[int], generation: int) -> list[list[int]] | None:
        pages = self.arena.allocate(needed, lora_id)
        if pages is not None:
            self._pages[lora_id] = pages
            self._generations[lora_id] = generation
        return pages

    def release(self, lora_id: int) -> None:
        """The adapter's pages are free; nothing happens if it holds none. Of a staged one waits for its copy."""
        with self.lock:
            staged = self._staged.pop(lora_id, None)
            if staged is not None:
                staged.filled.wait()
            self._generations.pop(lora_id, None)
            pages = self._pages.pop(lora_id, None)
            if pages is not None:
                self.arena.free(pages, lora_id)

    # --- staged adapters --------------------------------------------------------------------------------

    def stage(self, lora_id: int, needed: Sequence[int], generation: int) -> Staged | None:
        """Free pages for an adapter that has none; None where it has, or too few are free. Any thread."""
        with self.lock:
            if lora_id in self._pages:
                return None
            pages = self._take(lora_id, needed, generation)
            if pages is None:
                return None
            self._staged[lora_id] = staged = Staged(pages)
            return staged

    def staged(self, least_s: float = 0.0) -> list[int]:
        """Adapters staged for `least_s` seconds or longer, in the order in which they came."""
        now = time.monotonic()
        with self.lock:
            return [lora_id for lora_id, staged in self._staged.items() if now - staged.since >= least_s]

    def is_staged(self, lora_id: int, generation: int) -> bool:
        """Whether `take_staged` will find this generation of the adapter; waits for a copy under way. What is staged of
        another one is given up."""
        staged = self._staged.get(lora_id)
        if staged is None:
            return False
        staged.filled.wait()
        if staged.intact and self._generations[lora_id] == generation:
            return True
        self.release(lora_id)
        return False

    def take_staged(self, lora_id: int) -> list[list[int]]:
        """The pages of an adapter that `is_staged`: an active one's from now on."""
        with self.lock:
            return self._staged.pop(lora_id).pages

    # --- warm-up adapters -------------------------------------------------------------------------------

    def zeros(self, needed: Sequence[int]) -> list[list[int]]:
        """Pages of zeros that all warm-up adapters share."""
        if self._zeros is None:
            with self.lock:
                self._zeros = self.arena.allocate(needed, _WARM_UP)
            if self._zeros is None:
                raise ArenaFullError("The arena has no room for the warm-up adapter's pages.")
            self.arena.zero(self._zeros)
        return self._zeros

    def release_zeros(self) -> None:
        if self._zeros is not None:
            with self.lock:
                self.arena.free(self._zeros, _WARM_UP)
            self._zeros = None

    def check_integrity(self, active: Collection[int]) -> None:
        """Raise AssertionError unless every page is free or has one owner, who is active or staged."""
        with self.lock:
            self._check_integrity(active)

    def _check_integrity(self, active: Collection[int]) -> None:
        self.arena.check_integrity()
        assert set(self._pages) <= {*active, *self._staged}, "pages of an adapter that is not active"
        assert set(self._staged) <= set(self._pages), "a staged adapter without pages"
        for group, allocator in enumerate(self.arena.allocators):
            for lora_id, pages in self._pages.items():
                assert sorted(pages[group]) == allocator.owned_by(lora_id), f"pages of LoRA {lora_id} differ"
            held = sum(len(pages[group]) for pages in self._pages.values())
            held += len(self._zeros[group]) if self._zeros is not None else 0
            assert held + allocator.free_pages == allocator.n_pages, "a page has no owner"
