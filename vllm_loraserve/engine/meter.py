"""What an instance is doing, measured in its API server: load as vLLM's own statistics tell it, demand per adapter.

vLLM's statistics have no adapter in them, so `Meter.attach` counts at the engine client: its `generate` and `encode`
are wrapped, on that one object, by generators that pass every output on and note its tokens under the adapter's name.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from vllm.sampling_params import RequestOutputKind
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_loraserve.coordinator.messages import AdapterDemand, Load

WINDOW_S = 10.0
"""Rates are means over so long."""


class _Tally(msgspec.Struct):
    """Counts of one adapter since the start."""

    tokens: int = 0
    requests: int = 0
    running: int = 0


class Meter:
    """Tokens, requests and running requests by adapter name (`""`: the base model). One event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tallies: dict[str, _Tally] = {}
        self._acknowledged: dict[str, int] = {}
        self._running_ids: collections.Counter[int] = collections.Counter()
        self._history: collections.deque[tuple[float, dict[str, tuple[int, int]]]] = collections.deque()
        self._history.append((clock(), {}))

    def attach(self, engine_client: Any) -> Callable[[], None]:
        """Counts what goes through `generate` and `encode` of `engine_client`; returns what undoes it."""
        originals = {
            name: getattr(engine_client, name) for name in ("generate", "encode") if hasattr(engine_client, name)
        }
        counted = {name: self._counted(original) for name, original in originals.items()}
        for name, wrapped in counted.items():
            setattr(engine_client, name, wrapped)

        def detach() -> None:
            for name, original in originals.items():
                if getattr(engine_client, name) is counted[name]:
                    setattr(engine_client, name, original)

        return detach

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` or `encode` of an engine client; of the latter only the prompt has tokens."""

        @functools.wraps(original)
        async def counted(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            # encode takes it fourth, too: prompt, parameters, request id, adapter.
            lora_request = kwargs.get("lora_request", args[3] if len(args) > 3 else None)
            params = kwargs.get("sampling_params", args[1] if len(args) > 1 else None)
            tally = self._tallies.setdefault(lora_request.lora_name if lora_request is not None else "", _Tally())
            delta = getattr(params, "output_kind", None) is RequestOutputKind.DELTA
            lora_id = lora_request.lora_int_id if lora_request is not None else 0
            tally.requests += 1
            tally.running += 1
            self._running_ids[lora_id] += 1
            outputs = original(*args, **kwargs)
            prompt_tokens = generated = 0
            try:
                async for output in outputs:
                    if not prompt_tokens:
                        prompt_tokens = len(output.prompt_token_ids or ())
                        tally.tokens += prompt_tokens
                    if isinstance(output.outputs, list):
                        new = sum(len(o.token_ids) for o in output.outputs)
                        tally.tokens += new if delta else new - generated
                        generated = new
                    yield output
            finally:
                tally.running -= 1
                self._running_ids[lora_id] -= 1
                # Ends the engine's side at once when the client has gone, rather than at garbage collection.
                await outputs.aclose()

        return counted

    def running(self, adapter: str | None = None) -> int:
        """Requests of `adapter`, or of all, between their arrival at the engine client and their last output."""
        if adapter is not None:
            return self._tallies[adapter].running if adapter in self._tallies else 0
        return sum(t.running for t in self._tallies.values())

    def requests(self) -> int:
        """Requests that have come since the start."""
        return sum(t.requests for t in self._tallies.values())

    def running_id(self, lora_int_id: int) -> int:
        """Requests that run with this very loading of an adapter; its name may stand for newer content meanwhile."""
        return self._running_ids[lora_int_id]

    def demand(self) -> tuple[AdapterDemand, ...]:
        """Rates over the last WINDOW_S seconds (less at the start), of whoever had any; to be called regularly.

        `tokens` is what has come since the last `acknowledge`.
        """
        now = self._clock()
        while len(self._history) > 1 and self._history[1][0] <= now - WINDOW_S:
            self._history.popleft()
        then, before = self._history[0]
        elapsed = max(now - then, 1e-3)
        out = []
        for name, tally in self._tallies.items():
            tokens, requests = before.get(name, (0, 0))
            if tally.running or tally.tokens > tokens or tally.requests > requests:
                out.append(
                    AdapterDemand(
                        name=name,
                        tokens_per_s=(tally.tokens - tokens) / elapsed,
                        requests_per_s=(tally.requests - requests) / elapsed,
                        running=tally.running,
                        tokens=tally.tokens - self._acknowledged.get(name, 0),
                    )
                )
        self._history.append((now, {n: (t.tokens, t.requests) for n, t in self._tallies.items()}))
        return tuple(sorted(out, key=lambda d: d.name))

    def acknowledge(self, demand: tuple[AdapterDemand, ...]) -> None:
        """`demand` has reached the coordinator: its tokens are not reported again."""
        for d in demand:
            self._acknowledged[d.name] = self._acknowledged.get(d.name, 0) + d.tokens


class LoadLogger(AggregateStatLoggerBase):
    """A vLLM stat logger that keeps the last scheduler statistics of each engine."""

    def __init__(self, vllm_config: Any = None, engine_indexes: Any = None) -> None:
        self._last: dict[int, Any] = {}

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Called by vLLM after every step."""
        if scheduler_stats is not None:
            self._last[engine_idx] = scheduler_stats

    def log_engine_initialized(self) -> None:
        """Nothing to log."""

    def load(self, meter: Meter, demand: tuple[AdapterDemand, ...]) -> Load:
        """The instance's load; without vLLM statistics (--disable-log-stats) everything in flight counts as running."""
        tokens_per_s = sum(d.tokens_per_s for d in demand)
        if not self._last or meter.running() == 0:
            return Load(running=meter.running(), tokens_per_s=tokens_per_s)
        stats = self._last.values()
        return Load(
            running=sum(s.num_running_reqs for s in stats),
            waiting=sum(s.num_waiting_reqs + getattr(s, "num_skipped_waiting_reqs", 0) for s in stats),
            kv_usage=min(1.0, max(s.kv_cache_usage for s in stats)),
            tokens_per_s=tokens_per_s,
        )
