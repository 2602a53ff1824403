"""Worker side of loading adapters aside: reading and converting on a side thread, activating in the step.

`side_loading(cls)` adds that to a worker LoRA manager class. A manager that can prepare an adapter off the engine's
thread offers `prepare(lora_request)` itself, and `hold(adapter)`, which keeps what is ready until it is activated; for
vLLM's own manager `prepare` reads the checkpoint into the LoRAModel that `add_adapter` will then find instead of
reading.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

import msgspec
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from vllm_loraserve.adapters.checkpoint import open_checkpoint
from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine import channel, worker_desk
from vllm_loraserve.engine.adapter_loader import settled
from vllm_loraserve.engine.engine_config import config_of
from vllm_loraserve.engine.load_threads import LoadThreads, SupersededError, ensure_wanted, wanted
from vllm_loraserve.engine.loader_thread import step_aside
from vllm_loraserve.memory.host_tier import HostTierFullError

logger = init_logger("vllm.loraserve.side_loading")

WARM_UP_PATH = "/not/a/real/path"
"""What vLLM's dummy batches give as their adapters' path."""
FIGURES_AFTER_S = 0.1
"""From the end of a load, or a change of what runs, to the report of the worker's figures."""


def side_loading(cls: type) -> type:
    """A subclass of a worker LoRA manager class that loads aside."""
    bases = (SideLoadingMixin, cls) if hasattr(cls, "prepare") else (SideLoadingMixin, PrepareStockMixin, cls)
    return type(f"SideLoading{cls.__name__}", bases, {"__module__": __name__})


class PrepareStockMixin:
    """`prepare` for vLLM's own manager."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._prepared: dict[int, tuple[str, Any]] = {}
        self._prepared_lock = threading.Lock()
        self._held: set[int] = set()
        super().__init__(*args, **kwargs)

    @property
    def prepared_capacity(self) -> int:
        """Adapters held ready at a time."""
        return max(int(self.lora_config.max_cpu_loras), 2)  # type: ignore[attr-defined]

    def prepare(self, lora_request: LoRARequest) -> int:
        """Reads the checkpoint; returns its largest rank. Raises what reading raises."""
        lora = super()._load_adapter(lora_request)  # type: ignore[misc]
        ensure_wanted()
        with self._prepared_lock:
            self._prepared.pop(lora_request.lora_int_id, None)
            idle = [adapter for adapter in self._prepared if adapter not in self._held]
            for adapter in idle[: max(len(self._prepared) + 1 - self.prepared_capacity, 0)]:
                del self._prepared[adapter]
            self._prepared[lora_request.lora_int_id] = (lora_request.lora_path, lora)
        return int(lora.rank)

    def hold(self, adapter_id: int, held: bool = True) -> None:
        """From now on (or no longer) later ones do not push the adapter out. Thread-safe."""
        with self._prepared_lock:
            (self._held.add if held else self._held.discard)(adapter_id)

    def is_prepared(self, adapter_id: int) -> bool:
        """True when activating needs no reading."""
        return adapter_id in self._prepared or adapter_id in self.list_adapters()  # type: ignore[attr-defined]

    def _load_adapter(self, lora_request: LoRARequest) -> Any:
        with self._prepared_lock:
            prepared = self._prepared.pop(lora_request.lora_int_id, None)
        if prepared is not None and prepared[0] == lora_request.lora_path:
            return prepared[1]
        return super()._load_adapter(lora_request)  # type: ignore[misc]


class _UnderWay:
    """A load that has not ended; `attempt`: the scheduler's order that it answers, 0: none."""

    __slots__ = ("attempt", "path")

    def __init__(self, path: str, attempt: int) -> None:
        self.path, self.attempt = path, attempt


