"""Who holds which pages of the arena: the active adapters and the warm-up adapters' shared zeros.

The bookkeeping beside the allocators (`memory/allocator.py` only knows that a page has an owner): what an adapter
owns, which generation of its host entry was copied, and which adapters have to go so that another one fits. Knows
nothing of slots or of vLLM. The engine's thread only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch

from vllm_loraserve.memory.arena import Arena
from vllm_loraserve.memory.eviction import fits

_WARM_UP = "warm-up"


class ArenaFullError(RuntimeError):
    """A batch needs more rank rows than the arena has."""


class ArenaResidents:
    """The pages of the adapters that are active in `arena`."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._pages: dict[int, list[list[int]]] = {}
        self._generations: dict[int, int] = {}
        self._zeros: list[list[int]] | None = None

    def size_bytes(self, lora_id: int) -> int:
        """Bytes of the arena that an adapter holds; 0 if none."""
        layout = self.arena.layout
        return sum(len(pages) * layout.page_bytes(group) for group, pages in enumerate(self._pages.get(lora_id, [])))

    def is_current(self, lora_id: int, generation: int) -> bool:
        """Whether the pages here were copied from this generation of the adapter's host entry."""
        return self._generations.get(lora_id) == generation

    def capacity_problem(self, pages: Sequence[int]) -> str | None:
        """Why an adapter with so many pages in each group could never be active, or None."""
        if max(pages, default=0) <= self.arena.pages_per_group:
            return None
        return (
            f"it takes {max(pages) * self.arena.layout.page_rows} rank rows and the arena has "
            f"{self.arena.rank_rows}; raise --loraserve-config.arena_rank_rows."
        )

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

    def bring_in(
        self, lora_id: int, needed: Sequence[int], sources: Sequence[torch.Tensor | None], generation: int
    ) -> list[list[int]]:
        """Take `needed` free pages and copy the adapter's host pages into them (see `Arena.write`)."""
        pages = self.arena.allocate(needed, lora_id)
        assert pages is not None, "room was made before"
        self._pages[lora_id] = pages
        self._generations[lora_id] = generation
        self.arena.write(pages, sources)
        return pages

    def release(self, lora_id: int) -> None:
        """The adapter's pages are free; nothing happens if it holds none."""
        self._generations.pop(lora_id, None)
        pages = self._pages.pop(lora_id, None)
        if pages is not None:
            self.arena.free(pages, lora_id)

    def zeros(self, needed: Sequence[int]) -> list[list[int]]:
        """Pages of zeros that all warm-up adapters share."""
        if self._zeros is None:
            self._zeros = self.arena.allocate(needed, _WARM_UP)
            if self._zeros is None:
                raise ArenaFullError("The arena has no room for the warm-up adapter's pages.")
            self.arena.zero(self._zeros)
        return self._zeros

    def release_zeros(self) -> None:
        if self._zeros is not None:
            self.arena.free(self._zeros, _WARM_UP)
            self._zeros = None

    def check_integrity(self, active: Collection[int]) -> None:
        """Raise AssertionError unless every page is free or has one owner, who is active."""
        self.arena.check_integrity()
        assert set(self._pages) <= set(active), "pages of an adapter that is not active"
        for group, allocator in enumerate(self.arena.allocators):
            for lora_id, pages in self._pages.items():
                assert sorted(pages[group]) == allocator.owned_by(lora_id), f"pages of LoRA {lora_id} differ"
            held = sum(len(pages[group]) for pages in self._pages.values())
            held += len(self._zeros[group]) if self._zeros is not None else 0
            assert held + allocator.free_pages == allocator.n_pages, "a page has no owner"
