"""Where a router's routing tables come from: the coordinator, or, without one, the instances themselves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import msgspec
from aiohttp import ClientError, ClientSession, ClientTimeout

from vllm_loraserve.coordinator.client import TableSubscriber
from vllm_loraserve.coordinator.messages import (
    AdapterRecord,
    AdapterRoutes,
    Capacity,
    InstanceEntry,
    Load,
    Route,
    RoutingTable,
)
from vllm_loraserve.router.directory import Directory

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 1.0


class CoordinatorSource:
    """Follows the table that a coordinator publishes, and keeps the directory swept while it is away."""

    def __init__(self, directory: Directory, endpoint: str) -> None:
        self._directory = directory
        self._subscriber = TableSubscriber(endpoint, self._take)
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def silence_s(self) -> float:
        """Seconds since the coordinator was heard; infinite if never."""
        return self._subscriber.silence_s

    async def start(self) -> None:
        """Subscribes."""
        self._subscriber.start()
        self._sweeper = asyncio.create_task(_sweep(self._directory), name="router-sweep")

    async def stop(self) -> None:
        """Unsubscribes."""
        await self._subscriber.stop()
        await _cancel(self._sweeper)

    def _take(self, table: RoutingTable) -> None:
        self._directory.apply(table)


class _Card(msgspec.Struct):
    id: str
    parent: str | None = None
    root: str | None = None
    rank: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card] = []


class StaticSource:
    """A fixed list of instances and no coordinator: asks each for /v1/models every `every_s` seconds.

    An instance is in the table while it answers. Adapters go to the instances that list them, in equal parts. `key`:
    what instances want to be asked with, if anything.
    """

    def __init__(
        self, directory: Directory, urls: Sequence[str], session: ClientSession, every_s: float = 2.0, key: str = ""
    ) -> None:
        self._directory = directory
        self._urls = [url.rstrip("/") for url in urls]
        self._session = session
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._refusing: set[str] = set()
        self._every_s = every_s
        self._version = 0
        self._task: asyncio.Task[None] | None = None

    silence_s = 0.0

    async def start(self) -> None:
        """Asks once, then keeps asking."""
        await self.refresh()
        self._task = asyncio.create_task(self._follow(), name="router-static")

    async def stop(self) -> None:
        """Stops asking."""
        await _cancel(self._task)

    async def refresh(self) -> None:
        """Asks all instances now and applies the table that follows."""
        answers = await asyncio.gather(*(self._models(url) for url in self._urls))
        instances: list[InstanceEntry] = []
        holders: dict[str, list[str]] = {}
        cards: dict[str, _Card] = {}
        base = ""
        for url, answer in zip(self._urls, answers, strict=True):
            if answer is None:
                continue
            name = url.partition("://")[2].replace(":", "-").replace("/", "-")
            capacity = Capacity(slots=0, rank_rows=0)
            instances.append(InstanceEntry(name=name, incarnation="", url=url, load=Load(), capacity=capacity))
            for card in answer:
                if card.parent is None:
                    base = base or card.id
                else:
                    cards[card.id] = card
                    holders.setdefault(card.id, []).append(name)
        adapters = tuple(
            AdapterRoutes(
                adapter=AdapterRecord(
                    name=name,
                    source=card.root or "",
                    rank=card.rank or 0,
                    target_modules=(),
                    size_bytes=0,
                    sha256="",
                    base_model=card.parent or "",
                    added_at=0.0,
                ),
                routes=tuple(Route(instance=holder, phi=1 / len(holders[name])) for holder in holders[name]),
            )
            for name, card in cards.items()
        )
        self._version += 1
        self._directory.apply(
            RoutingTable(epoch=0, version=self._version, base_model=base, instances=tuple(instances), adapters=adapters)
        )

    async def _models(self, url: str) -> list[_Card] | None:
        try:
            timeout = ClientTimeout(total=2.0)
            async with self._session.get(url + "/v1/models", timeout=timeout, headers=self._headers) as answer:
                body = await answer.read()
                if answer.status != 200:
                    if url not in self._refusing:
                        logger.warning("Instance %s gets no requests: %d to /v1/models", url, answer.status)
                    self._refusing.add(url)
                    return None
                self._refusing.discard(url)
                return msgspec.json.decode(body, type=_Cards).data
        except (ClientError, OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            logger.debug("Instance %s does not answer: %s", url, error)
            return None

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self.refresh()


Source = CoordinatorSource | StaticSource


async def _sweep(directory: Directory) -> None:
    while True:
        await asyncio.sleep(SWEEP_EVERY_S)
        directory.sweep()


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
