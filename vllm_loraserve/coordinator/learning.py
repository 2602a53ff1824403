"""What instances really sustain, learned from their reports, against what the operating points predict.

The unit is *work*: sum over adapters of tokens/s / OP[rank], so 1.0 is an instance at its operating point. While an
instance has requests waiting without a break it does all that it can: the work it does then is its speed. More work
than its speed, without a queue, shows that the speed was put too low. Pure: time is passed in, in seconds.
"""

from __future__ import annotations

import statistics

import msgspec

from vllm_loraserve.cluster.operating_points import OperatingPoints
from vllm_loraserve.coordinator.messages import AdapterDemand, Load

SATURATED_S = 10.0
"""A queue that lasts so long (the window of the reported rates) shows the instance at its limit."""
WEIGHT = 0.3
"""Of a new observation against what was learned before."""
APART = 1.5
"""Learned and predicted speeds further apart than this factor are worth a warning."""


def work_of(demand: dict[str, AdapterDemand], ranks: dict[str, int], op: OperatingPoints) -> float:
    """Work per second of an instance, in shares of one at its operating point; the base model counts as rank 1."""
    return sum(d.tokens_per_s / op.at(ranks.get(name, 1)) for name, d in demand.items())


class _Seen(msgspec.Struct):
    kind: str
    speed: float | None = None
    queue_since: float | None = None
    learned_at: float = 0.0
    work: float = 0.0
    load: Load = Load()


class SpeedLearner:
    """Speed of each instance, relative to the operating points."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def observe(self, instance: str, kind: str, work: float, load: Load, now: float) -> None:
        """Takes one report. `kind`: instances of one kind (device, tensor parallel size) share what is learned."""
        seen = self._seen.setdefault(instance, _Seen(kind))
        seen.kind, seen.work, seen.load = kind, work, load
        if load.waiting == 0:
            seen.queue_since = None
            # Only what was learned to be too low is raised: an idle instance shows nothing.
            if seen.speed is not None and work > seen.speed:
                seen.speed = work
            return
        if seen.queue_since is None:
            seen.queue_since = seen.learned_at = now
        if now - seen.queue_since >= SATURATED_S and now - seen.learned_at >= SATURATED_S and work > 0.0:
            seen.speed = work if seen.speed is None else (1 - WEIGHT) * seen.speed + WEIGHT * work
            seen.learned_at = now

    def forget(self, instance: str) -> None:
        """It is no longer a member."""
        self._seen.pop(instance, None)

    def speed(self, instance: str) -> float:
        """Its own, else the median of its kind, else 1.0: as the operating points say."""
        seen = self._seen.get(instance)
        if seen is None:
            return 1.0
        if seen.speed is not None:
            return seen.speed
        alike = [s.speed for s in self._seen.values() if s.kind == seen.kind and s.speed is not None]
        return statistics.median(alike) if alike else 1.0

    def live_load(self) -> dict[str, float]:
        """Observed load by instance; 1.0 at its speed, and above by its queue."""
        out = {}
        for instance, seen in self._seen.items():
            load = seen.work / self.speed(instance)
            if seen.load.waiting:
                load = max(load, 1.0 + seen.load.waiting / max(seen.load.running, 1))
            out[instance] = load
        return out

    def learned(self) -> dict[str, float]:
        """Speeds that were observed."""
        return {name: s.speed for name, s in sorted(self._seen.items()) if s.speed is not None}

    def warnings(self) -> list[str]:
        """One sentence for each instance whose observed speed and operating points have parted."""
        return [
            f"Instance '{name}' sustains {speed:.2g} of what the operating points say; measure them by "
            "`vllm-loraserve profile`."
            for name, speed in self.learned().items()
            if not 1 / APART < speed < APART
        ]
