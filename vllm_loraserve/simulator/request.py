"""One request of a simulation."""

from __future__ import annotations


class Request:
    """What it asks for and what happened to it. Times in seconds, -1.0: not yet."""

    __slots__ = (
        "adapter",
        "arrival",
        "finish",
        "first_token",
        "generated",
        "grow_at",
        "index",
        "kv",
        "output",
        "prefilled",
        "prompt",
        "rank",
        "retries",
        "server",
        "session",
    )

    def __init__(self, index: int, arrival: float, adapter: int, rank: int, prompt: int, output: int) -> None:
        self.index = index
        self.arrival = arrival
        self.adapter = adapter
        self.rank = rank
        self.prompt = prompt
        self.output = output
        self.session = -1
        self.prefilled = 0
        self.generated = 0
        """Output tokens that a preemption has made part of the prompt: they are computed again with it."""
        self.kv = 0
        """Tokens of KV cache that it holds."""
        self.grow_at = -1
        """Steps of its server after which it needs another KV block; -1: it does not decode."""
        self.first_token = -1.0
        self.finish = -1.0
        self.server = -1
        self.retries = 0
