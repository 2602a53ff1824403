"""The right adapter for every request, through the router, as an OpenAI client sees it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter

from world import LONG, World

from vllm_loraserve.launcher import traffic


def test_200_mixed_requests_are_all_right(world: World) -> None:
    requests = traffic.mixed(world.models, 200)
    answers = world.send(requests, concurrency=16)
    assert world.wrong(answers) == []
    assert len(answers) == 200
    streamed = Counter(request.stream for request in requests)
    assert min(streamed.values()) >= 90
    assert set(Counter(request.model for request in requests)) == set(world.models)
    assert all(answer.ttft_s is not None for answer in answers if answer.request.stream)


def test_a_client_that_leaves_its_stream_ends_the_request_in_the_engine(world: World) -> None:
    def tokens() -> float:
        return sum(world.metric(i, "vllm:generation_tokens_total") for i in range(2))

    async def run() -> None:
        async with traffic.client_for(world.cluster.url) as client:
            stream = await world.begin_stream(client)
            while sum(await world.running()) == 0:
                await asyncio.sleep(0.01)
            await stream.close()
            while sum(await world.running()) > 0:
                await asyncio.sleep(0.05)

    before = tokens()
    asyncio.run(asyncio.wait_for(run(), 300))
    assert 0 < tokens() - before < LONG


def test_completions_are_routed_as_chat_is(world: World) -> None:
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    )
    for name, word in world.words.items():
        body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        status, text = world.cluster.post("/v1/completions", body)
        assert status == 200
        assert json.loads(text)["choices"][0]["text"] == word


def test_models_lists_the_base_and_every_adapter_with_parent_and_rank(world: World) -> None:
    cards = {card["id"]: card for card in json.loads(world.cluster.get("/v1/models"))["data"]}
    assert cards[world.base]["parent"] is None
    for adapter in world.adapters:
        card = cards[adapter.name]
        assert (card["parent"], card["rank"]) == (world.base, adapter.rank)


def test_an_unknown_adapter_is_a_404_in_openais_words(world: World) -> None:
    body = {"model": "nobody", "messages": [{"role": "user", "content": "Hello"}]}
    status, text = world.cluster.post("/v1/chat/completions", body)
    assert status == 404
    error = json.loads(text)["error"]
    assert error["type"] == "NotFoundError"
    assert "nobody" in error["message"]


def test_status_shows_instances_adapters_and_placement(world: World) -> None:
    command = [
        sys.executable,
        "-m",
        "vllm_loraserve.cli",
        "status",
        "--coordinator",
        world.cluster.coordinator_endpoint,
    ]
    done = subprocess.run([*command, "--json"], check=True, capture_output=True, timeout=60)
    table = json.loads(done.stdout)["table"]
    assert {entry["name"] for entry in table["instances"]} == {"instance-0", "instance-1"}
    placed = {entry["adapter"]["name"]: [route["instance"] for route in entry["routes"]] for entry in table["adapters"]}
    assert set(placed) >= set(world.words)
    assert all(placed[name] for name in world.words)
    shown = subprocess.run(command, check=True, capture_output=True, timeout=60, text=True).stdout
    assert all(name in shown for name in (*world.words, "instance-0", "instance-1"))
