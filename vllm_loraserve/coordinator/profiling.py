"""Measures what one running instance sustains: step samples, and operating points under an SLO, through its HTTP API.

**Step samples**: single prompts of several lengths (a step of prefill) and groups of streams in steady decode (a step
of one token each), with no adapter and with adapters of each rank; what a request costs outside of the engine is in the
`base` term. **Operating point** of a rank: requests of a fixed shape arrive at random (Poisson) at falling rates, from
the most that the instance did with many at once, until the 95th percentile of the time to first token is within the
SLO; the tokens/s of that run are the point. Prompts are random token ids, so that no prefix cache answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence

import aiohttp
import msgspec

from vllm_loraserve.cluster.fit import StepSample

LADDER = (0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25, 0.15)
"""Shares of the saturated request rate that are tried, until one is within the SLO."""
DECODE_PROMPT = 8
KEEPALIVE_S = 3.0
WARM_UP_CHUNKS = 3
"""First tokens of a stream that are not timed: other streams of the group are still in prefill."""


class ProfilingError(RuntimeError):
    """The instance could not be measured; the message is one sentence."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of the requests and length of the runs."""

    prompt_tokens: int = 128
    output_tokens: int = 32
    concurrency: int = 16
    """Requests at once in the saturating run."""
    trial_s: float = 20.0
    slo_ttft_s: float = 10.0
    prompt_lengths: tuple[int, ...] = (16, 64, 128)
    group_sizes: tuple[int, ...] = (1, 2, 4, 8)
    vocabulary: tuple[int, int] = (1000, 20000)
    """Token ids are drawn from here."""


class Trial(msgspec.Struct, frozen=True):
    """One run: requests/s offered, tokens/s done, P95 of the time to first token in seconds."""

    offered_rps: float
    tokens_per_s: float
    p95_ttft_s: float
    requests: int


class _Stream(msgspec.Struct):
    ttft: float
    chunks: list[float]
    """Times at which tokens arrived, seconds of the monotonic clock."""
    tokens: int


def connector() -> aiohttp.TCPConnector:
    """For the session of a `Profiler`: uses no idle connection that the server may be closing (uvicorn: after 5 s)."""
    return aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)


