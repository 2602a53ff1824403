"""The worker's LoRA manager: what the model runner talks to.

Takes the place of vLLM's LRUCacheWorkerLoRAManager: which adapters this step needs, add, remove, pin; and `prepare`,
which a side thread calls to bring an adapter into the host tier. Slots and activation are in `model_manager.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.lora.model_manager import create_lora_manager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_loraserve.adapters.errors import AdapterError
from vllm_loraserve.adapters.page_cache import PageCache
from vllm_loraserve.adapters.source import resolve_source
from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine import channel, logs
from vllm_loraserve.engine.adapter_loader import AdapterLoader, ModelFacts, ServedAdapter, settled
from vllm_loraserve.engine.engine_config import config_of
from vllm_loraserve.engine.host_memory import make_host_tier
from vllm_loraserve.engine.load_threads import ensure_wanted
from vllm_loraserve.engine.memory_metrics import MemoryMetrics
from vllm_loraserve.engine.model_manager import PagedLoRAModelManager

if TYPE_CHECKING:
    from vllm_loraserve.engine.peer_sources import PeerSources


def adapters_beside(vllm_config: VllmConfig, slots: int) -> int:
    """Others of its size beside which an adapter must fit the arena. Without a channel to the workers the scheduler
    knows no ranks and counts slots alone, so that any `slots` adapters have to fit together."""
    return slots - 1 if channel.address_of(vllm_config) is None else 0


def left_out(manager: PagedLoRAModelManager) -> Iterator[str]:
    """Modules below which a checkpoint may name layers that this model has not, for nothing is lost without them:
    towers that vLLM builds up to the layer that is used, or not at all where their inputs are switched off."""
    if manager.supports_mm:
        mapping = manager.mm_mapping
        for prefix in (*mapping.tower_model, *mapping.connector, *mapping.generator):
            yield prefix.rstrip(".")
    for name, part in manager.model.named_modules():
        if isinstance(part, StageMissingLayer):
            yield name


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
        logs.show()
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
        self.host = manager.host = make_host_tier(
            self.options, manager.layout, vllm_config, on_cpu=self.device.type == "cpu"
        )
        cache = self.options.page_cache_dir
        self.loader = AdapterLoader(
            self._facts(manager),
            self.host,
            cache=PageCache(Path(cache), int(self.options.page_cache_gib * 2**30)) if cache else None,
            resolve=self._resolve,
            capacity=self._capacity_problem,
        )
        self._beside = adapters_beside(vllm_config, manager.lora_slots)
        self._prepared: dict[int, ServedAdapter] = {}
        self.memory = MemoryMetrics(vllm_config.parallel_config.rank, manager)
        if self.options.transfer_key_file is not None:
            # Imported where it is used: without the option no worker probes for RDMA.
            from vllm_loraserve.engine.peer_sources import PeerSources

            self.peers = PeerSources(
                self.options, self.host, self._in_pages, rank=vllm_config.parallel_config.rank, loader=self.loader
            )
        return manager.model

    def _capacity_problem(self, pages: Sequence[int]) -> str | None:
        """Why an adapter with so many pages in each group can't be served, or None."""
        return self._adapter_manager.residents.capacity_problem(pages, self._beside)

    def kv_cache_allocated(self, kv_cache_config: KVCacheConfig) -> None:
        """vLLM has laid out this worker's KV cache."""
        self._adapter_manager.kv_cache_allocated(kv_cache_config)

    def _in_pages(self, lora_id: int) -> bool:
        """Whether all of an adapter is in its pages, so that a peer can serve it from them."""
        adapter = self._prepared.get(lora_id) or self._adapter_manager.adapter(lora_id)
        return adapter is not None and not adapter.loras and not adapter.shared_pages

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
            stock_names=frozenset(
                name for module in manager.modules for name in (module, *manager.packed_modules.get(module, ()))
            ),
            expected_suffixes=frozenset(expected),
            module_names=frozenset(name for name, _ in model.named_modules()),
            elsewhere=frozenset(name for name, part in model.named_modules() if isinstance(part, PPMissingLayer)),
            left_out=frozenset(left_out(manager)),
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
        source = re.sub(r"(?<=.)(//?\.)+$", "", source)
        if self.options.adapter_roots:
            return str(resolve_source(source, self.options.adapter_roots))
        return str(get_adapter_absolute_path(source))

    # --- what the engine calls --------------------------------------------------------------------------

    def prepare(self, lora_request: LoRARequest) -> ServedAdapter:
        """Bring an adapter into the host tier. Thread-safe, off the engine's thread; `add_adapter` then only
        copies pages. Raises AdapterError or HostTierFullError."""
        if self.device.type == "cuda":
            # A new thread is on device 0, and asking an event there makes a context that takes half a GiB.
            torch.cuda.set_device(self.device)
        self._adapter_manager.copies.drain()
        adapter = self.peers.bring(lora_request) if self.peers is not None else None
        if adapter is not None and (problem := self._capacity_problem(adapter.pages)) is not None:
            raise AdapterError("too_large", f"The adapter '{lora_request.lora_name}' does not fit: {problem}")
        if adapter is None:
            adapter = self.loader.prepare(lora_request)
        self._adapter_manager._validate_moe_lora_format(adapter)
        self._adapter_manager._validate_modules_to_save(adapter)
        self._adapter_manager._validate_token_classification_lora(adapter)
        ensure_wanted()
        self._prepared[lora_request.lora_int_id] = adapter
        self._forget_prepared()
        if self.peers is not None:
            self.peers.served(lora_request)
        return adapter

    def stage(self, lora_id: int) -> bool:
        """Copies a prepared adapter's pages into the arena, if there is room, before a step needs them. Thread-safe,
        off the engine's thread."""
        return self._adapter_manager.staging.stage(lora_id)

    def hold(self, lora_id: int, held: bool = True) -> None:
        """From now on (or no longer) a load aside does not evict the adapter. Thread-safe."""
        self.host.hold(lora_id, held)

    def _forget_prepared(self) -> None:
        """Drops what left the host tier before anybody used it; not what is to replace a registered adapter, which
        would pass for current then."""
        for lora_id in list(self._prepared):
            if lora_id not in self.host and self._adapter_manager.adapter(lora_id) is None:
                self._prepared.pop(lora_id, None)

    def is_prepared(self, lora_id: int) -> bool:
        """Whether `add_adapter` would read nothing but memory."""
        if lora_id in self._prepared:
            # Also where it is active: with what it was before, which nobody asks for now.
            return lora_id in self.host
        manager = self._adapter_manager
        registered = manager.adapter(lora_id)
        if lora_id in manager._active_adapters or (registered is not None and registered.shared_pages):
            return True
        return registered is not None and lora_id in self.host

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Register and activate; the engine's thread. Reads the checkpoint only if nothing prepared it."""
        manager, lora_id = self._adapter_manager, lora_request.lora_int_id
        # A load aside could evict what is found here before it is copied.
        with gpu_sync_allowed(), self.host.keeping(lora_id):
            if lora_request.load_inplace or not self.is_prepared(lora_id):
                self._register(self._prepare_now(lora_request))
            elif (prepared := self._prepared.pop(lora_id, None)) is not None and self._is_news(prepared):
                self._register(prepared)
            else:
                manager.get_adapter(lora_id)
            manager.activate_adapter(lora_id)
        return True

    def _is_news(self, prepared: ServedAdapter) -> bool:
        """Whether a prepared adapter differs from the one that is registered under its id."""
        known = self._adapter_manager.adapter(prepared.id)
        if known is None or known.loras or prepared.loras:
            return True
        return not self._adapter_manager.is_current(prepared.id)

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
        for request in wanted.values():
            # In place means once, when it is added; vLLM keeps the flag in the request of every later step.
            self.add_adapter(settled(request))
        manager.stage_waiting()

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
