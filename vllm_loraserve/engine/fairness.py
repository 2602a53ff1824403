"""Shares and limits of adapters and tenants. Pure.

An option is looked up for an adapter by its name, then by its tenant (what precedes "/" in the name), then under "*".
Shares are start-time fair queueing: each label has a virtual time that runs on by tokens / weight; the label that is
behind goes first. Limits count the tokens that running requests may still reach: prompt + max_tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_PRUNE_ABOVE = 1024
"""Labels, beyond twice those that are ahead of the present, before the others are forgotten."""


def label_of(name: str, options: Mapping[str, object]) -> str | None:
    """The key under which `name` is accounted, or None when no option covers it.

    An adapter named or covered by "*" is accounted alone; one covered by its tenant, with its tenant.
    """
    if name in options:
        return name
    tenant, slash, _ = name.partition("/")
    if slash and tenant in options:
        return tenant
    return name if "*" in options else None


def value_of(label: str, options: Mapping[str, float]) -> float:
    """The option of a label that `label_of` gave."""
    return options[label] if label in options else options["*"]


def reach(request: Any) -> int:
    """Tokens that a request of vLLM's may reach: its prompt and all that it may generate."""
    return int(request.num_prompt_tokens + request.max_tokens)


@dataclass(slots=True)
class Shares:
    """Weighted shares of admitted tokens; empty weights: everybody is served in queue order."""

    weights: Mapping[str, float]
    _times: dict[str, float] = field(default_factory=dict)
    _now: float = 0.0
    _prune_at: int = _PRUNE_ABOVE

    def time(self, name: str) -> float:
        """Virtual time at which the next request of `name` starts; smaller goes first. The base model and adapters that
        no share covers weigh 1 together."""
        if not self.weights:
            return 0.0
        return max(self._times.get(label_of(name, self.weights) or "", 0.0), self._now)

    def admit(self, name: str, tokens: int) -> None:
        """A request of `name` over `tokens` tokens was admitted."""
        if not self.weights:
            return
        label = label_of(name, self.weights) or ""
        start = self.time(name)
        self._now = start
        self._times[label] = start + tokens / (value_of(label, self.weights) if label else 1.0)

        if len(self._times) > self._prune_at:
            # Who is behind the present starts at the present: nothing need be remembered of it.
            self._times = {label: time for label, time in self._times.items() if time > self._now}
            self._prune_at = _PRUNE_ABOVE + 2 * len(self._times)

    def refund(self, name: str, tokens: int) -> None:
        """A request of this name was not admitted after all, or did not take so many of its tokens."""
        label = label_of(name, self.weights) or ""
        if label in self._times:
            self._times[label] -= tokens / (value_of(label, self.weights) if label else 1.0)


@dataclass(slots=True)
class Limits:
    """Most tokens in flight by label; empty: no limit."""

    most: Mapping[str, int]
    _inflight: dict[str, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Nothing runs."""
        self._inflight.clear()

    def take(self, name: str, tokens: int) -> None:
        """A request runs."""
        if self.most and (label := label_of(name, self.most)) is not None:
            self._inflight[label] = self._inflight.get(label, 0) + tokens

    def release(self, name: str, tokens: int) -> None:
        """A request that was counted does not run."""
        if self.most and (label := label_of(name, self.most)) is not None:
            self._inflight[label] = self._inflight.get(label, 0) - tokens

    def allows(self, name: str, tokens: int) -> bool:
        """Whether one more request fits; one alone always does, however long."""
        if not self.most or (label := label_of(name, self.most)) is None:
            return True
        inflight = self._inflight.get(label, 0)
        return inflight <= 0 or inflight + tokens <= value_of(label, self.most)