class Profiler:
    """Sends requests to the instance at `url`. `vocabulary` ids must exist in its model."""

    def __init__(self, session: aiohttp.ClientSession, url: str, workload: Workload, seed: int = 0) -> None:
        self._session = session
        self._url = url.rstrip("/") + "/v1/completions"
        self._random = random.Random(seed)
        self.workload = workload

    async def _stream(self, model: str, prompt_tokens: int, output_tokens: int) -> _Stream:
        low, high = self.workload.vocabulary
        body = {
            "model": model,
            "prompt": [self._random.randrange(low, high) for _ in range(prompt_tokens)],
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        started = time.monotonic()
        chunks: list[float] = []
        async with self._session.post(self._url, json=body) as answer:
            if answer.status == 401:
                raise ProfilingError(
                    "The instance asks for an API key; set LORASERVE_UPSTREAM_API_KEY to one of its keys."
                )
            if answer.status != 200:
                text = (await answer.text())[:300]
                raise ProfilingError(f"The instance answered {answer.status} for '{model}': {text}")
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ProfilingError(f"The instance failed in a stream of '{model}': {event['error']}")
                    if event.get("choices"):
                        chunks.append(time.monotonic())
        if not chunks:
            raise ProfilingError(f"The instance sent no token for '{model}'.")
        return _Stream(chunks[0] - started, chunks, output_tokens)

    async def first_token_s(self, model: str, prompt_tokens: int, output_tokens: int = 1) -> float:
        """Seconds to the first token of one request with a random prompt."""
        return (await self._stream(model, prompt_tokens, output_tokens)).ttft

    # ---- steps ----

    async def step_samples(
        self, by_rank: Mapping[int, Sequence[str]], base_model: str, repeats: int = 3
    ) -> list[StepSample]:
        """Prefill and decode steps of the base model and of every rank; decode steps that mix all ranks, which tell the
        cost of an adapter from that of its rows; and decode steps behind long prompts, which tell the cost of a token's
        context from its own. `by_rank`: rank -> adapters of it."""
        out = []
        for rank, models in {0: [base_model], **by_rank}.items():
            await self._stream(models[0], DECODE_PROMPT, 2)  # loads and warms up
            for prompt in self.workload.prompt_lengths:
                times = [(await self._stream(models[0], prompt, 1)).ttft for _ in range(repeats)]
                out.append(
                    StepSample(
                        seconds=statistics.median(times),
                        prefill_tokens=prompt,
                        prefill_token_ranks=prompt * rank,
                        rank_rows=rank,
                        adapters=1 if rank else 0,
                    )
                )
            out += [await self._decode([(m, rank) for m in models], size) for size in self.workload.group_sizes]
        longest = max(self.workload.prompt_lengths)
        out += [await self._decode([(base_model, 0)], size, longest) for size in self.workload.group_sizes[-2:]]
        mixed = [(model, rank) for rank, models in by_rank.items() for model in models]
        if len(by_rank) > 1:
            out += [await self._decode(mixed, size) for size in self.workload.group_sizes if size >= len(mixed)]
        return out

    async def _decode(
        self, models: Sequence[tuple[str, int]], size: int, prompt_tokens: int = DECODE_PROMPT
    ) -> StepSample:
        """A group of `size` streams that take turns among `models`, (name, rank); rank 0: the base model."""
        ranks = dict(models)
        used = [models[i % len(models)][0] for i in range(size)]
        for model in dict.fromkeys(used):
            await self._stream(model, DECODE_PROMPT, 1)
        # Twice as long behind long prompts: the first streams answer while the last ones are still in prefill.
        length = WARM_UP_CHUNKS + (16 if prompt_tokens == DECODE_PROMPT else 32)
        streams = await asyncio.gather(*(self._stream(m, prompt_tokens, length) for m in used))
        together = max(s.chunks[0] for s in streams)
        pairs = [pair for s in streams for pair in list(itertools.pairwise(s.chunks))[WARM_UP_CHUNKS:]]
        gaps = [b - a for a, b in pairs if a >= together] or [b - a for a, b in pairs]
        adapters = [model for model in dict.fromkeys(used) if ranks[model]]
        return StepSample(
            seconds=statistics.median(gaps),
            decode_tokens=size,
            decode_token_ranks=sum(ranks[model] for model in used),
            rank_rows=sum(ranks[model] for model in adapters),
            adapters=len(adapters),
            context_tokens=size * (prompt_tokens + length / 2),
        )

    # ---- operating points ----

    async def operating_point(self, models: Sequence[str]) -> tuple[float, list[Trial]]:
        """Tokens/s that `models` (adapters of one rank) sustain together within the SLO, and the runs that show it.

        Raises ProfilingError when not even the lowest rate of the ladder is within it.
        """
        saturated = await self._saturate(models)
        trials = [saturated]
        for share in LADDER:
            trial = await self._open_loop(models, share * saturated.offered_rps)
            trials.append(trial)
            if trial.p95_ttft_s <= self.workload.slo_ttft_s:
                return trial.tokens_per_s, trials
        raise ProfilingError(
            f"Even at {trials[-1].offered_rps:.2f} requests/s the P95 of the time to first token is "
            f"{trials[-1].p95_ttft_s:.2f} s, over the SLO of {self.workload.slo_ttft_s:g} s; give a longer --slo-ttft."
        )

    async def _saturate(self, models: Sequence[str]) -> Trial:
        """As many as `concurrency` at once, all the time; its request rate is the most that is possible."""
        w = self.workload
        started = time.monotonic()
        done: list[_Stream] = []

        async def worker(i: int) -> None:
            while time.monotonic() - started < w.trial_s:
                done.append(await self._stream(models[i % len(models)], w.prompt_tokens, w.output_tokens))

        await asyncio.gather(*(worker(i) for i in range(w.concurrency)))
        return self._trial(len(done) / (time.monotonic() - started), started, done)

    async def _open_loop(self, models: Sequence[str], rate: float) -> Trial:
        """Poisson arrivals at `rate` per second for `trial_s`; every request is waited for."""
        w = self.workload
        started = time.monotonic()
        tasks: list[asyncio.Task[_Stream]] = []
        at = 0.0
        try:
            while (at := at + self._random.expovariate(rate)) < w.trial_s:
                await asyncio.sleep(max(0.0, started + at - time.monotonic()))
                model = models[len(tasks) % len(models)]
                tasks.append(asyncio.create_task(self._stream(model, w.prompt_tokens, w.output_tokens)))
            if not tasks:  # a rate so low that nobody came: one request tells enough
                tasks.append(asyncio.create_task(self._stream(models[0], w.prompt_tokens, w.output_tokens)))
            done = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(Exception):
                await asyncio.gather(*tasks, return_exceptions=True)
        return self._trial(rate, started, done)

    def _trial(self, rate: float, started: float, done: Sequence[_Stream]) -> Trial:
        tokens = sum(self.workload.prompt_tokens + s.tokens for s in done)
        elapsed = max(s.chunks[-1] for s in done) - started
        ttft = sorted(s.ttft for s in done)
        return Trial(rate, tokens / elapsed, ttft[min(len(ttft) - 1, int(0.95 * len(ttft)))], len(done))
