"""Tells the workers who holds which adapter, so that they can read it from a peer: `Locator`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from vllm.lora.request import LoRARequest

from vllm_loraserve.coordinator.messages import Location, RoutingTable
from vllm_loraserve.engine.resolver import LoRAServeResolver, locations_of
from vllm_loraserve.engine.worker_desk import Workers

logger = logging.getLogger("vllm.loraserve.agent")

ANSWER_TIMEOUT_S = 2.0


class Locator:
    """For workers that `worker_extension.py` answers for. `name`: this instance's; `models`: vLLM's
    OpenAIServingModels."""

    def __init__(self, workers: Workers, models: Any, resolver: LoRAServeResolver, name: str) -> None:
        self._workers = workers
        self._models = models
        self._resolver = resolver
        self._name = name

    def _row(self, request: LoRARequest, locations: Sequence[Location]) -> tuple[str, str, str, list[tuple[str, str]]]:
        others = [(x.instance, x.endpoint) for x in locations if x.instance != self._name]
        return request.lora_name, request.lora_path, self._resolver.digest_of(request) or "", others

    async def locate(self, request: LoRARequest, locations: Sequence[Location]) -> None:
        """Tells the workers what content an adapter that they are about to load was registered with, and who holds it.

        Best effort: an engine that answers late still hears this before the load, which is queued behind it.
        """
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._workers.ask("loraserve_locate", [self._row(request, locations)])
        except Exception:
            logger.warning("The workers did not answer who holds '%s'", request.lora_name, exc_info=True)

    async def locate_all(self, table: RoutingTable) -> None:
        """Keeps what the workers know about holders fresh, for adapters that were evicted and are asked for again, and
        lets them forget adapters and instances that are gone."""
        rows = []
        for name, request in list(self._models.lora_requests.items()):
            digest = self._resolver.digest_of(request)
            if digest is not None:
                rows.append(self._row(request, locations_of(table, name, digest)))
        adapters, instances = self._resolver.names(), [i.name for i in table.instances]
        with contextlib.suppress(Exception):
            if table.settled:  # else its members of before are still on their way back
                await self._workers.ask("loraserve_retain", adapters, instances)
            if rows:
                await self._workers.ask("loraserve_locate", rows)
