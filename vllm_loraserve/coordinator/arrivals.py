"""What adapters ask for where an instance can't keep up: tokens are reported as served, requests as they come.

While an instance has no queue, tokens per request are seen; once it has one, arrivals times that are the demand.
Pure: time is passed in, in seconds.
"""

from __future__ import annotations

from vllm_loraserve.coordinator.messages import Heartbeat

WEIGHT = 0.1
"""Of a new observation of the tokens of a request."""


class Arrivals:
    """Tokens asked for, by instance and adapter."""

    def __init__(self) -> None:
        self._tokens_per_request: float | None = None
        self._seen: dict[str, float] = {}
        self._rates: dict[str, dict[str, float]] = {}

    def observe(self, instance: str, beat: Heartbeat, now: float) -> dict[str, float]:
        """Takes a report; returns adapter -> tokens asked for since the one before, never less than were served."""
        since = now - self._seen.get(instance, now)
        self._seen[instance] = now
        demand = [d for d in beat.demand if d.name]
        served, came = sum(d.tokens_per_s for d in demand), sum(d.requests_per_s for d in demand)
        mean = self._tokens_per_request
        if not beat.load.waiting:
            if came > 0.0 and served > 0.0:
                self._tokens_per_request = served / came if mean is None else mean + WEIGHT * (served / came - mean)
            mean = None
        asked = {d.name: max(d.tokens_per_s, d.requests_per_s * mean) if mean else d.tokens_per_s for d in demand}
        self._rates[instance] = asked
        return {d.name: max(float(d.tokens), asked[d.name] * since if mean else 0.0) for d in demand}

    def rates(self) -> dict[str, float]:
        """Adapter -> tokens/s asked for on all instances."""
        out: dict[str, float] = {}
        for asked in self._rates.values():
            for name, rate in asked.items():
                out[name] = out.get(name, 0.0) + rate
        return out

    def forget(self, instance: str) -> None:
        """It is no longer a member."""
        self._seen.pop(instance, None)
        self._rates.pop(instance, None)
