"""What this router has under way on one instance, as running totals that prediction reads: `Work` and `Ledger`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_loraserve.router.directory import Target

BYTES_PER_TOKEN = 4.0
"""Of a request body, about; only ratios between instances matter."""


class Ledger:
    """Totals of this router's requests on one instance; all zero when there is none.

    `queued` requests have not had a first token: `prompts` is their prompt tokens, `prompt_ranks` those times rank.
    `running` ones decode: `decode_ranks` is the sum of their ranks, `context` their prompt tokens. `adapters` counts
    the requests of each, `decoding` those of them that decode, `rows` are the rank rows of all of them.
    """

    __slots__ = (
        "adapters",
        "context",
        "decode_ranks",
        "decoding",
        "prompt_ranks",
        "prompts",
        "queued",
        "rows",
        "running",
    )

    def __init__(self) -> None:
        self.queued = self.running = self.rows = self.decode_ranks = self.prompts = self.prompt_ranks = self.context = 0
        self.adapters: dict[str, int] = {}
        self.decoding: dict[str, int] = {}

    def blocked(self, adapter: str) -> int:
        """Requests of an adapter that wait for their first token while none of them has had one."""
        return 0 if adapter in self.decoding else self.adapters.get(adapter, 0)

    def idle(self) -> bool:
        """Whether every total is zero."""
        return not any(getattr(self, total) for total in self.__slots__)


class Work:
    """One request as prediction sees it, in whole tokens. It books itself: `sent`, `first_token`, `done`."""

    __slots__ = ("_ledger", "decoding", "output", "prompt", "rank_rows", "streams", "target", "wait_s")

    def __init__(
        self, target: Target, body_bytes: int, max_tokens: int | None, mean_output: float, streams: bool
    ) -> None:
        self.target = target
        self.prompt = max(1, round(body_bytes / BYTES_PER_TOKEN))
        self.output = min(float(max_tokens), mean_output) if max_tokens else mean_output
        self.rank_rows = -(-target.rank // 8) * 8
        self.streams = streams
        self.decoding = False
        self.wait_s = 0.0
        """Predicted time to the first token, for answers that do not stream and so do not show it."""
        self._ledger: Ledger | None = None

    def sent(self, ledger: Ledger) -> None:
        """It is in the instance's queue."""
        assert self._ledger is None, "sent twice"
        self._ledger = ledger
        ledger.queued += 1
        ledger.prompts += self.prompt
        ledger.prompt_ranks += self.prompt * self.target.rank
        if self.target.rank:
            name = self.target.name
            if name not in ledger.adapters:
                ledger.rows += self.rank_rows
                ledger.adapters[name] = 0
            ledger.adapters[name] += 1

    def first_token(self) -> None:
        """Its prompt has been read: it decodes. Without effect when it does already, or has ended."""
        ledger = self._ledger
        if ledger is None or self.decoding:
            return
        self.decoding = True
        self._leave_queue(ledger)
        ledger.running += 1
        ledger.decode_ranks += self.target.rank
        ledger.context += self.prompt
        if self.target.rank:
            ledger.decoding[self.target.name] = ledger.decoding.get(self.target.name, 0) + 1

    def done(self) -> None:
        """It has left the instance, however; it may be sent again."""
        ledger, self._ledger = self._ledger, None
        if ledger is None:
            return
        if self.decoding:
            self.decoding = False
            ledger.running -= 1
            ledger.decode_ranks -= self.target.rank
            ledger.context -= self.prompt
            if self.target.rank:
                _one_less(ledger.decoding, self.target.name)
        else:
            self._leave_queue(ledger)
        if self.target.rank:
            _one_less(ledger.adapters, self.target.name)
            if self.target.name not in ledger.adapters:
                ledger.rows -= self.rank_rows

    def _leave_queue(self, ledger: Ledger) -> None:
        ledger.queued -= 1
        ledger.prompts -= self.prompt
        ledger.prompt_ranks -= self.prompt * self.target.rank


def _one_less(counts: dict[str, int], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
