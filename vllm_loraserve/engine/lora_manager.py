"""The worker's LoRA manager: adapters in pages instead of stacks padded to the largest rank.

Two classes take the places of vLLM's two:

- `LoRAServeWorkerManager` (vLLM: LRUCacheWorkerLoRAManager) is what the model runner talks to: which adapters
  this step needs, add, remove, pin.
- `PagedLoRAModelManager` (vLLM: LRUCacheLoRAModelManager) owns slots, pages and the arena.

An adapter goes through three states: in the host tier (`prepare`, any thread), registered (vLLM knows its id),
active (in a slot, its pages in the arena: `activate_adapter`, the engine's thread, a copy of whole pages).
Modules that pages do not cover stay on vLLM's path inside the same calls.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager, create_lora_manager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_loraserve.adapters.checkpoint import AdapterError
from vllm_loraserve.adapters.layout import Layout, build_layout
from vllm_loraserve.adapters.page_cache import PageCache
from vllm_loraserve.adapters.source import resolve_source
from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine.adapter_loader import AdapterLoader, ModelFacts, ServedAdapter
from vllm_loraserve.engine.engine_config import config_of
from vllm_loraserve.engine.paged_layers import (
    SlotTables,
    attach,
    is_paged,
    module_shape,
    stacked_bytes,
    without_stacked_weights,
)
from vllm_loraserve.engine.stock_layers import track_slots
from vllm_loraserve.memory.arena import Arena, arena_rank_rows
from vllm_loraserve.memory.eviction import Candidate, Demand, eviction_order, load_seconds
from vllm_loraserve.memory.host_tier import HostTier

if TYPE_CHECKING:
    from vllm_loraserve.engine.peer_sources import PeerSources

logger = init_logger("vllm.loraserve.lora_manager")

# From the host tier: memory bandwidth and the fixed cost of an activation. From a checkpoint: disk and
# conversion. Eviction only needs their ratio.
_HOST_COST = (5e9, 1e-3)
_CHECKPOINT_COST = (0.5e9, 0.05)


class ArenaFullError(RuntimeError):
    """A batch needs more rank rows than the arena has."""


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
        self._pages: dict[int, list[list[int]]] = {}
        self._generations: dict[int, int] = {}
        """Of each active adapter: the generation of the host entry that its pages were copied from."""
        self._shared: list[list[int]] | None = None
        self._demand: Demand[int] = Demand()
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
        self.layout = self._build_layout(paged)
        rows = arena_rank_rows(
            self.layout,
            gib=self.options.arena_gib,
            rank_rows=self.options.arena_rank_rows,
            stock_bytes=self.stock_bytes,
            max_rank_seen=self.lora_config.max_lora_rank,
        )
        self.arena = Arena(self.layout, rows, self.device)
        self.tables = SlotTables(self.layout, self.lora_slots, self.options.max_rank, self.device)
        linears = attach(paged, self.layout, self.arena, self.tables)
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
        for name, layer in paged.items():
            layer.punica_wrapper.register_linear(by_name[name])
        self._log_memory()

    def _wrappers(self) -> list[Any]:
        return list({id(wrapper): wrapper for wrapper in self.punica_wrapper_mapping.values()}.values())

    def _build_layout(self, paged: dict[str, Any]) -> Layout:
        some = next(iter(paged.values()), None)
        wrappers = {id(w): prefix for prefix, w in self.punica_wrapper_mapping.items()}
        shapes = []
        for name, layer in paged.items():
            group = name.rsplit(".", 1)[-1]
            if len(set(wrappers)) > 1:
                group = f"{wrappers[id(layer.punica_wrapper)]}:{group}"
            shapes.append(module_shape(name, layer, group))
        architectures = getattr(self._vllm_config.model_config, "architectures", None) or []
        return build_layout(
            shapes,
            model="+".join(architectures),
            dtype=str(self.lora_config.lora_dtype).removeprefix("torch."),
            page_rows=self.options.page_rows,
            tp_rank=some.tp_rank if some is not None else 0,
            tp_size=some.tp_size if some is not None else 1,
        )

    def _log_memory(self) -> None:
        gained = self.stock_bytes - self.arena.nbytes
        per_token = kv_bytes_per_token(self._vllm_config)
        logger.info(
            "LoRA arena: %.3f GiB for %d rank rows (%d pages of %d rows in %d module groups) and %d slots; stock "
            "vLLM takes %.3f GiB for --max-loras %d --max-lora-rank %d: %+d KV cache tokens against stock",
            self.arena.nbytes / 2**30,
            self.arena.rank_rows,
            self.arena.pages_per_group,
            self.layout.page_rows,
            len(self.layout.groups),
            self.lora_slots,
            self.stock_bytes / 2**30,
            self.lora_slots,
            self.lora_config.max_lora_rank,
            gained // per_token if per_token else 0,
        )

    # --- adapters ---------------------------------------------------------------------------------------

    def adapter(self, lora_id: int) -> ServedAdapter | None:
        found = self._registered_adapters.cache.get(lora_id)
        return found if isinstance(found, ServedAdapter) else None

    def is_current(self, lora_id: int) -> bool:
        """Whether an adapter is active with the pages that the host tier holds now."""
        entry = self.host.get(lora_id)
        return entry is not None and self._generations.get(lora_id) == entry.generation

    def capacity_problem(self, pages: Sequence[int]) -> str | None:
        """Why an adapter with so many pages could never be active, or None."""
        if max(pages, default=0) <= self.arena.pages_per_group:
            return None
        return (
            f"it takes {max(pages) * self.layout.page_rows} rank rows and the arena has {self.arena.rank_rows}; "
            "raise --loraserve-config.arena_rank_rows."
        )

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
        if isinstance(adapter, ServedAdapter) and adapter.shared_pages:
            self._take_slot(lora_id)
            pages = self._zero_pages(adapter)
        elif isinstance(adapter, ServedAdapter):
            pages = self._bring_in(lora_id, adapter)
        else:
            raise TypeError(f"LoRA {lora_id} was not loaded by this manager")
        slot = self.lora_index_to_id.index(lora_id)
        self.tables.set(slot, pages, adapter.ranks)
        self._slot_rank(slot, adapter.page_rank)
        if lora_id in self._registered_adapters.pinned_items:
            # It was pinned, and had to give way to running requests.
            self._active_adapters.pin(lora_id)
        # The kernels' step metadata depends on the ranks in the slots, so it must be made anew.
        self._last_mapping = None
        return True

    def _bring_in(self, lora_id: int, adapter: ServedAdapter) -> list[list[int]]:
        with self.host.reading(lora_id) as entry:
            if entry is None:
                raise LookupError(f"LoRA {lora_id} is not in the host tier; prepare it first")
            # A replacement may have reached the host tier since this adapter was registered.
            adapter.ranks, adapter.pages = entry.ranks, entry.pages
            self._make_room(lora_id, adapter.pages)
            self._take_slot(lora_id)
            pages = self.arena.allocate(adapter.pages, lora_id)
            assert pages is not None
            self._pages[lora_id] = pages
            self._generations[lora_id] = entry.generation
            self.arena.write(pages, self.host.targets(entry))
            if self.device.type != "cpu":
                # The host pages may be evicted once nobody reads them.
                torch.cuda.current_stream().synchronize()
        return pages

    def _take_slot(self, lora_id: int) -> None:
        if None not in self.lora_index_to_id:
            victims = self._victims(lora_id)
            if not victims:
                raise ArenaFullError(f"All {self.lora_slots} LoRA slots are in use or pinned; raise --max-loras.")
            self.deactivate_adapter(victims[0])
        # vLLM's own activation: finds the slot and serves the modules outside the pages.
        LoRAModelManager.activate_adapter(self, lora_id)

    def _make_room(self, lora_id: int, needed: Sequence[int]) -> None:
        """Evict idle adapters, least worth keeping first, until `needed` pages are free."""

        def missing() -> list[int]:
            free = self.arena.free_pages()
            return [group for group, count in enumerate(needed) if count > free[group]]

        chosen: list[int] = []
        free = list(self.arena.free_pages())
        for victim in self._victims(lora_id):
            if all(need <= have for need, have in zip(needed, free, strict=True)):
                break
            owned = self._pages.get(victim, [])
            if any(owned[group] for group in range(len(owned)) if needed[group] > free[group]):
                chosen.append(victim)
                free = [have + len(pages) for have, pages in zip(free, owned, strict=True)]
        if any(need > have for need, have in zip(needed, free, strict=True)):
            raise ArenaFullError(
                f"LoRA {lora_id} needs {max(needed) * self.layout.page_rows} rank rows beside the adapters in use; "
                f"the arena has {self.arena.rank_rows} (--loraserve-config.arena_rank_rows)."
            )
        for victim in chosen:
            self.deactivate_adapter(victim)
        assert not missing()

    def _victims(self, lora_id: int) -> list[int]:
        """Whom to evict for `lora_id`, in this order; pinned ones last, and only for an adapter of the step at hand."""
        return self._idle() + (self._idle(pinned=True) if lora_id in self.in_use else [])

    def _idle(self, pinned: bool = False) -> list[int]:
        """Active adapters out of use that are not pinned (or are), the least worth keeping first."""
        now = time.monotonic()
        candidates = []
        for lora_id in list(self._active_adapters.cache):
            if lora_id in self.in_use or (lora_id in self._active_adapters.pinned_items) is not pinned:
                continue
            size = sum(
                len(pages) * self.layout.page_bytes(group) for group, pages in enumerate(self._pages.get(lora_id, []))
            )
            cost = _HOST_COST if lora_id in self.host else _CHECKPOINT_COST
            candidates.append(Candidate(lora_id, size, load_seconds(size, *cost), self._demand.of(lora_id, now)))
        return eviction_order(candidates)

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            slot = self.lora_index_to_id.index(lora_id)
            self.tables.clear(slot)
            self._slot_rank(slot, 0)
        super()._deactivate_adapter(lora_id)
        self._generations.pop(lora_id, None)
        pages = self._pages.pop(lora_id, None)
        if pages is not None:
            self.arena.free(pages, lora_id)

    def _slot_rank(self, slot: int, rank: int) -> None:
        for wrapper in self._wrappers():
            wrapper.set_slot_rank(slot, rank)

    def _add_adapter(self, lora: LoRAModel) -> None:
        if lora.loras:
            super()._add_adapter(lora)
        else:
            self._registered_adapters[lora.id] = lora

    def remove_oldest_adapter(self) -> bool:
        """Unregister the adapter that is least worth keeping; never one in use or pinned."""
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
        order = eviction_order(candidates)
        if not order:
            return False
        self.remove_adapter(order[0])
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        self._demand.forget(adapter_id)
        self.host.remove(adapter_id)
        return super().remove_adapter(adapter_id)

    def remove_all_adapters(self) -> None:
        for lora_id in [lora for lora in self.lora_index_to_id if lora is not None]:
            self._deactivate_adapter(lora_id)
        for lora_id in list(self._registered_adapters.cache):
            self.host.remove(lora_id)
        super().remove_all_adapters()
        self._demand = Demand()
        if self._shared is not None:
            self.arena.free(self._shared, _SHARED)
            self._shared = None

    # --- warm-up ----------------------------------------------------------------------------------------

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: dict[str, str] | None = None) -> LoRAModel:
        """A warm-up adapter; in the pages all of them share one set of zeros."""
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

    def _zero_pages(self, adapter: ServedAdapter) -> list[list[int]]:
        if self._shared is None:
            self._shared = self.arena.allocate(adapter.pages, _SHARED)
            if self._shared is None:
                raise ArenaFullError("The arena has no room for the warm-up adapter's pages.")
            self.arena.zero(self._shared)
        return self._shared

    # --- integrity --------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, slots and host tier agree; cheap enough to run when idle."""
        self.arena.check_integrity()
        self.host.check_integrity()
        active = {lora for lora in self.lora_index_to_id if lora is not None}
        assert active == set(self._active_adapters.cache), "slots and active adapters differ"
        for group, allocator in enumerate(self.arena.allocators):
            for lora_id, pages in self._pages.items():
                assert sorted(pages[group]) == allocator.owned_by(lora_id), f"pages of LoRA {lora_id} differ"
            held = sum(len(pages[group]) for pages in self._pages.values())
            held += len(self._shared[group]) if self._shared is not None else 0
            assert held + allocator.free_pages == allocator.n_pages, "a page has no owner"


