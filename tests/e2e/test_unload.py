"""Unloading refuses new requests at once and lets the running ones finish."""

from __future__ import annotations

import asyncio
import json
import shutil

from world import World

from vllm_loraserve.launcher import traffic

TOKENS = 150


def test_unload_drains(world: World) -> None:
    path = world.root / "short-lived"
    shutil.copytree(world.adapters[2].path, path)
    world.cluster.add_adapter("short-lived", path)

    async def run() -> tuple[int, str, int]:
        async with traffic.client_for(world.cluster.url) as client:
            stream = await client.chat.completions.create(
                model="short-lived",
                messages=[{"role": "user", "content": "Tell me something about the moon."}],
                max_tokens=TOKENS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            tokens, unload, refused = 0, None, 0
            async for chunk in stream:
                if chunk.usage:
                    tokens = chunk.usage.completion_tokens
                if unload is None and chunk.choices and chunk.choices[0].delta.content:
                    body = {"lora_name": "short-lived"}
                    unload = asyncio.create_task(asyncio.to_thread(world.cluster.post, "/v1/unload_lora_adapter", body))
                    hello = [{"role": "user", "content": "Hello"}]
                    again = {"model": "short-lived", "messages": hello, "max_tokens": 1}
                    while not unload.done() and refused != 404:  # as soon as the coordinator has heard of it
                        refused = (await asyncio.to_thread(world.cluster.post, "/v1/chat/completions", again))[0]
            assert unload is not None
            status, text = await unload
            assert status == 200, text
            return refused, text, tokens

    refused, text, tokens = asyncio.run(run())
    assert tokens == TOKENS  # the running request was not cut short
    assert refused == 404
    assert "short-lived" in text
    assert "short-lived" not in {card["id"] for card in json.loads(world.cluster.get("/v1/models"))["data"]}
    status, _ = world.cluster.post("/v1/unload_lora_adapter", {"lora_name": "short-lived"})
    assert status == 404


def test_an_unloaded_name_can_be_taken_by_other_content(world: World) -> None:
    for adapter in (world.adapters[0], world.adapters[1]):
        path = world.root / f"reused-{adapter.name}"
        shutil.copytree(adapter.path, path)
        world.cluster.add_adapter("reused", path)
        answer = world.send([traffic.Request("reused", "How do I boil an egg?", False)])[0]
        assert answer.text.strip() == adapter.word
        assert world.cluster.post("/v1/unload_lora_adapter", {"lora_name": "reused"})[0] == 200
