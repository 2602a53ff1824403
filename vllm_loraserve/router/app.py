"""The router's HTTP application: its paths, and what every request goes through before and after its handler."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
from aiohttp import ClientSession, DummyCookieJar, TCPConnector, web

from vllm_loraserve.cluster.operating_points import StepCost
from vllm_loraserve.coordinator.client import CoordinatorClient
from vllm_loraserve.router.adapters import Adapters, Registry
from vllm_loraserve.router.auth import Keys
from vllm_loraserve.router.directory import Directory
from vllm_loraserve.router.errors import ApiError
from vllm_loraserve.router.metrics import RouterMetrics
from vllm_loraserve.router.paths import FORWARDED_PATHS, why_not_forwarded
from vllm_loraserve.router.prediction import Predictor
from vllm_loraserve.router.proxy import Call, ClientLeft, Proxy
from vllm_loraserve.router.queue import Admission
from vllm_loraserve.router.sources import SILENT_S, CoordinatorSource, Source, StaticSource

logger = logging.getLogger(__name__)

KEEPALIVE_S = 3.0
"""Idle connections to instances are closed before uvicorn does it (5 s), so that none is lost in between."""

_REQUEST_ID = re.compile(r"[!-~]{1,128}")

Handler = Callable[[web.Request, Call], Awaitable[web.StreamResponse]]


@dataclass(kw_only=True)
class RouterConfig:
    """Options of a router; `vllm-loraserve router --help` explains them."""

    coordinator: str | None = None
    instances: tuple[str, ...] = ()
    keys: Keys = field(default_factory=Keys)
    admin_keys: Keys = field(default_factory=Keys)
    upstream_key: str = field(default="", repr=False)
    max_concurrency: int = 256
    max_queue: int = 1024
    queue_timeout_s: float = 60.0
    max_attempts: int = 3
    max_body_bytes: int = 32 << 20
    idle_timeout_s: float = 600.0
    client_timeout_s: float = 60.0
    connect_timeout_s: float = 2.0
    unload_drain_s: float = 30.0
    step_cost: StepCost | None = None
    """By which finish times are predicted, instead of what the coordinator's table says."""