_SHARED = "warm-up"


class LoRAServeWorkerManager(LRUCacheWorkerLoRAManager):
    """What the model runner uses. Same calls as vLLM's, plus `prepare` for a side thread."""

    _manager_cls = PagedLoRAModelManager
    _adapter_manager: PagedLoRAModelManager
    peers: PeerSources | None = None
    """Other instances as a source, where `transfer_key_file` is set."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.options = config_of(vllm_config) or LoRAServeConfig()

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        manager = create_lora_manager(
            model,
            lora_manager_cls=PagedLoRAModelManager,
            max_num_seqs=self.max_num_seqs,
            vocab_size=self.vocab_size,
            lora_config=self.lora_config,
            device=self.device,
            max_num_batched_tokens=self.max_num_batched_tokens,
            vllm_config=vllm_config,
        )
        self._adapter_manager = manager
        self.host = manager.host = HostTier(
            manager.layout,
            self._host_bytes(manager),
            max_adapters=self.lora_config.max_cpu_loras,
        )
        cache = self.options.page_cache_dir
        self.loader = AdapterLoader(
            self._facts(manager),
            self.host,
            cache=PageCache(Path(cache)) if cache else None,
            resolve=self._resolve,
            capacity=manager.capacity_problem,
        )
        self._prepared: dict[int, ServedAdapter] = {}
        if self.options.transfer_key_file is not None:
            # Imported where it is used: without the option no worker probes for RDMA.
            from vllm_loraserve.engine.peer_sources import PeerSources

            self.peers = PeerSources(self.options, self.host, self._in_pages, rank=vllm_config.parallel_config.rank)
        return manager.model

    def _in_pages(self, lora_id: int) -> bool:
        """Whether all of an adapter is in its pages, so that a peer can serve it from them."""
        adapter = self._prepared.get(lora_id) or self._adapter_manager.adapter(lora_id)
        return adapter is not None and not adapter.loras and not adapter.shared_pages

    def _host_bytes(self, manager: PagedLoRAModelManager) -> int:
        if self.options.host_gib is not None:
            return int(self.options.host_gib * 2**30)
        # As many as --max-cpu-loras, at the rank that the flags name, and one of the largest rank. The memory
        # is taken page by page, as it is used.
        layout, count = manager.layout, self.lora_config.max_cpu_loras or self.lora_config.max_loras
        usual = layout.uniform_pages(self.lora_config.max_lora_rank)
        largest = layout.uniform_pages(self.options.max_rank)
        return (count + 1) * (layout.size_bytes(usual) + 4096) + layout.size_bytes(largest)

    def _facts(self, manager: PagedLoRAModelManager) -> ModelFacts:
        expected: set[str] = set()
        for module in manager.supported_lora_modules:
            expected.update(manager.packed_modules_mapping.get(module, ()))
            expected.add(module)
        model = manager.model
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        return ModelFacts(
            layout=manager.layout,
            layers=manager.paged_modules,
            parts={name: manager.packed_modules.get(name, [name]) for name in manager.paged_modules},
            stock_modules=frozenset(manager.modules),
            expected_suffixes=frozenset(expected),
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
            skip_prefixes=getattr(model, "lora_skip_prefixes", None) or (),
            strip_model_prefix=manager.is_pooling_model,
            allow_modules_to_save=bool(manager.supported_modules_to_save),
            max_rank=self.options.max_rank,
            stock_max_rank=self.lora_config.max_lora_rank,
            lora_dtype=self.lora_config.lora_dtype,
            vocab_size=self.vocab_size,
            max_positions=self.max_position_embeddings,
        )

    def _resolve(self, source: str) -> str:
        # Other spellings stand for other contents (resolver.py); a hub id would not be one with them.
        source = re.sub(r"(?<=.)(/\.)+$", "", source)
        if self.options.adapter_roots:
            return str(resolve_source(source, self.options.adapter_roots))
        return str(get_adapter_absolute_path(source))

    # --- what the engine calls --------------------------------------------------------------------------

    def prepare(self, lora_request: LoRARequest) -> ServedAdapter:
        """Bring an adapter into the host tier. Thread-safe, off the engine's thread; `add_adapter` then only
        copies pages. Raises AdapterError or HostTierFullError."""
        adapter = self.peers.bring(lora_request) if self.peers is not None else None
        if adapter is None:
            adapter = self.loader.prepare(lora_request)
        self._adapter_manager._validate_moe_lora_format(adapter)
        self._adapter_manager._validate_modules_to_save(adapter)
        self._adapter_manager._validate_token_classification_lora(adapter)
        self._prepared[lora_request.lora_int_id] = adapter
        if self.peers is not None:
            self.peers.served(lora_request)
        return adapter

    def is_prepared(self, lora_id: int) -> bool:
        """Whether `add_adapter` would read nothing but memory."""
        manager = self._adapter_manager
        known = lora_id in self._prepared or manager.adapter(lora_id) is not None
        return lora_id in manager._active_adapters or (known and lora_id in self.host)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Register and activate; the engine's thread. Reads the checkpoint only if nothing prepared it."""
        manager, lora_id = self._adapter_manager, lora_request.lora_int_id
        with gpu_sync_allowed():
            prepared = self._prepared.pop(lora_id, None)
            known = manager.adapter(lora_id)
            lost = not (lora_id in manager._active_adapters or lora_id in self.host)
            if known is None or lora_request.load_inplace or (lost and not known.shared_pages):
                if prepared is None or lora_id not in self.host or lora_request.load_inplace:
                    prepared = self._prepare_now(lora_request)
                self._register(prepared)
            elif prepared is not None and not manager.is_current(lora_id):
                self._register(prepared)
            else:
                manager.get_adapter(lora_id)
            manager.activate_adapter(lora_id)
        return True

    def _prepare_now(self, lora_request: LoRARequest) -> ServedAdapter:
        adapter = self.prepare(lora_request)
        self._prepared.pop(lora_request.lora_int_id, None)
        return adapter

    def _register(self, adapter: ServedAdapter) -> None:
        manager = self._adapter_manager
        pinned = adapter.id in manager._registered_adapters.pinned_items
        # Not manager.remove_adapter: the new pages are in the host tier under this id already.
        manager.deactivate_adapter(adapter.id)
        manager._registered_adapters.pop(adapter.id, None)
        if len(manager) + 1 > manager.capacity and not manager.remove_oldest_adapter():
            raise RuntimeError("All LoRAs are in use or pinned; raise --max-cpu-loras.")
        manager.add_adapter(adapter)
        if pinned:
            manager._registered_adapters.pin(adapter.id)
            manager.activate_adapter(adapter.id)  # pins it there too

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        manager = self._adapter_manager
        wanted = {request.lora_int_id: request for request in lora_requests if request}
        if len(wanted) > manager.lora_slots:
            raise RuntimeError(
                f"Number of requested LoRAs ({len(wanted)}) is greater than the number of LoRA slots "
                f"({manager.lora_slots})."
            )
        manager.in_use = frozenset(wanted)
        for lora_id, request in wanted.items():
            if manager.adapter(lora_id) is not None and request.load_inplace:
                # In place means once, when it is added; not in every step that uses it.
                if lora_id not in manager._active_adapters:
                    self._reactivate(lora_id, request)
                else:
                    manager.activate_adapter(lora_id)
                continue
            self.add_adapter(request)

    def _reactivate(self, lora_id: int, request: LoRARequest) -> None:
        if lora_id in self.host:
            self._adapter_manager.activate_adapter(lora_id)
        else:
            self.add_adapter(request)

    def pin_adapter(self, adapter_id: int) -> bool:
        pinned = super().pin_adapter(adapter_id)
        self.host.pin(adapter_id)
        return pinned

    def unpin_adapter(self, adapter_id: int) -> bool:
        """The adapter may be evicted again. False when it is not registered."""
        manager = self._adapter_manager
        for cache in (manager._registered_adapters, manager._active_adapters):
            if adapter_id in cache.pinned_items:
                cache._unpin(adapter_id)
        self.host.pin(adapter_id, False)
        return adapter_id in self.list_adapters()

    def remove_adapter(self, adapter_id: int) -> bool:
        self._prepared.pop(adapter_id, None)
        if self.peers is not None:
            self.peers.removed(adapter_id)
        return super().remove_adapter(adapter_id)

    def remove_all_adapters(self) -> None:
        self._prepared.clear()
        super().remove_all_adapters()


def kv_bytes_per_token(vllm_config: VllmConfig) -> int:
    """Bytes of KV cache that one token takes on this worker, from the model's attention shapes; 0 if unknown."""
    try:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        heads, size = model.get_num_kv_heads(parallel), model.get_head_size()
        layers = model.get_num_layers(parallel)
        dtype = vllm_config.cache_config.cache_dtype
        item = 1 if dtype.startswith("fp8") else torch.empty(0, dtype=model.dtype).element_size()
        return int(2 * heads * size * layers * item)
    except (AttributeError, TypeError, ValueError):
        return 0


__all__ = ["AdapterError", "ArenaFullError", "LoRAServeWorkerManager", "PagedLoRAModelManager"]
