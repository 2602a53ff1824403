"""From a LoRA request to an adapter in the host tier: read, check, convert, checksum. Off the engine's thread.

Everything here may run on a side thread while the engine steps: it touches the host tier (which has its own
lock) and read-only facts about the model, never a slot, a page table or the arena.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name

from vllm_loraserve.adapters.checkpoint import (
    AdapterError,
    Checkpoint,
    LoRATensors,
    open_checkpoint,
)
from vllm_loraserve.adapters.convert import ModulePlan, WeightsReader, slice_ranks, write_pages
from vllm_loraserve.adapters.layout import Layout
from vllm_loraserve.adapters.page_cache import PageCache
from vllm_loraserve.engine.load_threads import ensure_wanted
from vllm_loraserve.engine.paged_layers import plan_module, slice_parts
from vllm_loraserve.engine.registered import RegisteredContents
from vllm_loraserve.engine.single_thread import single_thread
from vllm_loraserve.memory.host_tier import HostEntry, HostTier

logger = logging.getLogger(__name__)

_SETTLED_S = 2.0
_MOST_DIGESTS = 10_000


def settled(request: LoRARequest, inplace: bool = False) -> LoRARequest:
    """The request without `load_inplace`, which asks vLLM to read the adapter again in every step."""
    if request.load_inplace == inplace:
        return request
    return msgspec.structs.replace(request, load_inplace=inplace)


class ServedAdapter(LoRAModel):
    """A registered adapter as vLLM's manager sees it: `loras` holds only the modules outside the pages."""

    request: LoRARequest | None = None
    ranks: tuple[int, ...] = ()
    """Rank of every slice of the layout."""
    pages: tuple[int, ...] = ()
    """Pages in each module group."""
    shared_pages: bool = False
    """A warm-up adapter: all such share one set of zero pages."""

    @property
    def page_rank(self) -> int:
        return max(self.ranks, default=0)

    def clone(self, lora_model_id: int) -> LoRAModel:
        """The same under another id; vLLM makes all warm-up adapters but the first one so."""
        copy = super().clone(lora_model_id)
        assert isinstance(copy, ServedAdapter)
        copy.request, copy.ranks, copy.pages, copy.shared_pages = (
            self.request,
            self.ranks,
            self.pages,
            self.shared_pages,
        )
        return copy


class ModelFacts:
    """What conversion must know about this worker's model; fixed once the LoRA layers are made."""

    def __init__(
        self,
        *,
        layout: Layout,
        layers: Mapping[str, Any],
        parts: Mapping[str, Sequence[str]],
        stock_names: frozenset[str],
        expected_suffixes: frozenset[str],
        module_names: frozenset[str],
        elsewhere: frozenset[str],
        left_out: frozenset[str],
        weights_mapper: Any,
        skip_prefixes: Sequence[str],
        strip_model_prefix: bool,
        allow_modules_to_save: bool,
        max_rank: int,
        stock_max_rank: int,
        lora_dtype: torch.dtype,
        vocab_size: int,
        max_positions: int | None,
    ) -> None:
        self.layout, self.layers, self.parts = layout, layers, parts
        self.stock_names, self.expected_suffixes = stock_names, expected_suffixes
        self.module_names, self.elsewhere, self.left_out = module_names, elsewhere, left_out
        """All modules of this worker's model, those that hold others too; those that another pipeline stage has; towers
        and the like, of which vLLM may build less than was trained."""
        self.weights_mapper, self.skip_prefixes = weights_mapper, list(skip_prefixes)
        self.strip_model_prefix, self.allow_modules_to_save = strip_model_prefix, allow_modules_to_save
        self.max_rank, self.stock_max_rank = max_rank, stock_max_rank
        self.lora_dtype, self.vocab_size, self.max_positions = lora_dtype, vocab_size, max_positions