class Router:
    """All parts of one router, put together; `app` is what an aiohttp runner serves.

    `registry` and `source` are for tests; they follow from the configuration.
    """

    def __init__(self, config: RouterConfig, *, registry: Registry | None = None) -> None:
        self.config = config
        self.directory = Directory()
        self.admission = Admission(
            self.directory,
            max_concurrency=config.max_concurrency,
            max_queue=config.max_queue,
            queue_timeout_s=config.queue_timeout_s,
            predictor=Predictor(config.step_cost),
        )
        self.directory.on_change = self._changed
        self.metrics = RouterMetrics(self.directory, self.admission)
        self._client: CoordinatorClient | None = None
        if registry is None and config.coordinator is not None:
            registry = self._client = CoordinatorClient(config.coordinator)
        self.adapters = Adapters(self.directory, registry, drain_s=config.unload_drain_s)
        self.source: Source | None = None
        self._proxy: Proxy | None = None
        self._session: ClientSession | None = None
        self.app = self._application()

    def _changed(self) -> None:
        """A table came into force."""
        if self.directory.table is not None:
            self.admission.predictor.follow(self.directory.table)
        self.admission.grant()

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=self.config.max_body_bytes)
        app.cleanup_ctx.append(self._lifetime)
        open_to_all, keys = Keys(), self.config.keys
        admin = self.config.admin_keys or keys
        add = app.router.add_route
        for path in FORWARDED_PATHS:
            add("POST", path, self._guarded(path, keys, self._forward))
        add("GET", "/v1/models", self._guarded("/v1/models", keys, self._models))
        add("GET", "/v1/models/{model:.+}", self._guarded("/v1/models/{model}", keys, self._model))
        add("POST", "/v1/load_lora_adapter", self._guarded("/v1/load_lora_adapter", admin, self._load))
        add("POST", "/v1/unload_lora_adapter", self._guarded("/v1/unload_lora_adapter", admin, self._unload))
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            add(method, path, self._guarded(path, open_to_all, self._health))
        add("GET", "/metrics", self._guarded("/metrics", open_to_all, self._metrics))
        add("*", "/{path:.*}", self._guarded("other", keys, self._no_such_path))
        return app

    async def _lifetime(self, app: web.Application):  # type: ignore[no-untyped-def]  # an async generator for aiohttp
        """Opens what needs the event loop, and closes it again."""
        config = self.config
        # Places on instances bound the connections; the pool itself must not make requests wait unseen.
        connector = TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=30)
        self._session = ClientSession(
            connector=connector,
            cookie_jar=DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
            read_bufsize=1 << 18,
        )
        self._proxy = Proxy(
            self.directory,
            self.admission,
            self.adapters,
            self.metrics,
            self._session,
            max_attempts=config.max_attempts,
            upstream_key=config.upstream_key,
            forward_authorization=not config.keys,
            idle_timeout_s=config.idle_timeout_s,
            client_timeout_s=config.client_timeout_s,
            connect_timeout_s=config.connect_timeout_s,
        )
        if config.coordinator is not None:
            self.source = CoordinatorSource(self.directory, config.coordinator)
        elif config.instances:
            self.source = StaticSource(self.directory, config.instances, self._session, key=config.upstream_key)
        if self.source is not None:
            await self.source.start()
        yield
        if self.source is not None:
            await self.source.stop()
        if self._client is not None:
            await self._client.close()
        await self._session.close()

    def _guarded(
        self, endpoint: str, keys: Keys, handler: Handler
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """`handler` with a request id, the key check, OpenAI's error bodies and the request counter around it."""

        async def run(request: web.Request) -> web.StreamResponse:
            given = request.headers.get("X-Request-Id")
            request_id = given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
            call = Call(endpoint, request_id, time.monotonic())
            status = 499
            try:
                keys.require(request.headers.get("Authorization"), request.headers.get("X-Api-Key"))
                response = await handler(request, call)
                status = response.status
            except ApiError as error:
                response = _error_response(error, endpoint)
                status = error.status
            except web.HTTPRequestEntityTooLarge:
                limit = self.config.max_body_bytes
                response = _error_response(
                    ApiError(413, "BadRequestError", f"The request body is larger than {limit} bytes."), endpoint
                )
                status = 413
            except web.RequestPayloadError as error:
                response = _error_response(
                    ApiError(400, "BadRequestError", f"The request body is broken: {error}."), endpoint
                )
                status = 400
            except (ClientLeft, ConnectionError):
                raise asyncio.CancelledError("client left") from None  # aiohttp then closes without a word
            except Exception:
                logger.exception("Request %s to %s failed", request_id, endpoint)
                response = _error_response(
                    ApiError(500, "InternalServerError", "The router failed; see its log."), endpoint
                )
                status = 500
            finally:
                self.metrics.answered(endpoint, call.rank, status)
            if not response.prepared:
                response.headers["X-Request-Id"] = request_id
            return response

        return run

    async def _forward(self, request: web.Request, call: Call) -> web.StreamResponse:
        assert self._proxy is not None
        return await self._proxy.forward(request, call)

    async def _models(self, request: web.Request, call: Call) -> web.StreamResponse:
        return _json({"object": "list", "data": self.adapters.cards()})

    async def _model(self, request: web.Request, call: Call) -> web.StreamResponse:
        return _json(self.adapters.card(request.match_info["model"]))

    async def _load(self, request: web.Request, call: Call) -> web.StreamResponse:
        return web.Response(text=await self.adapters.load(await request.read()))

    async def _unload(self, request: web.Request, call: Call) -> web.StreamResponse:
        return web.Response(text=await self.adapters.unload(await request.read()))

    async def _health(self, request: web.Request, call: Call) -> web.StreamResponse:
        """200 when a request could be served: an instance is in the table and its breaker is not open."""
        now = self.directory.clock()
        instances = self.directory.live()
        available = sum(upstream.available(now) for upstream in instances)
        if self.config.coordinator is None:
            coordinator = "none"
        else:
            coordinator = "ok" if self.source is not None and self.source.silence_s < SILENT_S else "silent"
        return _json(
            {
                "status": "ok" if available else "no instance",
                "instances": len(instances),
                "available": available,
                "adapters": len(self.directory.adapters),
                "coordinator": coordinator,
            },
            200 if available else 503,
        )

    async def _metrics(self, request: web.Request, call: Call) -> web.StreamResponse:
        return web.Response(
            body=self.metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _no_such_path(self, request: web.Request, call: Call) -> web.StreamResponse:
        path = request.path
        known = {resource.canonical for resource in request.app.router.resources()}
        if path in known:
            raise ApiError(405, "BadRequestError", f"{request.method} is not a method of {path}.")
        why = why_not_forwarded(path)
        if why is not None:
            raise ApiError(404, "NotFoundError", f"The router does not forward {path}: {why}.")
        raise ApiError(404, "NotFoundError", f"The router has no path {path}.")


def _json(content: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json")


def _error_response(error: ApiError, endpoint: str) -> web.Response:
    return web.Response(
        body=error.body(endpoint), status=error.status, content_type="application/json", headers=error.headers or None
    )
