"""The cluster that the end-to-end tests share, as a test sees it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from vllm_loraserve.launcher import assets, traffic
from vllm_loraserve.launcher.cluster import Cluster


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
