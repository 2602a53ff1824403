"""Model cards, and adapters loaded and unloaded through a registry that the test plays."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from vllm_loraserve.coordinator.client import CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.messages import (
    AdapterReply,
    AddAdapter,
    Capacity,
    GetTable,
    Message,
    Ok,
    RemoveAdapter,
    RoutingTable,
)

from .conftest import Serve, entry, record, routes, table


class FakeRegistry:
    """Answers with `answer` (raised when it is an exception) and with `table` to GetTable; keeps what it was asked."""

    def __init__(self, answer: Message | Exception | None = None) -> None:
        self.answer = answer if answer is not None else Ok()
        self.table: RoutingTable | Exception = CoordinatorUnavailable("down")
        self.asked: list[Message] = []
        self.silent = False
        """Asked and never answered: it is gone."""

    async def request(self, message: Message, *, timeout_s: float | None = None) -> Message:
        self.asked.append(message)
        # A time of the router's own, shorter than the client's, would end what the coordinator goes on with.
        assert (timeout_s is None) is not isinstance(message, GetTable)
        if self.silent:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        reply = self.table if isinstance(message, GetTable) else self.answer
        if isinstance(reply, Exception):
            raise reply
        return reply


async def test_models_lists_base_and_active_adapters_with_parent_and_rank(serve: Serve) -> None:
    served = await serve(0)
    lengths = [("a", 4096), ("b", 2048), ("c", 0)]  # c is of a release that does not tell it
    capacities = [(name, Capacity(slots=8, rank_rows=512, max_model_len=length)) for name, length in lengths]
    known = [msgspec.structs.replace(entry(name, f"http://{name}"), capacity=own) for name, own in capacities]
    gone = [routes("out", state="draining"), routes("misfit", state="failed", reason="It is for another model.")]
    adapters = [routes("one", rank=16, a=1.0), *gone, routes("org/two", rank=4)]
    served.router.directory.apply(table(known, adapters))
    async with served.client.get("/v1/models") as r:
        cards = {card["id"]: card for card in (await r.json())["data"]}
    assert list(cards) == ["base", "one", "org/two"]
    assert (cards["base"]["parent"], cards["base"]["max_model_len"]) == (None, 2048)
    assert cards["one"] == {
        "id": "one",
        "object": "model",
        "created": 1000,
        "owned_by": "vllm",
        "root": "/adapters/one",
        "parent": "base",
        "rank": 16,
    }
    async with served.client.get("/v1/models/org/two") as r:
        assert (await r.json())["rank"] == 4
    async with served.client.get("/v1/models/out") as r:
        assert r.status == 404


async def test_load_and_unload_speak_vllms_texts_and_are_seen_at_once(serve: Serve) -> None:
    registry = FakeRegistry(AdapterReply(adapter=record("one"), created=True))
    served = await serve(1, registry=registry)
    stub = served.stubs[0]
    registry.table = table([entry("a", stub.url)], [routes("one", a=1.0)], version=10)
    body = {"lora_name": "one", "lora_path": "/adapters/one", "load_inplace": True, "is_3d_lora_weight": True}
    async with served.client.post("/v1/load_lora_adapter", json=body) as r:
        assert (r.status, await r.text()) == (200, "Success: LoRA adapter 'one' added successfully.")
    assert registry.asked[0] == AddAdapter(name="one", source="/adapters/one", replace=True)
    async with served.client.post("/v1/completions", json={"model": "one"}) as r:
        assert r.status == 200
    registry.answer = Ok()
    registry.table = table([entry("a", stub.url)], version=11)
    async with served.client.post("/v1/unload_lora_adapter", json={"lora_name": "one", "lora_int_id": 1}) as r:
        assert (r.status, await r.text()) == (200, "Success: LoRA adapter 'one' removed successfully.")
    assert RemoveAdapter(name="one", drain_s=30.0) in registry.asked
    async with served.client.post("/v1/completions", json={"model": "one"}) as r:
        assert r.status == 404


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("conflict", 409, "ConflictError"),
        ("forbidden", 403, "PermissionDeniedError"),
        ("invalid", 400, "BadRequestError"),
        ("not_found", 404, "NotFoundError"),
        ("internal", 500, "InternalServerError"),
    ],
)
async def test_refusals_keep_their_sentence(serve: Serve, code: str, status: int, kind: str) -> None:
    registry = FakeRegistry(CoordinatorError(code, "One sentence."))  # type: ignore[arg-type]
    served = await serve(1, registry=registry)
    async with served.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/p"}) as r:
        assert r.status == status
        error = (await r.json())["error"]
    assert (error["message"], error["type"], error["code"]) == ("One sentence.", kind, status)


async def test_unloading_what_is_not_there_is_vllms_404(serve: Serve) -> None:
    served = await serve(1, registry=FakeRegistry(CoordinatorError("not_found", "no")))
    for name in ("x", "bad name!"):
        async with served.client.post("/v1/unload_lora_adapter", json={"lora_name": name}) as r:
            assert r.status == 404
            assert (await r.json())["error"]["message"] == f"The lora adapter '{name}' cannot be found."


async def test_loading_is_asked_for_again_when_the_coordinator_is_restarted_meanwhile(serve: Serve) -> None:
    registry = FakeRegistry()
    served = await serve(1, registry=registry)
    registry.silent = True
    load = asyncio.ensure_future(
        served.client.post("/v1/load_lora_adapter", json={"lora_name": "one", "lora_path": "/p"})
    )
    while not registry.asked:
        await asyncio.sleep(0.005)
    registry.silent, registry.answer = False, CoordinatorError("not_found", "There is no such path.")
    served.router.directory.apply(table([entry("a", served.stubs[0].url)], epoch=2))
    async with await load as r:
        assert r.status == 404
        assert (await r.json())["error"]["message"] == "There is no such path."


async def test_unloading_goes_on_when_the_coordinator_is_restarted_meanwhile(serve: Serve) -> None:
    registry = FakeRegistry()
    served = await serve(1, registry=registry)
    served.publish([routes("one", a=1.0)])
    registry.silent = True
    unload = asyncio.ensure_future(served.client.post("/v1/unload_lora_adapter", json={"lora_name": "one"}))
    while not registry.asked:
        await asyncio.sleep(0.005)
    registry.silent, registry.answer = False, CoordinatorError("not_found", "done, before it was asked again")
    served.router.directory.apply(table([entry("a", served.stubs[0].url)], epoch=2))
    async with await unload as r:
        assert (r.status, await r.text()) == (200, "Success: LoRA adapter 'one' removed successfully.")
    assert len([message for message in registry.asked if isinstance(message, RemoveAdapter)]) == 2


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"lora_name": "x"},
        {"lora_name": "", "lora_path": "/p"},
        {"lora_name": "x", "lora_path": ""},
        {"lora_name": 3, "lora_path": "/p"},
        {"lora_name": "../x", "lora_path": "/p"},
        {"lora_name": "a b", "lora_path": "/p"},
        {"lora_name": "base", "lora_path": "/p"},
        {"lora_name": "x" * 200, "lora_path": "/p"},
        {"lora_name": "x\n", "lora_path": "/p"},
        "text",
    ],
)
async def test_bad_load_bodies_are_400_and_never_reach_the_registry(serve: Serve, body: object) -> None:
    registry = FakeRegistry()
    served = await serve(1, registry=registry)
    async with served.client.post("/v1/load_lora_adapter", json=body) as r:
        assert r.status == 400
        assert (await r.json())["error"]["message"]
    assert registry.asked == []


async def test_a_load_body_that_is_no_utf8_is_a_400(serve: Serve) -> None:
    served = await serve(1, registry=FakeRegistry())
    async with served.client.post("/v1/load_lora_adapter", data=b'{"lora_name": "\xff", "lora_path": "/p"}') as r:
        assert r.status == 400
        assert "not JSON" in (await r.json())["error"]["message"]


async def test_silent_coordinator_is_a_503_for_changes_and_nothing_for_requests(serve: Serve) -> None:
    served = await serve(1, registry=FakeRegistry(CoordinatorUnavailable("no answer")))
    async with served.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/p"}) as r:
        assert r.status == 503
        assert r.headers["Retry-After"] == "2"
    async with served.client.post("/v1/completions", json={"model": "base"}) as r:
        assert r.status == 200
    for _ in range(2):  # asked in vain, then not asked at all
        async with served.client.post("/v1/completions", json={"model": "unknown"}) as r:
            assert r.status == 503, "it may have been registered since"
    async with served.client.post("/v1/completions", json={"model": "unknown"}) as r:
        assert r.status == 503, "it may have been registered since"
        assert r.headers["Retry-After"] == "2"
        assert "The coordinator can't be asked now" in (await r.json())["error"]["message"]
    async with served.client.post("/v1/completions", json={"model": "base"}) as r:
        assert r.status == 200


async def test_a_name_not_in_the_table_is_looked_up_once_for_all(serve: Serve) -> None:
    """Another router may have registered it a moment ago; made-up names must not flood the coordinator."""
    registry = FakeRegistry()
    served = await serve(1, registry=registry)
    registry.table = table([entry("a", served.stubs[0].url)], [routes("new", a=1.0)], version=10)

    async def ask(name: str) -> int:
        async with served.client.post("/v1/completions", json={"model": name}) as r:
            return r.status

    assert await ask("new") == 200
    assert len(registry.asked) == 1
    assert await asyncio.gather(*(ask(f"made-up-{n}") for n in range(20))) == [404] * 20
    assert len(registry.asked) <= 2


async def test_static_routers_do_not_change_adapters(serve: Serve) -> None:
    served = await serve(1)
    async with served.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/p"}) as r:
        assert r.status == 501
