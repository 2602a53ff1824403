"""Slots and activation: vLLM's LoRA model manager with adapters in pages instead of stacks padded to the largest rank.

Takes the place of vLLM's LRUCacheLoRAModelManager. An adapter goes through four states: in the host tier (any
thread), staged (its pages are in the arena already: `staging.py`, where there is time and room), registered (vLLM knows
its id), active (in a slot, its pages in the arena: `activate_adapter`, the engine's thread, a copy of whole pages where
they were not staged; on a CPU that copy is made later, `lent_pages.py`). Modules that pages do not cover stay on vLLM's
path inside the same calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine.adapter_loader import ServedAdapter
from vllm_loraserve.engine.arena_residents import ArenaFullError, ArenaResidents
from vllm_loraserve.engine.engine_config import config_of
from vllm_loraserve.engine.kv_gain import log_kv_gain
from vllm_loraserve.engine.lent_pages import LentPages
from vllm_loraserve.engine.lora_memory import (
    ScratchReserve,
    log_arena,
    most_arena_bytes,
    scratch_bytes,
    worker_layout,
)
from vllm_loraserve.engine.paged_layers import SlotTables, attach, is_paged, stacked_bytes, without_stacked_weights
from vllm_loraserve.engine.pending_copies import PendingCopies
from vllm_loraserve.engine.side_stream import SideStream
from vllm_loraserve.engine.staging import UNUSED_S, Staging
from vllm_loraserve.engine.stock_layers import track_slots
from vllm_loraserve.kernels import cpu_native
from vllm_loraserve.memory.arena import Arena, arena_rank_rows
from vllm_loraserve.memory.eviction import Candidate, Demand, eviction_order, load_seconds
from vllm_loraserve.memory.host_tier import HostEntry, HostTier

# From the host tier: memory bandwidth and the fixed cost of an activation. From a checkpoint: disk and
# conversion. Eviction only needs their ratio.
_HOST_COST = (5e9, 1e-3)
_CHECKPOINT_COST = (0.5e9, 0.05)


class PagedLoRAModelManager(LRUCacheLoRAModelManager):
    """Slots, pages and layers of one model."""

    modules: dict[str, Any]
    """The LoRA layers that pages do not cover."""
    host: HostTier

    def __init__(self, *args: Any, vllm_config: VllmConfig, **kwargs: Any) -> None:
        self.options = config_of(vllm_config) or LoRAServeConfig()
        self._vllm_config = vllm_config
        self.in_use: frozenset[int] = frozenset()
        """Adapters of the step at hand: never evicted."""
        self.arena_evictions = 0
        """Adapters that had to leave the arena for others, since the start."""
        self._demand: Demand[int] = Demand()
        self.copies = PendingCopies()
        super().__init__(*args, vllm_config=vllm_config, **kwargs)

    # --- start-up ---------------------------------------------------------------------------------------

    def _create_lora_modules(self) -> None:
        with without_stacked_weights():
            super()._create_lora_modules()
        paged = {name: layer for name, layer in self.modules.items() if is_paged(layer)}
        self.paged_modules = paged
        # What is left is all that vLLM's own code has to visit when an adapter comes or goes.
        self.modules = {name: layer for name, layer in self.modules.items() if name not in paged}
        self.stock_bytes = sum(stacked_bytes(layer) for layer in paged.values())
        self.layout = worker_layout(paged, self.punica_wrapper_mapping, self._vllm_config, self.options.page_rows)
        rows = arena_rank_rows(
            self.layout,
            gib=self.options.arena_gib,
            rank_rows=self.options.arena_rank_rows,
            stock_bytes=self.stock_bytes,
            max_rank_seen=self.lora_config.max_lora_rank,
            most_bytes=most_arena_bytes(self.options, self.device),
        )
        kernels = cpu_native.load() if self.device.type == "cpu" else None
        self.arena = Arena(self.layout, rows, self.device, finely=kernels is not None)
        self.residents = ArenaResidents(self.arena)
        self.side_stream = SideStream(self.device) if self.device.type == "cuda" else None
        self.tables = SlotTables(self.layout, self.lora_slots, self.options.max_rank, self.device)
        self.lent = LentPages(self.arena, self.tables, kernels) if kernels is not None else None
        self.staging = Staging(
            self.residents,
            lambda: self.host,
            self.side_stream,
            in_place=lambda entry: self._numbers_in_place(entry) is not None,
        )
        self._attach_kernels()
        # On a CPU the wrapper has taken it by now.
        self.scratch = ScratchReserve(
            scratch_bytes(self.layout, self.options.max_rank, self.arena.rank_rows, self.max_num_batched_tokens)
            if self.device.type != "cpu"
            else 0,
            self.device,
        )
        log_arena(self.arena, self.lora_slots, self.stock_bytes, self.lora_config)

    def kv_cache_allocated(self, kv_cache_config: KVCacheConfig) -> None:
        """vLLM has laid out this worker's KV cache."""
        if self.layout.groups:
            log_kv_gain(self._vllm_config, kv_cache_config, self.arena.nbytes, self.stock_bytes)
        if self._vllm_config.kernel_config.enable_jit_warmup:
            for wrapper in self._wrappers():
                wrapper.warm_up()

    def _attach_kernels(self) -> None:
        """Every paged layer gets its view of the arena, and its Punica wrapper hears of it."""
        linears = attach(self.paged_modules, self.layout, self.arena, self.tables)
        by_name = {linear.name: linear for linear in linears}
        occupied = track_slots(self.modules.values())
        captured = self._vllm_config.compilation_config.max_cudagraph_capture_size
        for wrapper in self._wrappers():
            wrapper.configure_paged(
                max_rank=self.options.max_rank,
                stock_layers=bool(self.modules),
                **({"graph_tokens": captured} if captured else {}),
            )
            wrapper.occupied_slots = occupied
        for name, layer in self.paged_modules.items():
            layer.punica_wrapper.register_linear(by_name[name])

    def _wrappers(self) -> list[Any]:
        return list({id(wrapper): wrapper for wrapper in self.punica_wrapper_mapping.values()}.values())

    # --- active adapters --------------------------------------------------------------------------------

    def adapter(self, lora_id: int) -> ServedAdapter | None:
        found = self._registered_adapters.cache.get(lora_id)
        return found if isinstance(found, ServedAdapter) else None

    def is_current(self, lora_id: int) -> bool:
        """Whether an adapter is active with the pages that the host tier holds now."""
        entry = self.host.get(lora_id)
        return entry is not None and self.residents.is_current(lora_id, entry.generation)

    def activate_adapter(self, lora_id: int) -> bool:
        """Put a registered adapter into a slot and its pages into the arena, evicting idle ones if need be.

        An adapter of the step at hand takes the room of pinned idle ones when nothing else is left: an error there
        would end the engine. Raises ArenaFullError when only adapters in use (outside of a step: or pinned) are left
        to evict; nothing has changed then.
        """
        self._demand.use(lora_id, time.monotonic())
        self.host.touch(lora_id)
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        adapter = self._registered_adapters[lora_id]
        lend: Callable[[int], None] | None = None
        if isinstance(adapter, ServedAdapter) and adapter.shared_pages:
            self._take_slot(lora_id)
            numbers = self.arena.numbers(self.residents.zeros(adapter.pages))
        elif isinstance(adapter, ServedAdapter):
            numbers, lend = self._bring_in(lora_id, adapter)
        else:
            raise TypeError(f"LoRA {lora_id} was not loaded by this manager")
        slot = self.lora_index_to_id.index(lora_id)
        self.tables.set(slot, numbers, adapter.ranks)
        if lend is not None:
            lend(slot)
        self._slot_rank(slot, adapter.page_rank)
        if lora_id in self._registered_adapters.pinned_items:
            # It was pinned, and had to give way to running requests.
            self._active_adapters.pin(lora_id)
        # The kernels' step metadata depends on the ranks in the slots, so it must be made anew.
        self._last_mapping = None
        return True

    def _numbers_in_place(self, entry: HostEntry) -> list[list[int]] | None:
        return self.lent.numbers(self.host, entry) if self.lent is not None else None

    def _bring_in(self, lora_id: int, adapter: ServedAdapter) -> tuple[list[list[int]], Callable[[int], None] | None]:
        """Page numbers for the slot's tables; and, where they name host pages, what is to be done once the tables of
        the slot hold them."""
        self.copies.drain()
        with ExitStack() as reading:
            entry = reading.enter_context(self.host.reading(lora_id))
            if entry is None:
                raise LookupError(f"LoRA {lora_id} is not in the host tier; prepare it first")
            # A replacement may have reached the host tier since this adapter was registered.
            adapter.ranks, adapter.pages = entry.ranks, entry.pages
            sources, in_place = self.host.targets(entry), self._numbers_in_place(entry)
            if staged := self.residents.is_staged(lora_id, entry.generation):
                self._take_slot(lora_id)
                pages = self.residents.take_staged(lora_id)
            else:
                with self.residents.lock:
                    self._make_room(lora_id, adapter.pages, self._page_victims(lora_id))
                    self._take_slot(lora_id)
                    pages = self.residents.reserve(lora_id, adapter.pages, entry.generation)
            if in_place is not None and self.lent is not None:
                lent, until = self.lent, reading.pop_all()
                return in_place, lambda slot: lent.lend(lora_id, slot, pages, sources, until)
            if not staged:
                with self.side_stream.copying() if self.side_stream is not None else nullcontext():
                    self.arena.write(pages, sources)
                    if self.device.type != "cpu":
                        self.copies.hold(reading.pop_all())
        return self.arena.numbers(pages), None

    def _make_room(self, lora_id: int, needed: Sequence[int], victims: Sequence[int]) -> None:
        """Sends so many of the victims away that the pages are free. Raises ArenaFullError; nobody has gone then."""
        for victim in self.residents.to_evict(lora_id, needed, victims):
            self._send_away(victim)

    def _send_away(self, victim: int) -> None:
        self.arena_evictions += 1
        if victim in self._active_adapters:
            self.deactivate_adapter(victim)
        else:
            self.residents.release(victim)

    def stage_waiting(self) -> None:
        """In every step, when its adapters are active: idle ones make room for those that wait to be staged."""
        self.staging.step(self._make_room_ahead)

    def _make_room_ahead(self, lora_id: int, needed: Sequence[int]) -> bool:
        try:
            self._make_room(lora_id, needed, self.residents.staged(UNUSED_S) + self._idle())
        except ArenaFullError:
            return False
        return True

    def _take_slot(self, lora_id: int) -> None:
        if None not in self.lora_index_to_id:
            victims = self._victims(lora_id)
            if not victims:
                raise ArenaFullError(f"All {self.lora_slots} LoRA slots are in use or pinned; raise --max-loras.")
            self._send_away(victims[0])
        # vLLM's own activation: finds the slot and serves the modules outside the pages.
        LoRAModelManager.activate_adapter(self, lora_id)

    def _page_victims(self, lora_id: int) -> list[int]:
        """Whom to take pages from for `lora_id`, in this order: `_victims`, and those that are staged."""
        unused, staged = self.residents.staged(UNUSED_S), self.residents.staged()
        pinned = self._idle(pinned=True) if lora_id in self.in_use else []
        return unused + self._idle() + [each for each in staged if each not in unused] + pinned

    def _victims(self, lora_id: int) -> list[int]:
        """Whom to evict for `lora_id`, in this order: what requests wait for and only the arena has comes behind the
        others; pinned ones last, and only for an adapter of the step at hand."""
        idle = sorted(self._idle(), key=self._awaited_here_alone)
        return idle + (self._idle(pinned=True) if lora_id in self.in_use else [])

    def _awaited_here_alone(self, lora_id: int) -> bool:
        return self.host.is_held(lora_id) and lora_id not in self.host

    def _idle(self, pinned: bool = False) -> list[int]:
        """Active adapters out of use that are not pinned (or are), the least worth keeping first."""
        now = time.monotonic()
        candidates = []
        for lora_id in list(self._active_adapters.cache):
            if lora_id in self.in_use or (lora_id in self._active_adapters.pinned_items) is not pinned:
                continue
            size = self.residents.size_bytes(lora_id)
            cost = _HOST_COST if lora_id in self.host else _CHECKPOINT_COST
            candidates.append(Candidate(lora_id, size, load_seconds(size, *cost), self._demand.of(lora_id, now)))
        return eviction_order(candidates)

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            slot = self.lora_index_to_id.index(lora_id)
            self.tables.clear(slot)
            self._slot_rank(slot, 0)
        super()._deactivate_adapter(lora_id)
        # Before: a side thread may take the pages at once.
        self._pages_freed()
        if self.lent is not None:
            self.lent.end(lora_id)
        self.residents.release(lora_id)

    def _pages_freed(self) -> None:
        if self.side_stream is not None:
            self.side_stream.freed()

    def _slot_rank(self, slot: int, rank: int) -> None:
        for wrapper in self._wrappers():
            wrapper.set_slot_rank(slot, rank)

    # --- registered adapters ----------------------------------------------------------------------------

    def _add_adapter(self, lora: LoRAModel) -> None:
        if lora.loras:
            super()._add_adapter(lora)
        else:
            self._registered_adapters[lora.id] = lora

    def remove_oldest_adapter(self) -> bool:
        """Unregister the adapter that is least worth keeping; never one in use or pinned, and what requests wait for,
        or a cluster's last copy, only where there are no others: its host pages go with it."""
        now = time.monotonic()
        pinned = self._registered_adapters.pinned_items | self._active_adapters.pinned_items
        candidates = [
            Candidate(
                lora_id,
                (size := self.layout.size_bytes(getattr(adapter, "pages", ()))),
                load_seconds(size, *_CHECKPOINT_COST),
                self._demand.of(lora_id, now),
            )
            for lora_id, adapter in self._registered_adapters.cache.items()
            if lora_id not in pinned and lora_id not in self.in_use
        ]
        order = sorted(
            eviction_order(candidates),
            key=lambda lora_id: (self.host.is_held(lora_id), not self.host.may_evict(lora_id)),
        )
        if not order:
            return False
        self.host.evictions += order[0] in self.host
        self.remove_adapter(order[0])
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        self.copies.drain()
        self._demand.forget(adapter_id)
        self.host.remove(adapter_id)
        self._unstage([adapter_id])
        return super().remove_adapter(adapter_id)

    def _unstage(self, lora_ids: Iterable[int]) -> None:
        for lora_id in set(self.residents.staged()).intersection(lora_ids):
            self.residents.release(lora_id)

    def remove_all_adapters(self) -> None:
        self.copies.drain(wait=True)
        for lora_id in [lora for lora in self.lora_index_to_id if lora is not None]:
            self._deactivate_adapter(lora_id)
        self._unstage(self.residents.staged())
        for lora_id in list(self._registered_adapters.cache):
            self.host.remove(lora_id)
        super().remove_all_adapters()
        if getattr(self._vllm_config.model_config, "enable_sleep_mode", False):
            # vLLM calls this when it has replaced the model's weights, after a sleep that kept nothing on the device.
            self.tables.reset()
            for layer in self.paged_modules.values():
                layer.paged_linear.restore()
        self._demand = Demand()
        self._pages_freed()
        self.residents.release_zeros()
        self.scratch.release()

    # --- warm-up ----------------------------------------------------------------------------------------

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: dict[str, str] | None = None) -> LoRAModel:
        """A warm-up adapter; in the pages all of them share one set of zeros."""
        self.scratch.hold()
        self._hide_paged = True
        try:
            stock = super().create_dummy_lora(lora_id, rank, embedding_modules)
        finally:
            self._hide_paged = False
        dummy = ServedAdapter(lora_id, rank, stock.loras)
        rank = min(rank, self.options.max_rank, self.arena.rank_rows)
        dummy.ranks = (rank,) * len(self.layout.slice_index)
        dummy.pages = self.layout.uniform_pages(rank)
        dummy.shared_pages = True
        return dummy

    _hide_paged = False

    def _match_target_modules(self, module_name: str) -> bool:
        if self._hide_paged and module_name in self.paged_modules:
            return False
        return bool(super()._match_target_modules(module_name))

    # --- integrity --------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, slots and host tier agree; cheap enough to run when idle."""
        self.host.check_integrity()
        active = {lora for lora in self.lora_index_to_id if lora is not None}
        assert active == set(self._active_adapters.cache), "slots and active adapters differ"
        self.residents.check_integrity(active)
