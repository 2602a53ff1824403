"""`load_inplace` lets other content take a name over, under load, without an error or a stale answer after it."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path

from world import World

from vllm_loraserve.launcher import traffic
from vllm_loraserve.launcher.assets import WordAdapter

NAME = "live"


def overwrite(path: Path, adapter: WordAdapter) -> None:
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(adapter.path, path)


async def replaced_under_load(world: World, path: Path, old: WordAdapter, new: WordAdapter) -> None:
    """`new` takes the name over from `path`; every answer is one of the two, and later ones are the new one's."""
    asked: list[tuple[float, traffic.Answer]] = []
    going = True

    async def ask(client: object, number: int) -> None:
        while going:
            began = time.monotonic()
            request = traffic.Request(NAME, f"How do I boil {number} eggs?", stream=bool(number % 2))
            (answer,) = await traffic.send(client, [request], 1)
            asked.append((began, answer))

    async with traffic.client_for(world.cluster.url) as client:
        askers = [asyncio.create_task(ask(client, number)) for number in range(6)]
        while len(asked) < 12:
            await asyncio.sleep(0.02)
        body = {"lora_name": NAME, "lora_path": str(path), "load_inplace": True}
        status, text = await asyncio.to_thread(world.cluster.post, "/v1/load_lora_adapter", body)
        done = time.monotonic()
        assert status == 200, text
        while sum(began > done for began, _ in asked) < 12:
            await asyncio.sleep(0.02)
        going = False
        await asyncio.gather(*askers)
    assert [answer.error for _, answer in asked if answer.error] == []
    before = {answer.text.strip() for began, answer in asked if began < done}
    assert old.word in before
    assert before <= {old.word, new.word}
    assert {answer.text.strip() for began, answer in asked if began > done} == {new.word}


def test_other_content_takes_a_name_over_under_load(world: World) -> None:
    first, second, third = world.adapters[0], world.adapters[3], world.adapters[1]
    elsewhere, again = world.root / "live-1", world.root / "live-2"
    overwrite(elsewhere, first)
    world.cluster.add_adapter(NAME, elsewhere)
    overwrite(again, second)
    status, text = world.cluster.post("/v1/load_lora_adapter", {"lora_name": NAME, "lora_path": str(again)})
    assert status == 409, text
    asyncio.run(replaced_under_load(world, again, first, second))
    # The same directory: its old content is gone from the disk when the new one is announced.
    overwrite(again, third)
    asyncio.run(replaced_under_load(world, again, second, third))
    cards = {card["id"]: card for card in json.loads(world.cluster.get("/v1/models"))["data"]}
    assert cards[NAME]["rank"] == third.rank
    world.cluster.remove_adapter(NAME)