class SideLoadingMixin:
    """Takes the scheduler's orders and answers them; `add_adapter` outside a step only starts a load."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self._in_step = False
        self._paths: dict[int, str] = {}
        """Adapter -> the path it was read from, for adapters that are ready."""
        self._lora_ranks: dict[int, int] = {}
        """Adapter -> its rank in rank rows, as far as loads have told."""
        self._ran: frozenset[int] = frozenset()
        """Adapters of the last step."""
        self._orders = threading.Lock()
        self._under_way: dict[int, _UnderWay] = {}
        self._held_for: dict[int, int] = {}
        """Adapter that stays in host memory until it is activated -> the attempt that brings it, 0: it was there."""
        self.load_errors: dict[int, str] = {}
        """Adapter -> why it could not be loaded, until it is loaded or removed."""
        self._figures_are_due = False
        self._vllm_config = vllm_config
        self._channel: channel.WorkerEnd | None = None
        options = config_of(vllm_config) or LoRAServeConfig()
        self.loads = LoadThreads(options.concurrent_loads, options.load_timeout_s)

    def create_lora_manager(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class; afterwards the worker can take orders."""
        model = super().create_lora_manager(*args, **kwargs)  # type: ignore[misc]
        address = channel.address_of(self._vllm_config)
        if address is not None:
            arena = getattr(self._adapter_manager, "arena", None)  # type: ignore[attr-defined]
            hello = channel.Hello(
                rank=self._vllm_config.parallel_config.rank,
                rank_rows=arena.rank_rows if arena is not None else None,
                page_rows=arena.layout.page_rows if arena is not None else 1,
                prepared=self._ahead(),
                host_rows=self._host_rows(),
            )
            self._channel = channel.WorkerEnd(address, hello, self._on_order)
            if (peers := getattr(self, "peers", None)) is not None:
                peers.on_progress = self._report_figures
            self._report_figures()
        options = config_of(self._vllm_config)
        if options is not None and options.coordinator is not None:
            desks = worker_desk.addresses(self._vllm_config)
            if desks is not None:
                worker_desk.WorkerDesk(desks[self._vllm_config.parallel_config.rank], self)
        return model

    def _ahead(self) -> int:
        """Adapters that can be held ready beside those that fill the slots."""
        capacity = getattr(self, "prepared_capacity", None)
        if capacity is None:
            lora_config = self._vllm_config.lora_config
            capacity = int(lora_config.max_cpu_loras) - int(lora_config.max_loras)
        return max(capacity, 1)

    def _host_rows(self) -> int | None:
        """Rank rows of adapters for all modules that the host tier holds; None: no tier, or no module lies in pages."""
        host = getattr(self, "host", None)
        if host is None or host.layout.bytes_per_page_set == 0:
            return None
        return int(host.capacity_bytes // host.layout.bytes_per_page_set * host.layout.page_rows)

    # ---- orders, on the channel's thread ----

    def _on_order(self, order: channel.Order) -> None:
        if isinstance(order, channel.Release):
            self._release(order.adapter)
        elif isinstance(order, channel.Hold):
            self._hold(order.adapter)
        elif isinstance(order, channel.Prepare):
            self._hold(order.adapter, order.attempt)
            # By its content an adapter is read again, not because a request of a load in place asks for it.
            request = settled(msgspec.msgpack.decode(order.request, type=LoRARequest))
            if not self._adopts(request, order.attempt):
                self._start_load(request, order.attempt)

    def _hold(self, adapter: int, attempt: int = 0) -> None:
        with self._orders:
            self._held_for[adapter] = attempt or self._held_for.get(adapter, 0)
            self.hold(adapter)  # type: ignore[attr-defined]

    def _release(self, adapter: int, attempt: int | None = None) -> None:
        """The adapter may be evicted; with `attempt` only if no later order holds it."""
        with self._orders:
            if adapter in self._held_for and attempt in (None, self._held_for[adapter]):
                del self._held_for[adapter]
                self.hold(adapter, False)  # type: ignore[attr-defined]

    def _adopts(self, request: LoRARequest, attempt: int) -> bool:
        """Whether a load of `add_lora` answers the order, so that nothing is read twice: one that runs or has ended."""
        adapter, path = request.lora_int_id, request.lora_path
        with self._orders:
            load = self._under_way.get(adapter)
            if load is not None and not load.attempt and self.loads.runs(adapter, path):
                load.attempt = attempt
                return True
        lora_rank = self._lora_ranks.get(adapter)
        if lora_rank is None or self._paths.get(adapter) != path or not self.is_prepared(adapter):  # type: ignore[attr-defined]
            return False
        rank = self._vllm_config.parallel_config.rank
        self._report(channel.Ready(rank, adapter, attempt, lora_rank, 0.0, path))
        return True

    def _start_load(self, request: LoRARequest, attempt: int) -> None:
        """`attempt`: the scheduler's; 0: nobody has ordered it, and it waits for its turn."""
        load = _UnderWay(request.lora_path, attempt)
        with self._orders:
            self._under_way[request.lora_int_id] = load
        self.loads.start(
            request.lora_int_id,
            request.lora_path,
            lambda: self._load(request, load),
            lambda error: self._fail(request, self._ended(request, load), error),
            queued=attempt == 0,
        )

    def _ended(self, request: LoRARequest, load: _UnderWay) -> int:
        """From now on no order adopts the load; returns the attempt that it answers."""
        with self._orders:
            if self._under_way.get(request.lora_int_id) is load:
                del self._under_way[request.lora_int_id]
            return load.attempt

    def _load(self, request: LoRARequest, load: _UnderWay) -> None:
        step_aside()
        begin = time.monotonic()
        adapter = request.lora_int_id
        rank = self._vllm_config.parallel_config.rank
        try:
            lora_rank = _rank_of(self.prepare(request))  # type: ignore[attr-defined]
            ensure_wanted()
            self._paths[adapter], self._lora_ranks[adapter] = request.lora_path, lora_rank
            self.load_errors.pop(adapter, None)
            seconds = time.monotonic() - begin
            if load.attempt and (stage := getattr(self, "stage", None)) is not None:
                stage(adapter)
            attempt = self._ended(request, load)
            self._report(channel.Ready(rank, adapter, attempt, lora_rank, seconds, request.lora_path))
        except Exception as error:
            self._fail(request, self._ended(request, load), error)
        self._sweep()
        self._report_figures_soon()

    def _fail(self, request: LoRARequest, attempt: int, error: Exception) -> None:
        """Tells why a load did not end well; of one that nobody wants now only a scheduler that ordered it hears."""
        superseded = isinstance(error, SupersededError) or not wanted()
        if attempt:
            self._release(request.lora_int_id, attempt)
        elif superseded:
            return
        reason = f"LoRA adapter '{request.lora_name}' can't be loaded: {_one_line(error)}"
        if not superseded:
            self.load_errors[request.lora_int_id] = reason
        rank, transient = self._vllm_config.parallel_config.rank, superseded or is_transient(error)
        self._report(
            channel.Failed(
                rank,
                request.lora_int_id,
                attempt,
                reason,
                transient,
                503 if superseded else _status_of(error),
                no_room=isinstance(error, HostTierFullError),
            )
        )

    def _report_figures_soon(self) -> None:
        """Not now: what was loaded is about to run, and to collect the figures takes the interpreter from the step."""
        with self._orders:
            if self._figures_are_due or self._channel is None:
                return
            timer = threading.Timer(FIGURES_AFTER_S, self._report_figures)
            timer.daemon = True
            with contextlib.suppress(RuntimeError):  # no thread to be had: the next load reports
                timer.start()
                self._figures_are_due = True

    def _report_figures(self) -> None:
        self._figures_are_due = False
        families = [
            family
            for part in (getattr(self, "memory", None), getattr(self, "peers", None))
            if part is not None
            for family in part.metrics()
        ]
        if families:
            self._report(channel.Figures(self._vllm_config.parallel_config.rank, families))

    def _report(self, report: channel.Report) -> None:
        if self._channel is not None:
            self._channel.report(report)

    def _sweep(self) -> None:
        """Tells which adapters are not ready any more: bringing one in may have pushed others out."""
        for adapter in list(self._paths):
            if not self.is_prepared(adapter):  # type: ignore[attr-defined]
                self._tell_gone(adapter)

    # ---- vLLM's calls, on the engine's thread ----

    def set_active_adapters(self, lora_requests: Any, *args: Any, **kwargs: Any) -> None:
        self._in_step = True
        try:
            super().set_active_adapters(lora_requests, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._in_step = False
        runs = frozenset(request.lora_int_id for request in lora_requests if request)
        if not runs <= self._ran:
            # One that was activated may have taken the place of another one, which may have had no other.
            self._sweep()
            self._report_figures_soon()
        self._ran = runs

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """In a step: activates. Outside (`add_lora`): checks that the adapter is there, loads aside, returns."""
        adapter = lora_request.lora_int_id
        if self._channel is None:
            return super().add_adapter(lora_request)  # type: ignore[misc]
        if not self._in_step:
            if self._paths.get(adapter) != lora_request.lora_path or lora_request.load_inplace:
                self.load_errors.pop(adapter, None)
                peers = getattr(self, "peers", None)
                if peers is None or not peers.knows(lora_request):
                    self._look_at(lora_request)
                if lora_request.load_inplace or not self.loads.pending(adapter, lora_request.lora_path):
                    self._start_load(settled(lora_request), attempt=0)
            return True
        host = getattr(self, "host", None)
        # What is found ready must not be evicted before it is active: the step would read it, and nobody know.
        with host.keeping(adapter) if host is not None else contextlib.nullcontext():
            return self._add_in_step(lora_request)

    def _add_in_step(self, lora_request: LoRARequest) -> bool:
        adapter = lora_request.lora_int_id
        path = self._paths.get(adapter)
        if lora_request.lora_path == WARM_UP_PATH and self.is_prepared(adapter):  # type: ignore[attr-defined]
            # A batch that keeps step with other engines': whatever has this number will do.
            return bool(super().add_adapter(settled(lora_request)))  # type: ignore[misc]
        if path == lora_request.lora_path and self.is_prepared(adapter):  # type: ignore[attr-defined]
            added = super().add_adapter(settled(lora_request))  # type: ignore[misc]
            self._release(adapter)
            return bool(added)
        begin = time.monotonic()
        self.loads.supersede(adapter)
        replaced = path is not None and path != lora_request.lora_path
        # Warm-up adapters, for one, were never loaded aside, and have nothing to read.
        reads = replaced or not self.is_prepared(adapter)  # type: ignore[attr-defined]
        added = super().add_adapter(settled(lora_request, inplace=replaced))  # type: ignore[misc]
        if reads:
            rank = self._vllm_config.parallel_config.rank
            self._report(channel.Stalled(rank, adapter, time.monotonic() - begin))
            self._report_figures_soon()
        self._paths[adapter] = lora_request.lora_path
        self._release(adapter)
        self._sweep()
        return bool(added)

    def _look_at(self, lora_request: LoRARequest) -> None:
        """Refuses in the caller's turn what the files' headers show to be wrong; raises as the loader does."""
        loader = getattr(self, "loader", None)
        if loader is None:
            _check_exists(lora_request)
        else:
            facts = loader.facts
            open_checkpoint(
                self._resolve(lora_request.lora_path),  # type: ignore[attr-defined]
                max_rank=facts.max_rank,
                allow_modules_to_save=facts.allow_modules_to_save,
            )

    def remove_adapter(self, adapter_id: int) -> bool:
        self.loads.supersede(adapter_id)
        removed = super().remove_adapter(adapter_id)  # type: ignore[misc]
        self.load_errors.pop(adapter_id, None)
        self._release(adapter_id)
        if adapter_id in self._paths:
            self._tell_gone(adapter_id)
        return removed

    def pin_adapter(self, adapter_id: int) -> bool:
        pinned = super().pin_adapter(adapter_id)  # type: ignore[misc]
        self._report(channel.Pinned(self._vllm_config.parallel_config.rank, adapter_id, True))
        return bool(pinned)

    def unpin_adapter(self, adapter_id: int) -> bool:
        known = super().unpin_adapter(adapter_id)  # type: ignore[misc]
        self._report(channel.Pinned(self._vllm_config.parallel_config.rank, adapter_id, False))
        return bool(known)

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()  # type: ignore[misc]
        for adapter in list(self._held_for):
            self._release(adapter)
        for adapter in list(self._paths):
            self._tell_gone(adapter)

    def _tell_gone(self, adapter: int) -> None:
        self._paths.pop(adapter, None)
        self._lora_ranks.pop(adapter, None)
        self._report(channel.Gone(self._vllm_config.parallel_config.rank, adapter))


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: the source was slow or away, not wrong, or others took the room just now."""
    if isinstance(error, HostTierFullError):
        return True
    return isinstance(error, OSError) and not isinstance(
        error, FileNotFoundError | NotADirectoryError | PermissionError
    )


def _rank_of(prepared: Any) -> int:
    """Largest rank over the modules that lie in pages (or over all), of what `prepare` returned."""
    return int(getattr(prepared, "page_rank", prepared))


def _status_of(error: BaseException) -> int:
    """The HTTP status for requests that need what couldn't be loaded."""
    kinds = {"not_found": 404, "forbidden": 403}
    if isinstance(error, FileNotFoundError) or type(error).__name__ == "LoRAAdapterNotFoundError":
        return 404
    if (status := getattr(error, "http_status", None)) is not None:
        return int(status)
    return 503 if is_transient(error) else kinds.get(getattr(error, "kind", ""), 400)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_exists(request: LoRARequest) -> None:
    """Cheap refusal of what can't be an adapter, in the caller's turn; raises as vLLM's loader does."""
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.lora.utils import get_adapter_absolute_path

    path = get_adapter_absolute_path(request.lora_path)
    local = os.path.isabs(path) or os.path.exists(path)
    if local and not os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
