"""The KV cache of a simulated instance: who fits, and who needs another block."""

from __future__ import annotations

import heapq
import math

from vllm_loraserve.simulator.request import Request


class KVCache:
    """`tokens` of memory in blocks of `block` tokens: a request takes blocks for its prompt when it is admitted, and
    one more each time its context outgrows what it has, as in vLLM. `block` 0: it takes its prompt and output at once.
    """

    def __init__(self, tokens: int, block: int) -> None:
        self.tokens, self.block = tokens, block
        self.used = 0
        self._growth: list[tuple[int, int, Request]] = []
        """Heap of (steps after which it needs a block, index, request); stale once that is no longer `grow_at`."""

    def fits(self, r: Request) -> bool:
        """Whether there is memory to admit `r`."""
        return self.used + self._first(r) <= self.tokens

    def enter(self, r: Request) -> None:
        """`r` is admitted."""
        r.kv = self._first(r)
        self.used += r.kv

    def leave(self, r: Request) -> None:
        """`r` has ended, or was preempted."""
        self.used -= r.kv
        r.kv, r.grow_at = 0, -1

    def decodes(self, r: Request, steps: int) -> None:
        """The prompt of `r` is computed, when the server has taken `steps` steps."""
        if self.block:
            r.grow_at = steps + r.kv - r.prompt
            heapq.heappush(self._growth, (r.grow_at, r.index, r))

    def grow(self, steps: int) -> bool:
        """Gives a block to each request that needs one for the step after `steps`; False: there are not enough."""
        while self._next() <= steps:
            r = self._growth[0][2]
            if self.used + self.block > self.tokens:
                return False
            self.used += self.block
            r.kv += self.block
            r.grow_at += self.block
            heapq.heapreplace(self._growth, (r.grow_at, r.index, r))
        return True

    def steps_left(self, steps: int) -> float:
        """Steps that can be taken after `steps` before somebody needs a block."""
        return self._next() - steps

    def _first(self, r: Request) -> int:
        return -(-r.prompt // self.block) * self.block if self.block else r.prompt + r.output

    def _next(self) -> float:
        growth = self._growth
        while growth and growth[0][0] != growth[0][2].grow_at:
            heapq.heappop(growth)
        return growth[0][0] if growth else math.inf
