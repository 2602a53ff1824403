"""Where a router's routing tables come from: the coordinator, or, without one, the instances themselves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sys
import time
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
SILENT_S = 3.0
"""A coordinator publishes every second; not heard for so long, it is away, or cannot be reached."""
MISSES = 3
"""An instance that is only slow to say what it serves stays in use until it was so often in a row."""


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
        self._sweeper = asyncio.create_task(self._sweep(), name="router-sweep")

    async def stop(self) -> None:
        """Unsubscribes."""
        await self._subscriber.stop()
        await _cancel(self._sweeper)

    def _take(self, table: RoutingTable) -> None:
        self._directory.apply(table)

    async def _sweep(self) -> None:
        started, silent = time.monotonic(), False
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            self._directory.sweep()
            silence = min(self.silence_s, time.monotonic() - started)
            if not silent and silence >= SILENT_S:
                what = (
                    "the last routing table stays in force" if self._directory.table else "is it there, with our keys?"
                )
                logger.warning("The coordinator at %s is silent; %s", self._subscriber.endpoint, what)
            elif silent and silence < SILENT_S:
                logger.info("The coordinator at %s is heard again", self._subscriber.endpoint)
            silent = silence >= SILENT_S


class _Card(msgspec.Struct):
    id: str
    parent: str | None = None
    root: str | None = None
    rank: int | None = None
    max_model_len: int | None = None


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
        self._urls = list(dict.fromkeys(url.rstrip("/") for url in urls))
        self._session = session
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._warned: dict[str, str] = {}
        self._last: dict[str, list[_Card]] = {}
        self._missed: dict[str, int] = {}
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
        # What clients know the model by does not change because one instance is away.
        served = [name for answer in answers if answer is not None and (name := _base_of(answer))]
        base = self._directory.base_model or next(iter(served), "")
        for url, answer in zip(self._urls, answers, strict=True):
            if answer is None:
                continue
            if (own := _base_of(answer)) != base:
                self._warn(url, f"it serves '{own}', and the first one '{base}'")
                continue
            self._warned.pop(url, None)
            name = re.sub(r"[^A-Za-z0-9_.\-]+", "-", url.partition("://")[2]).strip("-")
            length = next((card.max_model_len for card in answer if card.id == base), None)
            capacity = Capacity(slots=0, rank_rows=0, max_rank=sys.maxsize, max_model_len=length or 0)
            instances.append(InstanceEntry(name=name, incarnation="", url=url, load=Load(), capacity=capacity))
            for card in answer:
                if card.parent is not None:
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
                    self._last.pop(url, None)
                    self._warn(url, f"it answers {answer.status} to /v1/models")
                    return None
            self._missed[url], self._last[url] = 0, msgspec.json.decode(body, type=_Cards).data
            return self._last[url]
        except TimeoutError:
            self._missed[url] = self._missed.get(url, 0) + 1
            if url in self._last and self._missed[url] < MISSES:
                return self._last[url]
            self._warn(url, "it does not say within 2 s what it serves")
            return None
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self._last.pop(url, None)
            self._warn(url, "its /v1/models is not that of an OpenAI server")
            return None
        except (ClientError, OSError) as error:
            self._last.pop(url, None)  # it is not slow but away: what it served before counts no more
            logger.debug("Instance %s does not answer: %s", url, error)
            return None

    def _warn(self, url: str, why: str) -> None:
        """Once for each reason, not at every look."""
        if self._warned.get(url) != why:
            self._warned[url] = why
            logger.warning("Instance %s gets no requests: %s", url, why)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self.refresh()


def _base_of(cards: Sequence[_Card]) -> str:
    return next((card.id for card in cards if card.parent is None), "")


Source = CoordinatorSource | StaticSource


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