class AdapterLoader:
    """Brings adapters into `tier`. `prepare` is thread-safe; two threads may prepare different adapters."""

    def __init__(
        self,
        facts: ModelFacts,
        tier: HostTier,
        *,
        cache: PageCache | None = None,
        resolve: Callable[[str], str] = get_adapter_absolute_path,
        capacity: Callable[[Sequence[int]], str | None] = lambda pages: None,
    ) -> None:
        self.facts, self.tier, self.cache = facts, tier, cache
        self._resolve, self._capacity = resolve, capacity
        self.registered = RegisteredContents()
        self._digests: dict[Path, tuple[tuple[object, ...], str]] = {}
        """Weights file -> (its stat and config, the content hash)."""

    def prepare(self, request: LoRARequest, commit: Callable[[HostEntry], object] | None = None) -> ServedAdapter:
        """Read the adapter of `request` and put its pages into the host tier under its integer id.

        commit: called with the filled entry in place of the tier's own `commit`; it owns the entry then.

        An adapter that is there already, of the same content, is not converted again.
        Raises AdapterError (see its kinds) or HostTierFullError; the host tier is then as before.
        """
        began = time.perf_counter()
        facts = self.facts
        checkpoint = open_checkpoint(
            self._resolve(request.lora_path),
            max_rank=facts.max_rank,
            allow_modules_to_save=facts.allow_modules_to_save,
        )
        reader = WeightsReader(checkpoint)
        plans, rest = self._plan(checkpoint)
        adapter = self._outside_pages(request, reader, rest)
        ranks = slice_ranks(
            facts.layout, plans, {plan.module: slice_parts(facts.layers[plan.module], plan.parts) for plan in plans}
        )
        adapter.request, adapter.ranks = request, tuple(ranks)
        adapter.pages = facts.layout.pages_for(ranks)
        problem = self._capacity(adapter.pages)
        if problem is not None:
            raise AdapterError(
                "too_large", f"The adapter '{request.lora_name}' of rank {checkpoint.rank} does not fit: {problem}"
            )
        digest = self._digest(reader)
        entry = self.tier.get(request.lora_int_id)
        if entry is None or request.load_inplace or entry.digest != digest.result():
            source = self._fill(request, reader, plans, ranks, digest, commit or self.tier.commit)
            logger.info(
                "Adapter %s: rank %d, %.1f MiB in pages, from %s in %.0f ms",
                request.lora_name,
                checkpoint.rank,
                facts.layout.size_bytes(adapter.pages) / 2**20,
                source,
                (time.perf_counter() - began) * 1e3,
            )
        else:
            self.registered.check(request, checkpoint.directory, digest.result())
        return adapter

    def _digest(self, reader: WeightsReader) -> Future[str]:
        """The content hash, which another thread makes, since it takes about as long as the conversion that can go on
        beside it; a file that has not been touched since it was hashed is not read again."""
        path, stat = reader.checkpoint.weights_path, reader.stat()
        seen = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        key = (seen, reader.checkpoint.config.normalised())
        digest = Future[str]()
        known = self._digests.get(path)
        if known is not None and known[0] == key:
            digest.set_result(known[1])
            return digest

        def read() -> None:
            try:
                made = reader.digest()
                # A file changed just now may change again without another time stamp.
                if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_S:
                    if len(self._digests) >= _MOST_DIGESTS:
                        self._digests.clear()
                    self._digests[path] = (key, made)
            except BaseException as error:
                digest.set_exception(error)
            else:
                digest.set_result(made)

        try:
            threading.Thread(target=read, name="loraserve-hash", daemon=True).start()
        except RuntimeError:  # can't start new thread
            read()
        return digest

    def _fill(
        self,
        request: LoRARequest,
        reader: WeightsReader,
        plans: Sequence[ModulePlan],
        ranks: Sequence[int],
        digest: Future[str],
        commit: Callable[[HostEntry], object],
    ) -> str:
        directory, opened = reader.checkpoint.directory, reader.stat()
        # Only the page cache has to know the content before it is read.
        entry = self.tier.create(request.lora_int_id, digest.result() if self.cache is not None else "", ranks)
        try:
            source = self._from_cache(entry) if self.cache is not None else None
            if source is None:
                source = "its checkpoint"
                with single_thread():
                    write_pages(reader, self.facts.layout, plans, ranks, self.tier.targets(entry))
                if reader.stat() != opened:
                    raise AdapterError("mismatch", f"'{directory}' was changed while it was read; load it again.")
            entry.digest = digest.result()
            self.registered.check(request, directory, entry.digest)
            ensure_wanted()
        except BaseException:
            self.tier.discard(entry)
            raise
        commit(entry)
        if self.cache is not None and source == "its checkpoint":
            with self.tier.reading(entry.key) as kept:
                if kept is entry:
                    self.cache.write(
                        entry.digest,
                        self.facts.layout.fingerprint,
                        ranks,
                        entry.checksums,
                        self.tier.slab.view(entry.offset, entry.size),
                    )
        return source

    def _from_cache(self, entry: HostEntry) -> str | None:
        assert self.cache is not None
        head = self.cache.find(entry.digest, self.facts.layout.fingerprint)
        if head is None or (head.ranks, head.size) != (entry.ranks, entry.size):
            return None
        if not self.cache.read_into(head, self.tier.slab.view(entry.offset, entry.size)):
            return None
        if tuple(self.tier.current_checksums(entry)) != head.checksums:
            logger.warning("Cached pages of %s are damaged and not used", entry.digest[:12])
            return None
        return "the page cache"

    def _plan(self, checkpoint: Checkpoint) -> tuple[list[ModulePlan], list[LoRATensors]]:
        """Plans for the paged modules, and the checkpoint modules for this worker's layers outside the pages.

        What is for neither is not read, as vLLM does not use it: layers of other pipeline stages, and layers that get
        no LoRA here (--lora-target-modules, vision towers). Modules that the model has not are no such layers, and
        raise AdapterError `mismatch`: without them the answers would be those of another model, of the base model
        where nothing is left.
        """
        facts = self.facts
        found: dict[str, LoRATensors] = {}
        for module in checkpoint.modules:
            if LoRAModel._should_skip_module(module.name, facts.skip_prefixes):
                continue
            name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module.name}.lora_A.weight", facts.weights_mapper)
            found[name] = module
        plans = []
        for runtime, part_names in facts.parts.items():
            parts = [self._take(found, name) for name in part_names]
            if not any(parts):
                # A checkpoint may hold the fused module itself (`qkv_proj`).
                parts = [self._take(found, runtime)]
            if any(parts):
                plans.append(plan_module(runtime, facts.layers[runtime], parts))
        rest = [module for name, module in found.items() if self._is_stock(name)]
        unserved = [name for name in found if not self._is_stock(name)]
        for name in unserved:
            self._check_unserved(name, checkpoint)
        served = plans or rest or checkpoint.full_tensors or any(map(self._is_elsewhere, unserved))
        if not served:
            raise AdapterError(
                "mismatch",
                f"Nothing that '{checkpoint.directory}' changes gets LoRA here; it would answer as the base model. It "
                f"targets {', '.join(sorted({module.suffix for module in checkpoint.modules})) or 'no module'}: see "
                "--lora-target-modules.",
            )
        return plans, rest

    def _check_unserved(self, name: str, checkpoint: Checkpoint) -> None:
        suffix = name.rsplit(".", 1)[-1]
        if suffix not in self.facts.expected_suffixes:
            raise AdapterError(
                "mismatch",
                f"'{checkpoint.directory}' targets '{name}', which this model has not; its modules are "
                f"{', '.join(sorted(self.facts.expected_suffixes))}.",
            )
        known = any(spelling.rpartition(".")[0] in self.facts.module_names for spelling in self._spellings(name))
        if not known and not self._is_elsewhere(name) and not self._is_below(name, self.facts.left_out):
            raise AdapterError(
                "mismatch",
                f"'{checkpoint.directory}' targets '{name}', and this model has no '{name.rpartition('.')[0]}'; train "
                "the adapter on this base model.",
            )

    def _is_elsewhere(self, name: str) -> bool:
        return self._is_below(name, self.facts.elsewhere)

    def _is_below(self, name: str, modules: frozenset[str]) -> bool:
        """Whether the name is one of `modules` or of a part of one."""
        return any(
            ".".join(parts[:count]) in modules
            for parts in (spelling.split(".") for spelling in self._spellings(name))
            for count in range(1, len(parts) + 1)
        )

    def _spellings(self, name: str) -> tuple[str, ...]:
        """The name as the checkpoint has it, and as this model may: see `strip_model_prefix`."""
        return (name, f"model.{name}") if self.facts.strip_model_prefix else (name,)

    def _is_stock(self, name: str) -> bool:
        names = self.facts.stock_names
        return ".experts" in name or name in names or (self.facts.strip_model_prefix and f"model.{name}" in names)

    def _take(self, found: dict[str, LoRATensors], name: str) -> LoRATensors | None:
        if name not in found and self.facts.strip_model_prefix:
            name = name.removeprefix("model.")
        return found.pop(name, None)

    def _outside_pages(self, request: LoRARequest, reader: WeightsReader, rest: Sequence[LoRATensors]) -> ServedAdapter:
        """The adapter with the modules that stay on vLLM's path, in vLLM's own form."""
        facts, checkpoint = self.facts, reader.checkpoint
        if not rest and not checkpoint.full_tensors:
            return ServedAdapter(request.lora_int_id, checkpoint.rank, {})
        for module in rest:
            if module.rank > facts.stock_max_rank:
                raise AdapterError(
                    "too_large",
                    f"'{checkpoint.directory}' has rank {module.rank} in '{module.name}', which is not served "
                    f"from pages; start with --max-lora-rank {module.rank} (now {facts.stock_max_rank}).",
                )
        wanted = {id(entry) for module in rest for entry in (module.a, module.b)}
        # Cloned: vLLM scales B in place, and the file's map must not stay open as long as the adapter.
        tensors = {
            name: reader.tensor(entry).clone()
            for name, entry in checkpoint.entries.items()
            if id(entry) in wanted or name in checkpoint.full_tensors
        }
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor.to(facts.lora_dtype)).all()):
                raise AdapterError(
                    "invalid",
                    f"The adapter's '{name}' has NaN or Inf in {str(facts.lora_dtype).removeprefix('torch.')}; use an "
                    "earlier checkpoint of its training.",
                )
        adapter = ServedAdapter.from_lora_tensors(
            request.lora_int_id,
            tensors,
            PEFTHelper.from_local_dir(str(checkpoint.directory), facts.max_positions),
            device="cpu",
            dtype=facts.lora_dtype,
            model_vocab_size=facts.vocab_size,
            weights_mapper=facts.weights_mapper,
            skip_prefixes=facts.skip_prefixes,
        )
        # One pair for all experts is stored under their own name.
        # vLLM wants the request to say it, which one for a registered name cannot.
        adapter.is_3d_lora_weight = any(name.endswith(".experts") for name in adapter.loras)
        return adapter
