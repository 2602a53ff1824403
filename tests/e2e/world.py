"""The cluster that the end-to-end tests share, as a test sees it."""

from __future__ import annotations

import asyncio
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from vllm_loraserve.launcher import assets, traffic
from vllm_loraserve.launcher.cluster import Cluster

LONG = 900
"""Tokens: many times the steps of anything that a test does meanwhile."""


def exposition(url: str) -> str:
    """What a server has on its `/metrics`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text: str = answer.read().decode()
    return text


@dataclass(frozen=True)
class World:
    """What tests work with."""

    cluster: Cluster
    words: dict[str, str]
    """Adapter -> the word it answers with."""
    adapters: tuple[assets.WordAdapter, ...]
    reference: dict[str, str]
    """Prompt -> the base model's answer before any adapter was known."""
    root: Path
    """Allowed for adapters; empty at first."""

    @property
    def base(self) -> str:
        return self.cluster.plan.model_name

    @property
    def models(self) -> list[str]:
        """The six adapters, then the base model."""
        return [*self.words, self.base]

    def metric(self, index: int, name: str) -> float:
        """A metric of one instance, summed over its labels."""
        lines = exposition(self.cluster.instance_url(index)).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    async def running(self) -> list[float]:
        """Requests that run now, by instance."""
        return [
            await asyncio.to_thread(self.metric, i, "vllm:num_requests_running")
            for i in range(len(self.cluster.instances))
        ]

    async def begin_stream(self, client: AsyncOpenAI, session: str = "0") -> AsyncStream[ChatCompletionChunk]:
        """A stream of LONG tokens of the base model, of which the first has come."""
        stream = await client.chat.completions.create(
            model=self.base,
            messages=[{"role": "user", "content": "Tell me something about the moon."}],
            max_tokens=LONG,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
            extra_headers={"X-Session-Id": session},
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                break
        return stream

    def wrong(self, answers: list[traffic.Answer]) -> list[str]:
        """A line for each answer that is not right."""
        return [
            f"{a.request.model} (stream={a.request.stream}): {a.error or repr(a.text)}"
            for a in answers
            if not traffic.is_right(a, self.words, self.reference)
        ]

    def send(self, requests: list[traffic.Request], concurrency: int = 16) -> list[traffic.Answer]:
        """Answers, in order, by a fresh client."""

        async def run() -> list[traffic.Answer]:
            async with traffic.client_for(self.cluster.url) as client:
                return await traffic.send(client, requests, concurrency)

        return asyncio.run(run())
