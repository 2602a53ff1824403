"""Adapters that a request names and this instance has not loaded: looked up in the cluster's registry.

vLLM asks `LoRAServeResolver` (its official LoRAResolver extension point) under a lock per name, loads what it gets, and
answers 404 when it gets nothing. While the coordinator is away, the last known registry decides; a name that is not in
it may have been registered since, and is answered with 503.

**One path spelling per content.** vLLM keys its prefix cache by adapter name and path string, not by content: weights
registered anew under the same name and path would reuse the KV blocks of the old ones. The first content served from
(name, path) gets the path as it is; each later one gets another spelling of the same directory (`/dir/.`, `/dir/.//.`),
so its blocks are its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from vllm.exceptions import RetryableRequestError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.messages import (
    AdapterRecord,
    AdapterReply,
    GetAdapter,
    GetTable,
    Location,
    RoutingTable,
)

logger = logging.getLogger("vllm.loraserve.resolver")

ASK_TIMEOUT_S = 2.0
AWAY_S = 3.0
"""After one unanswered question the last known registry is used so long without asking again."""


def respelled(number: int) -> str:
    """What is appended to a directory for its `number`th other spelling, 0: nothing. As long as the number's logarithm:
    a directory may be overwritten every hour."""
    return "".join("/." if bit == "1" else "//." for bit in f"{number:b}") if number else ""


def locations_of(table: RoutingTable, name: str, sha256: str) -> tuple[Location, ...]:
    """Who holds this content and can be read from, by a routing table."""
    return tuple(
        Location(instance=i.name, endpoint=i.transfer, generation=copy.generation)
        for i in table.instances
        if i.transfer
        for copy in i.resident
        if copy.name == name and copy.sha256 == sha256 and copy.generation
    )


class LoRAServeResolver(LoRAResolver):
    """Resolves names by the registry of `config.coordinator`; one per API-server process, in its event loop."""

    def __init__(self, config: LoRAServeConfig) -> None:
        if config.coordinator is None:
            raise ValueError("loraserve-config: the resolver needs a coordinator; set coordinator")
        self._endpoint = config.coordinator
        self._client: CoordinatorClient | None = None
        self._known: dict[str, AdapterRecord] = {}
        self._away_until = 0.0
        self._contents: dict[tuple[str, str], list[str]] = {}
        self._digests: dict[tuple[str, str], str] = {}
        self._locations: dict[str, tuple[Location, ...]] = {}
        self.on_located: Callable[[LoRARequest, tuple[Location, ...]], Awaitable[None]] | None = None
        """Told which adapter vLLM is about to load, and who holds it."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """A request for the registered adapter `lora_name`, or None. vLLM overwrites its id with one of its own.

        Raises RetryableRequestError, which vLLM answers with 503, while it can't be known whether there is one.
        """
        record = await self.lookup(lora_name)
        if record is None:
            return None
        request = self.request_for(record, 1)
        if self.on_located is not None:
            await self.on_located(request, self._locations.get(lora_name, ()))
        return request

    async def lookup(self, name: str) -> AdapterRecord | None:
        """The active record of `name`; with no coordinator the last known one. RetryableRequestError."""
        if time.monotonic() < self._away_until:
            return self._last_known(name)
        try:
            reply = await self._ask(name)
        except CoordinatorError as error:
            if error.code != "not_found":
                logger.warning("The coordinator could not look up '%s': %s", name, error)
                return self._known.get(name)
            self._known.pop(name, None)
            return None
        except CoordinatorUnavailable as error:
            self._away_until = time.monotonic() + AWAY_S
            logger.warning("%s Adapters of the last known registry are served.", error)
            return self._last_known(name)
        self._known[name], self._locations[name] = reply.adapter, reply.locations
        return reply.adapter

    def _last_known(self, name: str) -> AdapterRecord | None:
        record = self._known.get(name)
        alone = all(isinstance(other, LoRAServeResolver) for other in LoRAResolverRegistry.resolvers.values())
        if record is None and alone:  # else the next one may know it
            raise RetryableRequestError(f"The registry can't be asked for the model `{name}` now; try again shortly.")
        return record

    async def _ask(self, name: str) -> AdapterReply:
        return await self._connection().ask(GetAdapter(name=name), AdapterReply, timeout_s=ASK_TIMEOUT_S)

    def _connection(self) -> CoordinatorClient:
        if self._client is None:
            self._client = CoordinatorClient(self._endpoint)
        return self._client

    async def refresh(self) -> RoutingTable | None:
        """Learns the whole registry, for when the coordinator is away; best effort: None when it did not answer."""
        try:
            table = await self._connection().ask(GetTable(), RoutingTable, timeout_s=ASK_TIMEOUT_S)
        except (CoordinatorError, CoordinatorUnavailable):
            return None
        self._locations = {
            r.adapter.name: locations_of(table, r.adapter.name, r.adapter.sha256) for r in table.adapters
        }
        self._known = {r.adapter.name: r.adapter for r in table.adapters if r.adapter.state == "active"}
        return table

    def names(self) -> list[str]:
        """All adapters known now."""
        return list(self._known)

    def known(self, name: str) -> AdapterRecord | None:
        """What was last heard of the name; None: nothing, or that it is no adapter any more."""
        return self._known.get(name)

    def learn(self, record: AdapterRecord) -> None:
        """Notes a record that came another way."""
        self._known[record.name] = record

    def forget(self, name: str) -> None:
        """The adapter is being removed."""
        self._known.pop(name, None)

    def request_for(self, record: AdapterRecord, lora_int_id: int) -> LoRARequest:
        """The LoRARequest of exactly this content (see the module's text on path spellings)."""
        contents = self._contents.setdefault((record.name, record.source), [])
        if record.sha256 not in contents:
            contents.append(record.sha256)
        path = record.source + respelled(contents.index(record.sha256))
        self._digests[record.name, path] = record.sha256
        return LoRARequest(lora_name=record.name, lora_int_id=lora_int_id, lora_path=path)

    def digest_of(self, request: LoRARequest) -> str | None:
        """SHA-256 of the content that a request made here stands for; None for one that was made elsewhere."""
        return self._digests.get((request.lora_name, request.lora_path))

    async def close(self) -> None:
        """Closes the connection; the next lookup opens one again."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()
