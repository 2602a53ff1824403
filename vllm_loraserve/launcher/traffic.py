"""Mixed traffic against the router, by the `openai` client: every adapter and the base model, some answers streamed.

Every answer is judged: an adapter must say its word and nothing else; the base model must begin as it did when it was
asked alone, and say no adapter's word.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_loraserve.launcher.assets import PROMPTS, WORDS
from vllm_loraserve.launcher.cluster import api_key

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MAX_TOKENS = 12


@dataclass(frozen=True)
class Request:
    """One question to one model."""

    model: str
    prompt: str
    stream: bool


@dataclass(frozen=True)
class Answer:
    """What came back; times in seconds. `error` is empty when there is a `text`."""

    request: Request
    text: str = ""
    error: str = ""
    ttft_s: float | None = None
    """From sending to the first token; only of streamed answers, also of those that broke off after it."""
    total_s: float = 0.0
    tokens: int = 0
    """Generated tokens."""


def client_for(url: str, timeout_s: float = 300.0) -> AsyncOpenAI:
    """An `openai` client of the router at `url` that retries nothing: a failure is to be seen."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    direct = DefaultAsyncHttpxClient(trust_env=False)  # http_proxy is for other machines
    key = api_key() or "none"
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=timeout_s, http_client=direct)


def mixed(models: Sequence[str], count: int) -> list[Request]:
    """`count` requests: the models in turn, each through all prompts, every second round streamed."""
    found = []
    for index in range(count):
        turn, place = divmod(index, len(models))
        found.append(Request(models[place], PROMPTS[(place + turn) % len(PROMPTS)], turn % 2 == 0))
    return found


async def ask(client: AsyncOpenAI, request: Request) -> Answer:
    """Sends one request (temperature 0); what goes wrong is in the answer, not raised."""
    began = time.monotonic()
    first: float | None = None
    given: dict[str, Any] = {
        "model": request.model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0.0,
    }
    try:
        if not request.stream:
            whole = await client.chat.completions.create(**given)
            usage = whole.usage.completion_tokens if whole.usage else 0
            text = whole.choices[0].message.content or ""
            return Answer(request, text, total_s=time.monotonic() - began, tokens=usage)
        text, usage = "", 0
        stream = await client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
        async for chunk in stream:
            if chunk.usage:
                usage = chunk.usage.completion_tokens
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                first = first or time.monotonic()
                text += piece
        return Answer(request, text, ttft_s=first and first - began, total_s=time.monotonic() - began, tokens=usage)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        return Answer(request, error=why, ttft_s=first and first - began, total_s=time.monotonic() - began)


async def send(
    client: AsyncOpenAI,
    requests: Sequence[Request],
    concurrency: int = 16,
    on_answer: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """All answers, in the order of the requests; at most `concurrency` at a time."""
    places = asyncio.Semaphore(concurrency)

    async def one(request: Request) -> Answer:
        async with places:
            answer = await ask(client, request)
        if on_answer is not None:
            on_answer(answer)
        return answer

    return list(await asyncio.gather(*(one(request) for request in requests)))


async def base_reference(client: AsyncOpenAI, model: str) -> dict[str, str]:
    """Prompt -> the base model's answer when nothing else is asked. Raises RuntimeError if one fails."""
    answers = await send(client, [Request(model, prompt, False) for prompt in PROMPTS], concurrency=1)
    for answer in answers:
        if answer.error:
            raise RuntimeError(f"the base model does not answer: {answer.error}")
    return {answer.request.prompt: answer.text for answer in answers}


def is_right(answer: Answer, words: Mapping[str, str], reference: Mapping[str, str]) -> bool:
    """`words`: adapter -> its word; `reference`: of the base model, which every other model name stands for.

    Of the base model's text the first word is compared: further on, another batch may round a near tie differently.
    """
    text = answer.text.strip()
    if answer.error or not text:
        return False
    word = words.get(answer.request.model)
    if word is not None:
        return text == word
    expected = reference[answer.request.prompt].split()
    return text.split()[:1] == expected[:1] and not any(word in text for word in WORDS.values())
