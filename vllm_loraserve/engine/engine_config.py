"""What the flag changes in vLLM's configuration, before and after vLLM makes it.

`--enable-loraserve` implies LoRA; the scheduler is ours. `--max-lora-rank` keeps its value: it only sizes what pages do
not cover, and the arena where `--max-loras` is given and the arena is not. Nothing here runs without the flag.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import msgspec
from vllm.logger import init_logger

from vllm_loraserve.config import ADDITIONAL_CONFIG_KEY, ConfigError, LoRAServeConfig, parse_config
from vllm_loraserve.engine.default_memory import NotGiven, fill_in, is_given

logger = init_logger("vllm.loraserve.engine_config")


def config_of(vllm_config: Any) -> LoRAServeConfig | None:
    """The options that a VllmConfig carries; None: the plugin is off for this engine."""
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, dict) or additional.get(ADDITIONAL_CONFIG_KEY) is None:
        return None
    return parse_config(additional[ADDITIONAL_CONFIG_KEY])


def prepare_engine_args(args: Any) -> LoRAServeConfig | None:
    """Fills in what the flag implies on an EngineArgs; None: the flag is off and nothing was touched.

    Raises ConfigError in one line naming key, value and limit.
    """
    if not isinstance(args.additional_config, dict) or args.additional_config.get(ADDITIONAL_CONFIG_KEY) is None:
        return None
    raw = args.additional_config[ADDITIONAL_CONFIG_KEY]
    config = parse_config(raw)
    _check_transfer_key(config)
    _check_member_keys(config)
    _check_operating_points(config)
    args.enable_lora = True
    if not args.max_cpu_loras:
        # Adapters are brought in ahead of their turn, and must not push out those that run.
        args.max_cpu_loras = NotGiven(args.max_loras + config.prefetch)
    args.additional_config = {**args.additional_config, ADDITIONAL_CONFIG_KEY: msgspec.to_builtins(config)}
    return config


def check_layout(args: Any, config: LoRAServeConfig) -> None:
    """Raises ConfigError for servers that can't be one instance of a cluster.

    An instance is one engine behind one API server. API servers of one engine each number adapters from 1, so that the
    engine would take the weights of one for another's (vLLM refuses its own run-time loading there for this reason);
    and each counts its own requests only. Engines of a data-parallel group answer for the first of them only.
    """
    if config.coordinator is None:
        return
    engines, servers = args.data_parallel_size or 1, getattr(args, "_api_process_count", 1)
    if engines > 1:
        raise ConfigError(
            f"loraserve-config: coordinator is given with --data-parallel-size {engines}; an instance of a cluster is "
            f"one engine: start {engines} servers without it, the router spreads requests over them"
        )
    if servers > 1:
        raise ConfigError(
            f"loraserve-config: coordinator is given with --api-server-count {servers}; API servers of an engine can't "
            "agree on adapters: use --api-server-count 1"
        )


WORKER_EXTENSION = "vllm_loraserve.engine.worker_extension.WorkerExtension"


def _check_transfer_key(config: LoRAServeConfig) -> None:
    """Refuses a key that no worker could use, before a model is loaded."""
    if config.transfer_key_file is None:
        return
    from vllm_loraserve.transfer.auth import load_key
    from vllm_loraserve.transfer.errors import AuthenticationError

    try:
        load_key(config.transfer_key_file)
    except AuthenticationError as error:
        raise ConfigError(f"loraserve-config: transfer_key_file={config.transfer_key_file!r}: {error}") from None


def _check_member_keys(config: LoRAServeConfig) -> None:
    """Refuses CURVE keys with which no coordinator could be asked, before a model is loaded."""
    if config.coordinator is None:
        return
    from vllm_loraserve.coordinator.curve import KEYS_VARIABLE, KeysError, default_member_keys

    try:
        default_member_keys()
    except KeysError as error:
        raise ConfigError(f"loraserve-config: coordinator={config.coordinator!r}, {KEYS_VARIABLE}: {error}") from None


def _check_operating_points(config: LoRAServeConfig) -> None:
    """Refuses a file that the scheduler could not use, before a model is loaded."""
    if config.operating_points is None:
        return
    from vllm_loraserve.engine.rank_budget import rank_cost

    try:
        rank_cost(None, config.operating_points)
    except ValueError as error:
        raise ConfigError(f"loraserve-config: operating_points={config.operating_points!r}: {error}") from None


def adapt_vllm_config(vllm_config: Any) -> None:
    """Names our scheduler and worker extension in a finished VllmConfig, unless the user named others."""
    from vllm_loraserve.engine import worker_desk

    config, parallel = config_of(vllm_config), vllm_config.parallel_config
    if config is not None and (config.coordinator is not None or config.transfer_key_file is not None):
        if not parallel.worker_extension_cls:
            parallel.worker_extension_cls = WORKER_EXTENSION
        elif worker_desk.addresses(vllm_config) is None:
            logger.warning(
                "Worker extension %s was asked for: residency is less exact, what is loaded is not compared with what "
                "was registered, and no adapters come from peers.",
                parallel.worker_extension_cls,
            )
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is not None:
        logger.warning("Scheduler %s was asked for: no rank-aware batching.", scheduler.scheduler_cls)
        return
    if importlib.util.find_spec("vllm_loraserve.engine.scheduler") is None:
        return
    kind = "RankAwareAsyncScheduler" if scheduler.async_scheduling else "RankAwareScheduler"
    scheduler.scheduler_cls = f"vllm_loraserve.engine.scheduler.{kind}"


def wrap_create_engine_config(original: Callable[..., Any], refusal: Callable[[], str | None]) -> Callable[..., Any]:
    """EngineArgs.create_engine_config that acts on the flag; without it the original runs alone."""

    @functools.wraps(original)
    def create_engine_config(self: Any, usage_context: Any = None, *args: Any, **kwargs: Any) -> Any:
        try:
            config = prepare_engine_args(self)
            if config is not None:
                _require_hooks(refusal, server=_is_server(usage_context))
                if _is_server(usage_context):
                    check_layout(self, config)
        except ConfigError as error:
            if _is_server(usage_context):
                raise SystemExit(f"vllm serve: error: {error}") from None
            raise
        vllm_config = original(self, usage_context, *args, **kwargs)
        if config is not None:
            if not is_given(self.max_loras):
                config = fill_in(vllm_config, config, cpu_loras_given=is_given(self.max_cpu_loras))
            adapt_vllm_config(vllm_config)
            if _is_server(usage_context):
                from vllm_loraserve.engine.api_server import register_resolver

                register_resolver(config)
            logger.info("vllm-loraserve is on: %s", msgspec.json.encode(config).decode())
        return vllm_config

    return create_engine_config


def _require_hooks(refusal: Callable[[], str | None], server: bool) -> None:
    """Raises ConfigError when the plugin can't be used here; completes the hooks of an API-server process."""
    from vllm_loraserve import plugin

    reason = refusal() or plugin.worker_problem() or (plugin.install_server_hooks() if server else None)
    if reason is not None:
        raise ConfigError(reason)


def _is_server(usage_context: Any) -> bool:
    """True where a command line, and not a Python caller, waits for the error."""
    return getattr(usage_context, "name", None) == "OPENAI_API_SERVER"
