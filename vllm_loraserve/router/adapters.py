"""Adapters as clients manage them: /v1/models, and cluster-wide load and unload through the coordinator.

Bodies and success texts are vLLM's. Content is identity: loading the same content again succeeds, other content under
a registered name is a 409, unless `load_inplace` says that it takes the name over.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, TypeVar

import msgspec

from vllm_loraserve.coordinator.client import CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.messages import AddAdapter, GetTable, Message, RemoveAdapter, RoutingTable
from vllm_loraserve.router.directory import Directory
from vllm_loraserve.router.errors import ApiError, invalid, unavailable, unknown_model

STATUS: dict[str, tuple[int, str]] = {
    "conflict": (409, "ConflictError"),
    "forbidden": (403, "PermissionDeniedError"),
    "invalid": (400, "BadRequestError"),
    "not_found": (404, "NotFoundError"),
}
REFRESH_EVERY_S = 0.25
"""Unknown names make the router ask for a newer table at most this often."""
BodyT = TypeVar("BodyT", bound=msgspec.Struct)


class Registry(Protocol):
    """What is used of CoordinatorClient."""

    async def request(self, message: Message, *, timeout_s: float | None = None) -> Message: ...


class LoadBody(msgspec.Struct):
    """Body of /v1/load_lora_adapter. `load_inplace` lets other content take the name over, as in vLLM;
    `is_3d_lora_weight` is accepted and changes nothing: a checkpoint tells whether its experts are stacked."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadBody(msgspec.Struct):
    """Body of /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None


class Adapters:
    """The client's view of the registry. Without a registry (static mode) adapters are listed but can't be changed."""

    def __init__(self, directory: Directory, registry: Registry | None, *, drain_s: float = 30.0) -> None:
        self._directory = directory
        self._registry = registry
        self._drain_s = drain_s
        self._refreshed = -REFRESH_EVERY_S
        self._refreshing: asyncio.Task[bool] | None = None
        self.unreachable = False
        """The coordinator did not answer the last question for a table: there may be adapters that are not in ours."""

    async def load(self, body: bytes) -> str:
        """Registers an adapter for all instances; returns vLLM's success text. Raises ApiError."""
        ask = _decode(body, LoadBody)
        if not ask.lora_name or not ask.lora_path:
            raise ApiError(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if ask.lora_name == self._directory.base_model:
            raise ApiError(
                400, "InvalidUserInput", f"The lora adapter '{ask.lora_name}' conflicts with a served base model."
            )
        try:
            fields = {"name": ask.lora_name, "source": ask.lora_path, "replace": ask.load_inplace}
            message = msgspec.convert(fields, AddAdapter)
        except msgspec.ValidationError:
            raise invalid(
                f"The adapter name {ask.lora_name!r} can't be used; take letters, digits, '_', '-', '.' "
                "and at most one '/', up to 160 characters.",
                "lora_name",
            ) from None
        await self._change(message)
        await self._refresh()
        return f"Success: LoRA adapter '{ask.lora_name}' added successfully."

    async def unload(self, body: bytes) -> str:
        """Unregisters an adapter everywhere, after its running requests; returns vLLM's success text."""
        ask = _decode(body, UnloadBody)
        if not ask.lora_name:
            raise ApiError(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
        missing = ApiError(404, "NotFoundError", f"The lora adapter '{ask.lora_name}' cannot be found.")
        try:
            message = msgspec.convert({"name": ask.lora_name, "drain_s": self._drain_s}, RemoveAdapter)
        except msgspec.ValidationError:
            raise missing from None
        try:
            await self._change(message)
        except ApiError as error:
            raise (missing if error.status == 404 else error) from None
        await self._refresh()
        return f"Success: LoRA adapter '{ask.lora_name}' removed successfully."

    async def _change(self, message: AddAdapter | RemoveAdapter) -> None:
        """Asks for a change until it is done: a coordinator that is restarted meanwhile has forgotten who waits for it.

        Asking twice is safe: a drain goes on, and the same content is the same adapter.
        """
        restarted = False
        while True:
            epoch = self._directory.epoch
            asked = asyncio.create_task(self._ask(message))
            try:
                while not asked.done() and self._directory.epoch == epoch:
                    await asyncio.wait([asked], timeout=REFRESH_EVERY_S)
                if asked.done():
                    await asked
                    return
            except ApiError as error:
                if error.status == 404 and restarted and isinstance(message, RemoveAdapter):
                    return  # it was done before we could ask again
                raise
            finally:
                asked.cancel()
            restarted = True

    async def discover(self) -> bool:
        """Fetches the table because a request names a model that is not in it; True if one came.

        Another router or tool may have registered the adapter a moment ago. All requests share one fetch, and at most
        one is made every `REFRESH_EVERY_S`, so that made-up names cost the coordinator nothing.
        """
        if self._registry is None:
            return False
        if self._refreshing is None or self._refreshing.done():
            now = self._directory.clock()
            if now - self._refreshed < REFRESH_EVERY_S:
                return False
            self._refreshed = now
            self._refreshing = asyncio.create_task(self._refresh())
        return await asyncio.shield(self._refreshing)

    def cards(self) -> list[dict[str, Any]]:
        """Model cards of the base model and of every active adapter, as /v1/models lists them."""
        base = self._directory.base_model
        cards: list[dict[str, Any]] = []
        if base:
            lengths = [u.entry.capacity.max_model_len for u in self._directory.live()]
            length = min(filter(None, lengths), default=None)  # what every instance takes
            cards.append(_card(base, 0, root=base, parent=None, rank=None) | {"max_model_len": length})
        for routes in self._directory.adapters.values():
            adapter = routes.adapter
            if adapter.state == "active":
                rank = adapter.rank or None
                cards.append(_card(adapter.name, int(adapter.added_at), root=adapter.source, parent=base, rank=rank))
        return cards

    def card(self, name: str) -> dict[str, Any]:
        """One model's card. Raises ApiError 404."""
        for card in self.cards():
            if card["id"] == name:
                return card
        raise unknown_model(name, self._directory.base_model)

    async def _refresh(self) -> bool:
        """Takes the coordinator's present table, so that what was done is seen by the next request; best effort."""
        try:
            reply = await self._ask(GetTable(), 1.0)
        except ApiError as error:
            self.unreachable = error.status == 503
            return False
        self.unreachable = False
        return isinstance(reply, RoutingTable) and self._directory.apply(reply)

    async def _ask(self, message: Message, timeout_s: float | None = None) -> Message:
        """None: as long as the message may take by its nature, which the client knows."""
        if self._registry is None:
            raise ApiError(
                501, "NotImplementedError", "This router runs without a coordinator; load adapters on the instances."
            )
        try:
            return await self._registry.request(message, timeout_s=timeout_s)
        except CoordinatorError as error:
            status, kind = STATUS.get(error.code, (500, "InternalServerError"))
            raise ApiError(status, kind, str(error)) from None
        except CoordinatorUnavailable:
            raise unavailable("The coordinator does not answer; requests go on, try this again shortly.", 2.0) from None


def _card(name: str, created: int, *, root: str, parent: str | None, rank: int | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "rank": rank,
    }


def _decode(body: bytes, kind: type[BodyT]) -> BodyT:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise ApiError(400, "BadRequestError", f"The request body does not fit: {error}.") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(f"The request body is not JSON: {error}.") from None
