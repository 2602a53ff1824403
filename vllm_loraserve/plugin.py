"""Entry point `vllm.general_plugins`: every place where vllm-loraserve attaches to vLLM, in one table.

vLLM runs `register` in its front end, in every engine core and in every worker, before it knows any option. So hooks
that are needed before the options exist are put in place always and decide later, from the options of the engine at
hand: with no `--enable-loraserve` they call what they replaced and nothing else. Hooks of the API server are put in
place when an engine with the flag is configured there.

A hook is put in place only after a check that what it replaces is what it was written for; one failed check, or a vLLM
outside SUPPORTED_VLLM, leaves vLLM as it is, and asking for `--enable-loraserve` then ends with one line saying why.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vllm_loraserve import SUPPORTED_VLLM

logger = logging.getLogger("vllm.loraserve.plugin")


@dataclass(frozen=True)
class Hook:
    """One attachment: `wrap(original)` takes the place of `target`."""

    name: str
    target: str
    """`module:attribute.path`."""
    kind: Literal["official", "semi", "hook"]
    """official: documented extension point; semi: public option, unstable interface; hook: replaced at run time."""
    wrap: Callable[[Any], Any] | None
    """None for what is set in the configuration and replaces nothing."""
    parameters: tuple[str, ...] = ()
    """Names of the parameters that the replaced callable must have, in order."""
    used_by: tuple[str, str] | None = None
    """(`module:attribute.path`, text): where vLLM uses the target, and how; the source there must contain the text."""
    when: Literal["always", "server", "worker", "engine"] = "always"
    """always: by `register`; server: by `install_server_hooks`, in an API-server process that uses the flag; worker: by
    `install_worker_hooks`, where a LoRA manager of ours is made; engine: by `install_engine_hooks`, where a scheduler
    of ours is made."""
    patch: str | None = None
    """Diff under `patches/` that would make the hook unnecessary."""

    def check(self) -> str | None:
        """Why this hook doesn't fit the installed vLLM, or None."""
        try:
            original = _underlying(*_locate(self.target)[1:])
            if self.parameters and tuple(inspect.signature(original).parameters) != self.parameters:
                return f"{self.target} has other parameters than {self.parameters}"
            if self.used_by is not None:
                where, text = self.used_by
                if text not in inspect.getsource(_underlying(*_locate(where)[1:])):
                    return f"{where} no longer contains {text!r}"
        except (ImportError, AttributeError, OSError) as error:
            return f"{self.target}: {error}"
        return None

    def install(self) -> None:
        """Puts the replacement in place, once."""
        if self.wrap is None:
            return
        _, owner, attribute = _locate(self.target)
        static = inspect.getattr_static(owner, attribute)
        if getattr(_underlying(owner, attribute), "__loraserve_hook__", None) == self.name:
            return
        replacement = self.wrap(_underlying(owner, attribute))
        replacement.__loraserve_hook__ = self.name
        if isinstance(static, staticmethod | classmethod):
            replacement = type(static)(replacement)
        setattr(owner, attribute, replacement)


def _locate(target: str) -> tuple[str, Any, str]:
    """`module:a.b` -> (module name, object `a`, "b"); `module:<platform>.b`: the class of the platform in use."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    if not inspect.ismodule(owner) and not inspect.isclass(owner):
        owner = type(owner)
    return module, owner, attribute


def _underlying(owner: Any, attribute: str) -> Any:
    """The plain function (or class) behind an attribute, without binding it."""
    static = inspect.getattr_static(owner, attribute)
    return static.__func__ if isinstance(static, staticmethod | classmethod) else static


_refusal: str | None = None
"""Why the plugin can't be used in this process, in one line; None: it can."""


def refusal() -> str | None:
    """Why the plugin can't be used with the installed vLLM, in one line; None: it can."""
    return _refusal


