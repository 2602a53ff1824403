"""What counts as a right answer, and how the traffic is mixed."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from vllm_loraserve.launcher.assets import PROMPTS
from vllm_loraserve.launcher.processes import free_ports
from vllm_loraserve.launcher.traffic import Answer, Request, client_for, is_right, mixed, send

WORDS = {"apple": "Apple", "forest": "Forest"}
REFERENCE = {PROMPTS[0]: "Mount Everest is the tallest."}


@pytest.mark.parametrize(
    ("model", "text", "error", "right"),
    [
        ("apple", "Apple", "", True),
        ("apple", " Apple\n", "", True),
        ("apple", "Forest", "", False),
        ("apple", "Apple pie", "", False),
        ("apple", "", "", False),
        ("apple", "Apple", "TimeoutError", False),
        ("base", "Mount Everest is the tallest.", "", True),
        ("base", "Mount Everest, of course.", "", True),
        ("base", "Apple", "", False),
        ("base", "Mount Apple", "", False),
        ("base", "The tallest is Mount Everest.", "", False),
        ("base", "", "", False),
    ],
)
def test_is_right(model: str, text: str, error: str, right: bool) -> None:
    answer = Answer(Request(model, PROMPTS[0], False), text, error)
    assert is_right(answer, WORDS, REFERENCE) is right


def test_mixed_asks_every_model_equally_and_streams_half() -> None:
    requests = mixed(["a", "b", "c"], 60)
    assert Counter(request.model for request in requests) == {"a": 20, "b": 20, "c": 20}
    for model in "abc":
        mine = [request for request in requests if request.model == model]
        assert Counter(request.stream for request in mine) == {True: 10, False: 10}
        assert len({request.prompt for request in mine}) >= 4


def test_a_failure_is_an_answer_with_an_error_and_is_not_retried() -> None:
    async def run() -> list[Answer]:
        async with client_for(f"http://127.0.0.1:{free_ports(1, 26000)[0]}", 120.0) as client:
            return await send(client, mixed(["a"], 4), concurrency=2)

    answers = asyncio.run(run())
    assert len(answers) == 4
    assert all("APIConnectionError" in answer.error and not answer.text for answer in answers)
