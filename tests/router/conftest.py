"""A router in the test's event loop, before stub instances whose table the test writes itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
from aiohttp import ClientSession, ClientTimeout, web

from vllm_loraserve.coordinator.messages import (
    AdapterRecord,
    AdapterRoutes,
    Capacity,
    InstanceEntry,
    Load,
    Route,
    RoutingTable,
)
from vllm_loraserve.router.adapters import Registry
from vllm_loraserve.router.app import Router, RouterConfig

from .stub import Stub

PATIENCE_S = 120.0
"""For what is certain to come, on any machine: only a defect uses it up."""


def record(name: str, rank: int = 8, **changes: object) -> AdapterRecord:
    fields: dict[str, object] = {
        "name": name,
        "source": f"/adapters/{name}",
        "rank": rank,
        "target_modules": ("q_proj",),
        "size_bytes": 1,
        "sha256": "0" * 64,
        "base_model": "base",
        "added_at": 1000.0,
    }
    return AdapterRecord(**(fields | changes))  # type: ignore[arg-type]


def entry(name: str, url: str, incarnation: str = "1", load: Load | None = None) -> InstanceEntry:
    capacity = Capacity(slots=8, rank_rows=512)
    return InstanceEntry(name=name, incarnation=incarnation, url=url, load=load or Load(), capacity=capacity)


def table(
    instances: Sequence[InstanceEntry],
    adapters: Sequence[AdapterRoutes] = (),
    version: int = 1,
    epoch: int = 1,
    base_model: str = "base",
) -> RoutingTable:
    return RoutingTable(
        epoch=epoch, version=version, base_model=base_model, instances=tuple(instances), adapters=tuple(adapters)
    )


def routes(name: str, rank: int = 8, state: str = "active", reason: str = "", **phi: float) -> AdapterRoutes:
    return AdapterRoutes(
        adapter=record(name, rank, state=state, reason=reason),
        routes=tuple(Route(instance=instance, phi=fraction) for instance, fraction in phi.items()),
    )


class Served:
    """A running router with its stubs and a client whose paths are relative to it."""

    def __init__(self, router: Router, stubs: list[Stub], client: ClientSession) -> None:
        self.router = router
        self.stubs = stubs
        self.client = client
        self.version = 1

    def publish(self, adapters: Sequence[AdapterRoutes] = (), stubs: Sequence[Stub] | None = None) -> None:
        """Puts a new table in force."""
        self.version += 1
        listed = self.stubs if stubs is None else stubs
        self.router.directory.apply(table([entry(s.name, s.url) for s in listed], adapters, self.version))

    def idle(self) -> bool:
        """Whether every counter is back at zero."""
        upstreams = self.router.directory.live()
        return self.router.admission.waiting == 0 and all(u.in_flight == 0 and not u.attempts for u in upstreams)


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(2, max_queue=0, ...)`: a router before that many stubs named a, b, c ..."""
    closers: list[Callable[[], Awaitable[object]]] = []

    async def start(
        stubs: int = 1, *, registry: Registry | None = None, config: RouterConfig | None = None, **options: object
    ) -> Served:
        router = Router(config or RouterConfig(**options), registry=registry)  # type: ignore[arg-type]
        runner = web.AppRunner(router.app, handler_cancellation=True, shutdown_timeout=0.0, access_log=None)
        await runner.setup()
        closers.append(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        started = [await Stub("abcdefgh"[i]).start() for i in range(stubs)]
        closers.extend(stub.stop for stub in started)
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        client = ClientSession(base, timeout=ClientTimeout(total=PATIENCE_S))
        closers.append(client.close)
        served = Served(router, started, client)
        if started:
            served.publish()
        return served

    yield start
    for close in reversed(closers):
        await close()


async def settled(served: Served) -> None:
    """Waits until all counters are zero; fails when they do not get there."""
    async with asyncio.timeout(PATIENCE_S):
        while not served.idle():
            await asyncio.sleep(0.005)


async def unread(served: Served) -> None:
    """Waits until all buffers are full: the router has waited for the client at 50 looks in a row."""
    looks = 0
    async with asyncio.timeout(PATIENCE_S):
        while looks < 50:
            await asyncio.sleep(0.005)
            attempts = [attempt for upstream in served.router.directory.live() for attempt in upstream.attempts]
            looks = looks + 1 if attempts and all(a.last_byte == math.inf for a in attempts) else 0


async def events(answer: object) -> list[bytes]:
    return [line async for line in answer.content if line.strip()]  # type: ignore[attr-defined]
