"""The API-server process: joins the cluster once the server listens, says so when it is to stop, leaves when it has
stopped, resolves unknown adapters.

Nothing here acts unless `coordinator` is configured; with it there is one API-server process
(`engine_config.check_layout`). Without, the first of several shows the scheduler's metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from typing import Any

from vllm.exceptions import RetryableRequestError, VLLMNotFoundError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry

from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine.engine_config import config_of
from vllm_loraserve.engine.stopping import told_first

logger = init_logger("vllm.loraserve.api_server")

RESOLVER_NAME = "loraserve"
STOP_TIMEOUT_S = 5.0


def register_resolver(config: LoRAServeConfig) -> None:
    """Registers the cluster's resolver with vLLM, once per process, when a coordinator is configured."""
    if config.coordinator is None or RESOLVER_NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    resolver = importlib.import_module("vllm_loraserve.engine.resolver").LoRAServeResolver(config)
    LoRAResolverRegistry.register_resolver(RESOLVER_NAME, resolver)


def advertised_url(sock: socket.socket | None, config: LoRAServeConfig, tls: bool) -> str:
    """The base URL under which others reach this server; raises ValueError when a Unix socket has none."""
    if config.advertise_url is not None:
        return config.advertise_url.rstrip("/")
    if sock is None or sock.family == socket.AF_UNIX:
        raise ValueError("loraserve-config: advertise_url is needed when the server listens on a Unix socket")
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        from vllm.utils.network_utils import get_ip

        host = get_ip()
    if ":" in host:
        host = f"[{host}]"
    return f"{'https' if tls else 'http'}://{host}:{port}"


def wrap_serve_http(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The function that runs uvicorn, with the agent's life inside the server's."""

    @functools.wraps(original)
    async def serve_http(app: Any, sock: socket.socket | None, *args: Any, **kwargs: Any) -> Any:
        engine_client = app.state.engine_client
        vllm_config = getattr(engine_client, "vllm_config", None)
        config = config_of(vllm_config)
        if vllm_config is None or config is None or vllm_config.parallel_config._api_process_rank > 0:
            return await original(app, sock, *args, **kwargs)
        with _metrics(vllm_config):
            if config.coordinator is None:
                return await original(app, sock, *args, **kwargs)
            url = advertised_url(sock, config, tls=bool(kwargs.get("ssl_keyfile")))
            starting = asyncio.get_running_loop().create_task(_start_agent_when_listening(app, config, url))
            try:
                with told_first(engine_client, lambda: _drain_agent(starting)):
                    return await original(app, sock, *args, **kwargs)
            finally:
                await _stop_agent(starting)

    return serve_http


@contextlib.contextmanager
def _metrics(vllm_config: Any) -> Iterator[None]:
    """Shows the scheduler's totals on /metrics while the server runs."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    from vllm_loraserve.engine import channel
    from vllm_loraserve.engine.metrics import Collector

    address = channel.address_of(vllm_config, "stats")
    if address is None:
        yield
        return
    collector, registry = Collector(), get_prometheus_registry()
    registry.register(collector)
    listening = asyncio.get_running_loop().create_task(collector.listen(address))
    try:
        yield
    finally:
        listening.cancel()
        registry.unregister(collector)


async def _start_agent_when_listening(app: Any, config: LoRAServeConfig, url: str) -> Any:
    start_agent = importlib.import_module("vllm_loraserve.engine.agent").start_agent
    while not getattr(getattr(app.state, "server", None), "started", False):
        await asyncio.sleep(0.02)
    engine_client = app.state.engine_client
    try:
        agent = await start_agent(
            engine_client, engine_client.vllm_config, config, url, app.state.openai_serving_models
        )
    except Exception:
        logger.exception("This instance could not join the cluster at %s; it serves alone.", config.coordinator)
        return None
    logger.info("Joining the cluster at %s as %s.", config.coordinator, url)
    return agent


async def _drain_agent(starting: asyncio.Task[Any]) -> None:
    agent = starting.result() if starting.done() and not starting.cancelled() else None
    if agent is not None:
        await agent.drain()


async def _stop_agent(starting: asyncio.Task[Any]) -> None:
    if not starting.done():
        starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        agent = await starting
        if agent is not None:
            try:
                await asyncio.wait_for(agent.stop(), STOP_TIMEOUT_S)
            except Exception:
                logger.exception("This instance did not leave the cluster in good order.")


def wrap_check_model(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """BaseServing._check_model that asks resolvers also where runtime updating by HTTP is not allowed.

    vLLM asks its resolvers only when VLLM_ALLOW_RUNTIME_LORA_UPDATING is set, which opens the load and unload endpoints
    to everybody; a cluster's registry needs the first and not the second.
    """

    @functools.wraps(original)
    async def check_model(self: Any, request: Any) -> Any:
        result = await _resolve(self, request.model)
        if isinstance(result, LoRARequest):
            return None
        if result is not None and result.error.code == HTTPStatus.BAD_REQUEST.value:
            return result
        return await original(self, request)

    return check_model


def wrap_check_pooling_model(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The same for PoolingBaseServing, which has a method of its own that raises what the other returns."""

    @functools.wraps(original)
    async def check_model(self: Any, request: Any) -> Any:
        result = await _resolve(self, request.model)
        if isinstance(result, LoRARequest):
            return None
        if result is not None and result.error.code == HTTPStatus.BAD_REQUEST.value:
            raise ValueError(result.error.message)
        return await original(self, request)

    return check_model


def wrap_get_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    """BaseServing._maybe_get_adapters that calls an adapter of the cluster unavailable, not unknown.

    What `_check_model` found may have been let go while the request was read, since it could not be loaded.
    """

    @functools.wraps(original)
    def get_adapters(self: Any, request: Any, supports_default_mm_loras: bool = False) -> Any:
        try:
            return original(self, request, supports_default_mm_loras)
        except VLLMNotFoundError:
            resolver = LoRAResolverRegistry.resolvers.get(RESOLVER_NAME)
            if resolver is None or request.model not in resolver.names():
                raise
            raise RetryableRequestError(
                f"The adapter '{request.model}' cannot be brought in now; try again shortly."
            ) from None

    return get_adapters


async def _resolve(serving: Any, name: str | None) -> Any:
    """vLLM's answer on a name that it does not serve yet, by our resolver; None where there is nothing to ask."""
    if (
        not name
        or RESOLVER_NAME not in LoRAResolverRegistry.get_supported_resolvers()
        or serving._is_model_supported(name)
        or name in serving.models.lora_requests
    ):
        return None
    return await serving.models.resolve_lora(name)