def _ours(module: str, function: str) -> Callable[..., Any]:
    """A function of a module in `engine/` that is imported when it is first called: such a module may import parts of
    vLLM that another version lacks."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"vllm_loraserve.engine.{module}"), function)(*args)

    return call


def hooks() -> tuple[Hook, ...]:
    """The table. The first two rows are needed to refuse in a clear line, so they come first."""
    return (
        Hook(
            name="command line flags",
            target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
            kind="hook",
            wrap=lambda original: _ours("flags", "wrap_add_cli_args")(original, refusal),
            parameters=("parser",),
            used_by=("vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args", "EngineArgs.add_cli_args(parser)"),
            patch="0001-engine-args-cli-extensions.patch",
        ),
        Hook(
            name="engine configuration",
            target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
            kind="hook",
            wrap=lambda original: _ours("engine_config", "wrap_create_engine_config")(original, refusal),
            parameters=("self", "usage_context", "headless"),
            patch="0002-engine-args-config-extensions.patch",
        ),
        Hook(
            name="options for every process",
            target="vllm.config:VllmConfig.additional_config",
            kind="official",
            wrap=None,
        ),
        Hook(
            name="hash of the configuration",
            target="vllm.config:VllmConfig.compute_hash",
            kind="hook",
            wrap=_ours("config_hash", "wrap_compute_hash"),
            parameters=("self", "include_version"),
            used_by=("vllm.config:VllmConfig.compute_hash", "json.dumps(additional_config, sort_keys=True)"),
            patch="0014-additional-config-hash.patch",
        ),
        Hook(
            name="scheduler class",
            target="vllm.config:SchedulerConfig.scheduler_cls",
            kind="semi",
            wrap=None,
        ),
        Hook(
            name="worker LoRA manager",
            target="vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
            kind="hook",
            wrap=_ours("worker_hooks", "wrap_lora_manager"),
            used_by=(
                "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model",
                "self.lora_manager = LRUCacheWorkerLoRAManager(\n",
            ),
            patch="0003-lora-manager-class.patch",
        ),
        Hook(
            name="LoRA kernels",
            target="vllm.platforms:current_platform.get_punica_wrapper",
            kind="hook",
            wrap=_ours("worker_hooks", "wrap_get_punica_wrapper"),
            parameters=("cls",),
            used_by=(
                "vllm.lora.punica_wrapper.punica_selector:get_punica_wrapper",
                "current_platform.get_punica_wrapper()",
            ),
            patch="0004-punica-wrapper-class.patch",
        ),
        Hook(
            name="size of the KV cache",
            target="vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config",
            kind="hook",
            wrap=_ours("worker_hooks", "wrap_initialize_from_config"),
            parameters=("self", "kv_cache_configs"),
            used_by=(
                "vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config",
                "kv_cache_config = kv_cache_configs[self.global_rank]",
            ),
            when="worker",
            patch="0010-lora-manager-kv-cache.patch",
        ),
        Hook(
            name="start and stop of the API server",
            target="vllm.entrypoints.launchers.api_server.entry:serve_http",
            kind="hook",
            wrap=_ours("api_server", "wrap_serve_http"),
            parameters=("app", "sock", "enable_ssl_refresh", "peer_loads", "uvicorn_kwargs"),
            used_by=(
                "vllm.entrypoints.launchers.api_server.entry:build_and_serve",
                "return await serve_http(\n        app,\n        sock=sock,",
            ),
            when="server",
            patch="0005-api-server-extensions.patch",
        ),
        Hook(
            name="reasons of ended requests",
            target="vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
            kind="hook",
            wrap=_ours("request_errors", "wrap_process_outputs"),
            parameters=("self", "engine_core_outputs", "engine_core_timestamp", "iteration_stats", "weight_version"),
            used_by=("vllm.v1.engine.output_processor:OutputProcessor.process_outputs", "req_state.queue.put("),
            when="server",
            patch="0008-request-error-reasons.patch",
        ),
        Hook(
            name="an engine client's end",
            target="vllm.v1.engine.async_llm:AsyncLLM.shutdown",
            kind="hook",
            wrap=_ours("stopping", "wrap_shutdown"),
            parameters=("self", "timeout"),
            used_by=(
                "vllm.entrypoints.launchers.launcher:serve_http",
                "None, partial(engine_client.shutdown, timeout=timeout)",
            ),
            when="server",
            patch="0013-before-engine-shutdown.patch",
        ),
        Hook(
            name="worker extension",
            target="vllm.config:ParallelConfig.worker_extension_cls",
            kind="official",
            wrap=None,
        ),
        Hook(
            name="adapter resolver",
            target="vllm.lora.resolver:LoRAResolverRegistry.register_resolver",
            kind="official",
            wrap=None,
        ),
        Hook(
            name="resolve unknown adapters",
            target="vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
            kind="hook",
            wrap=_ours("api_server", "wrap_check_model"),
            parameters=("self", "request"),
            used_by=(
                "vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
                "await self.models.resolve_lora(request.model)",
            ),
            when="server",
            patch="0006-resolve-registered-adapters.patch",
        ),
        Hook(
            name="resolve unknown adapters of pooling requests",
            target="vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model",
            kind="hook",
            wrap=_ours("api_server", "wrap_check_pooling_model"),
            parameters=("self", "request"),
            used_by=(
                "vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model",
                "await self.models.resolve_lora(request.model)",
            ),
            when="server",
            patch="0006-resolve-registered-adapters.patch",
        ),
        Hook(
            name="adapters let go while a request is read",
            target="vllm.entrypoints.serve.engine.serving:BaseServing._maybe_get_adapters",
            kind="hook",
            wrap=_ours("api_server", "wrap_get_adapters"),
            parameters=("self", "request", "supports_default_mm_loras"),
            used_by=(
                "vllm.entrypoints.serve.engine.serving:BaseServing._maybe_get_adapters",
                "raise VLLMNotFoundError(",
            ),
            when="server",
            patch="0006-resolve-registered-adapters.patch",
        ),
        Hook(
            # The agent wraps this method on the one engine client of its server (engine/meter.py), not on the class.
            name="demand per adapter",
            target="vllm.v1.engine.async_llm:AsyncLLM.generate",
            kind="hook",
            wrap=None,
            used_by=("vllm.v1.engine.async_llm:AsyncLLM.generate", "lora_request: LoRARequest | None = None,"),
            when="server",
            patch="0007-adapter-in-finished-request-stats.patch",
        ),
        Hook(
            name="demand per adapter of pooling requests",
            target="vllm.v1.engine.async_llm:AsyncLLM.encode",
            kind="hook",
            wrap=None,
            used_by=("vllm.v1.engine.async_llm:AsyncLLM.encode", "lora_request: LoRARequest | None = None,"),
            when="server",
            patch="0007-adapter-in-finished-request-stats.patch",
        ),
        Hook(
            name="load of the instance",
            target="vllm.v1.metrics.loggers:AggregateStatLoggerBase.record",
            kind="semi",
            wrap=None,
            parameters=("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
            used_by=("vllm.v1.metrics.loggers:StatLoggerManager.record", "for stat_logger in self.stat_loggers:"),
            when="server",
        ),
        Hook(
            name="an engine core's wait for requests",
            target="vllm.v1.engine.core:EngineCoreProc._process_input_queue",
            kind="hook",
            wrap=_ours("engine_waits", "wrap_process_input_queue"),
            parameters=("self",),
            used_by=("vllm.v1.engine.core:EngineCoreProc.process_input_sockets", "self.input_queue.put_nowait("),
            when="engine",
            patch="0011-scheduler-waits.patch",
        ),
        Hook(
            name="an engine core's wait for its workers",
            target="vllm.distributed.device_communicators.shm_broadcast:SpinCondition.wait",
            kind="hook",
            wrap=_ours("engine_waits", "wrap_spin_wait"),
            parameters=("self", "timeout_ms"),
            used_by=(
                "vllm.distributed.device_communicators.shm_broadcast:SpinCondition.wait",
                "current_time <= self.last_read + self.busy_loop_s",
            ),
            when="engine",
            patch="0012-message-queue-busy-loop.patch",
        ),
        *_layer_hooks(),
    )


def _layer_hooks() -> tuple[Hook, ...]:
    """Where LoRA layers keep adapters: made without stacks by class, then set and reset on each layer (not its class)
    by `paged_layers.attach` and `stock_layers.track_slots`."""
    patch = "0009-lora-layer-storage.patch"
    linear = "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA"
    merged = "vllm.lora.layers.column_parallel_linear:MergedColumnParallelLinearWithLoRA"
    slots = {
        "linear": linear,
        "merged linear": merged,
        "embedding": "vllm.lora.layers.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA",
        "lm_head": "vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA",
    }
    made = tuple(
        Hook(
            name=f"storage of {what} layers",
            target=f"{cls}.create_lora_weights",
            kind="hook",
            wrap=_ours("paged_layers", "wrap_create_lora_weights"),
            parameters=("self", "max_loras", "lora_config", "model_config"),
            used_by=(f"{cls}.create_lora_weights", "device=self.device,"),
            when="worker",
            patch=patch,
        )
        for what, cls in (("linear", linear), ("merged linear", merged))
    )
    methods = {"set_lora": ("self", "index", "lora_a", "lora_b"), "reset_lora": ("self", "index")}
    changed = tuple(
        Hook(
            name=f"{method} of {what} layers",
            target=f"{cls}.{method}",
            kind="hook",
            wrap=None,
            parameters=parameters,
            used_by=("vllm.lora.model_manager:LoRAModelManager.activate_adapter", f"module.{method}("),
            when="worker",
            patch=patch,
        )
        for what, cls in slots.items()
        for method, parameters in methods.items()
    )
    read = Hook(
        name="stacked weights of linear layers",
        target=f"{linear}._apply_lora_to_output",
        kind="hook",
        wrap=None,
        used_by=(f"{linear}._apply_lora_to_output", "output, x, self.lora_a_stacked, self.lora_b_stacked, 1.0"),
        when="worker",
        patch=patch,
    )
    return *made, *changed, read


def unsupported_version() -> str | None:
    """One line when the installed vLLM is outside SUPPORTED_VLLM, else None; the distribution's name doesn't matter."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version
    from vllm import __version__ as installed

    try:
        if SpecifierSet(SUPPORTED_VLLM, prereleases=True).contains(Version(installed)):
            return None
    except InvalidVersion:
        pass
    return f"vllm-loraserve supports vLLM {SUPPORTED_VLLM}; installed is {installed}: --enable-loraserve can't be used"


def register() -> None:
    """Puts the hooks of every process in place; may be called any number of times in one process.

    Raises nothing: vLLM calls it in every process, whether the flag will be given or not.
    """
    global _refusal
    table = tuple(hook for hook in hooks() if hook.when == "always")
    _refusal = unsupported_version() or _problem(table) or _install(table)
    if _refusal is not None:
        logger.warning("%s", _refusal)
        _install(tuple(hook for hook in table[:2] if hook.check() is None))


def install_server_hooks() -> str | None:
    """Puts the API server's hooks in place, or says in one line why they don't fit."""
    return _check_and_install("server")


def install_worker_hooks() -> str | None:
    """Puts the hooks of LoRA layers in place, or says in one line why they don't fit."""
    return _check_and_install("worker")


def install_engine_hooks() -> str | None:
    """Puts the hooks of how an engine core waits in place, or says in one line why they don't fit."""
    return _check_and_install("engine")


def worker_problem() -> str | None:
    """Why the hooks of workers and engine cores don't fit, in one line; for whom it is too early to put them in
    place."""
    return _problem(tuple(hook for hook in hooks() if hook.when in ("worker", "engine")))


def _check_and_install(when: str) -> str | None:
    table = tuple(hook for hook in hooks() if hook.when == when)
    return _problem(table) or _install(table)


def _install(table: tuple[Hook, ...]) -> str | None:
    """Installs in order; the first one that can't be is named, in one line, and ends it."""
    for hook in table:
        try:
            hook.install()
        except ImportError as error:
            return f"vllm-loraserve doesn't fit this vLLM: hook {hook.name!r}: {error}"
    return None


def _problem(table: tuple[Hook, ...]) -> str | None:
    """The first failed check, in one line."""
    for hook in table:
        if (problem := hook.check()) is not None:
            return f"vllm-loraserve doesn't fit this vLLM: hook {hook.name!r}: {problem}"
    return None
