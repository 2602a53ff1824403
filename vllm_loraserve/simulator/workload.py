"""Workloads: who asks for which adapter, when, and how long; all synthetic parts from one seed.

Lengths (and for replays arrival times) come from a trace of (time, prompt tokens, output tokens); no public
LLM trace names adapters, so adapter popularity is always synthesised here, and every report says so.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from vllm_loraserve.cluster.placement import AdapterSpec
from vllm_loraserve.simulator.machine import Machine

PAPER_RANKS = (8, 16, 32, 64, 128)
ARRIVALS = ("uniform", "poisson")
POPULARITIES = ("uniform", "shifting-skew", "exponential")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Trace(msgspec.Struct, frozen=True):
    """Requests without adapters: arrival [n] seconds from 0, ascending; prompt and output tokens [n];
    `adapters` [n] names, where the trace has them."""

    name: str
    arrival: Floats
    prompt: Ints
    output: Ints
    adapters: tuple[str, ...] | None = None

    def around(self, start: int, count: int) -> Trace:
        """`count` requests from number `start` on, times from 0; after the last one it goes on with the first."""
        n = len(self.arrival)
        index = start + np.arange(count)
        lap = float(self.arrival[-1]) * (1.0 + 1.0 / max(n - 1, 1))  # the first comes a mean gap after the last
        arrival = self.arrival[index % n] + lap * (index // n)
        names = tuple(self.adapters[i % n] for i in index) if self.adapters is not None else None
        return Trace(self.name, arrival - arrival[0], self.prompt[index % n], self.output[index % n], names)


class Workload(msgspec.Struct, frozen=True):
    """What the simulator runs: `adapter` [n] indexes `adapters`; arrival in seconds, ascending."""

    name: str
    adapters: list[AdapterSpec]
    arrival: Floats
    adapter: Ints
    prompt: Ints
    output: Ints
    session: Ints | None = None

    @property
    def rate(self) -> float:
        """Requests/s offered on average."""
        return len(self.arrival) / max(float(self.arrival[-1]), 1e-9) if len(self.arrival) else 0.0

    def scaled(self, rate: float) -> Workload:
        """The same requests with times stretched linearly to `rate` requests/s (lengths and burstiness
        kept)."""
        return msgspec.structs.replace(self, arrival=self.arrival * (self.rate / rate))


def synthetic_lengths(n: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Prompt and output tokens like a chat service's (log-normal; means about 1,000 and 200), for runs
    without a trace file."""
    prompt = np.clip(rng.lognormal(6.5, 0.95, n), 8, 4096).astype(np.int64)
    output = np.clip(rng.lognormal(5.0, 0.8, n), 4, 1000).astype(np.int64)
    return prompt, output


def synthetic_trace(n: int = 20_000, rate: float = 5.5, seed: int = 0) -> Trace:
    """A Poisson trace with `synthetic_lengths`."""
    rng = np.random.default_rng([seed, 77])
    prompt, output = synthetic_lengths(n, rng)
    return Trace("synthetic", np.cumsum(rng.exponential(1.0 / rate, n)), prompt, output)


def _stream(*what: int) -> np.random.Generator:
    """Random numbers of one purpose. Each has its own, so that a higher rate of the same seed means the same requests
    and more of them: two rates, or two systems, are compared on common random numbers."""
    return np.random.default_rng(what)


def _lengths(trace: Trace, n: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    pick = rng.integers(0, len(trace.prompt), n)
    return trace.prompt[pick], trace.output[pick]


def adapters_of_ranks(machine: Machine, per_rank: int, ranks: tuple[int, ...] = PAPER_RANKS) -> list[AdapterSpec]:
    """`per_rank` adapters of each rank; names carry rank and number."""
    return [machine.adapter(f"r{r}-{i}", r) for r in ranks for i in range(per_rank)]


def rank_popularity(kind: str, progress: Floats, ranks: int) -> Floats:
    """Probability of each rank at each request: [n, ranks]; `progress` in [0, 1) is the place in the run.

    "uniform"; "exponential": halves with each larger rank; "shifting-skew": a hot spot of about 60 % of the
    load that wanders from the largest rank to the smallest and back.
    """
    position = np.arange(ranks)
    if kind == "uniform":
        weights = np.ones((len(progress), ranks))
    elif kind == "exponential":
        weights = np.tile(0.5**position, (len(progress), 1))
    elif kind == "shifting-skew":
        centre = (ranks - 1) * np.abs(1.0 - 2.0 * progress)  # largest -> smallest -> largest
        weights = np.exp(-(((position[None, :] - centre[:, None]) / 0.7) ** 2)) + 0.08
    else:
        raise ValueError(f"unknown rank popularity {kind!r}; known: {', '.join(POPULARITIES)}")
    return weights / weights.sum(axis=1, keepdims=True)


def _pick(probabilities: Floats, rng: np.random.Generator) -> Ints:
    """One draw per row of `probabilities` [n, k]."""
    edges = np.cumsum(probabilities, axis=1)
    return (rng.random(len(edges))[:, None] > edges[:, :-1]).sum(axis=1).astype(np.int64)


def paper_workload(
    machine: Machine,
    arrivals: str,
    popularity: str,
    rate: float,
    duration_s: float,
    seed: int,
    trace: Trace,
    per_rank: int = 5,
) -> Workload:
    """One of the paper's six: {uniform, Poisson} arrivals x {uniform, shifting-skew, exponential} rank
    popularity, 25 adapters of ranks 8..128 (uniform inside a rank), lengths drawn from `trace`."""
    if arrivals not in ARRIVALS:
        raise ValueError(f"unknown arrivals {arrivals!r}; known: {', '.join(ARRIVALS)}")
    n = max(int(rate * duration_s), 1)
    gaps = np.full(n, 1.0) if arrivals == "uniform" else _stream(seed, 1, 1).exponential(1.0, n)
    arrival = np.cumsum(gaps) * (duration_s / gaps.sum())
    rank = _pick(rank_popularity(popularity, arrival / duration_s, len(PAPER_RANKS)), _stream(seed, 1, 2))
    prompt, output = _lengths(trace, n, _stream(seed, 1, 3))
    return Workload(
        f"{arrivals}-{popularity}",
        adapters_of_ranks(machine, per_rank),
        arrival,
        rank * per_rank + _stream(seed, 1, 4).integers(0, per_rank, n),
        prompt,
        output,
    )


def power_law(n: int, alpha: float = 1.0) -> Floats:
    """Popularity [n] proportional to 1 / (i + 1)^alpha."""
    weights = 1.0 / np.arange(1, n + 1) ** alpha
    return weights / weights.sum()


def replay(machine: Machine, trace: Trace, rate: float, n_adapters: int, seed: int, drift: bool = True) -> Workload:
    """A trace replayed: its times (scaled linearly to `rate`), its lengths; each request gets a rank whose
    popularity drifts, and inside the rank an adapter by a power law (the paper's way to 50/100/200
    adapters).

    Rank popularity is a log random walk over 8 pieces of the run, the in-rank order a random permutation
    per seed.
    """
    rng = _stream(seed, 2, n_adapters, 0)
    ranks = len(PAPER_RANKS)
    per_rank = max(n_adapters // ranks, 1)
    n = len(trace.arrival)
    pieces = 8
    walk = rng.normal(0.0, 0.6, (pieces, ranks))
    walk[1:] *= 0.6 if drift else 0.0
    logits = np.cumsum(walk, axis=0)
    logits -= logits.mean(axis=1, keepdims=True)
    logits = np.clip(logits, -1.6, 1.6)
    piece = np.minimum((np.arange(n) * pieces) // max(n, 1), pieces - 1)
    weights = np.exp(logits)[piece]
    order = np.stack([rng.permutation(per_rank) for _ in range(ranks)])
    rank = _pick(weights / weights.sum(axis=1, keepdims=True), _stream(seed, 2, n_adapters, 1))
    inside = _stream(seed, 2, n_adapters, 2).choice(per_rank, n, p=power_law(per_rank))
    span = float(trace.arrival[-1]) if n else 1.0
    return Workload(
        f"replay-{n_adapters}",
        adapters_of_ranks(machine, per_rank),
        trace.arrival * (n / rate / max(span, 1e-9)),
        rank * per_rank + order[rank, inside],
        trace.prompt,
        trace.output,
    )


def named_replay(machine: Machine, trace: Trace, rate: float, seed: int) -> Workload:
    """A trace that names its adapters or clients (ServeGen, or a CSV with such a column): one adapter for each, ranks
    drawn at random from the paper's five."""
    if trace.adapters is None:
        raise ValueError(f"trace {trace.name!r} has no adapter column; use `replay`")
    rng = np.random.default_rng([seed, 3])
    names = sorted(set(trace.adapters))
    ranks = rng.choice(PAPER_RANKS, len(names))
    index = {name: i for i, name in enumerate(names)}
    n = len(trace.arrival)
    return Workload(
        f"replay-{trace.name}",
        [machine.adapter(name, int(r)) for name, r in zip(names, ranks, strict=True)],
        trace.arrival * (n / rate / max(float(trace.arrival[-1]), 1e-9)),
        np.array([index[a] for a in trace.adapters], dtype=np.int64),
        trace.prompt,
        trace.output,
    )


def zipf(
    machine: Machine, n_adapters: int, rate: float, duration_s: float, seed: int, trace: Trace, alpha: float = 1.0
) -> Workload:
    """Poisson arrivals, Zipf popularity over `n_adapters` whose ranks are drawn 40/25/15/12/8 % from
    8..128."""
    n = max(int(rate * duration_s), 1)
    ranks = _stream(seed, 4, n_adapters, 0).choice(PAPER_RANKS, n_adapters, p=(0.4, 0.25, 0.15, 0.12, 0.08))
    arrival = np.cumsum(_stream(seed, 4, n_adapters, 1).exponential(1.0, n))
    prompt, output = _lengths(trace, n, _stream(seed, 4, n_adapters, 2))
    return Workload(
        f"zipf-{n_adapters}",
        [machine.adapter(f"z{i}", int(r)) for i, r in enumerate(ranks)],
        arrival * (duration_s / arrival[-1]),
        _stream(seed, 4, n_adapters, 3).choice(n_adapters, n, p=power_law(n_adapters, alpha)),
        prompt,
        output,
    )


def burst(
    machine: Machine, n_adapters: int, rate: float, duration_s: float, seed: int, trace: Trace, share: float = 0.5
) -> Workload:
    """Bursts over a long tail: adapters of the paper's five ranks (equal numbers), Zipf popularity inside
    each rank; ten bursts back to back, in each of which one random adapter makes `share` of all
    requests."""
    rng = _stream(seed, 5, n_adapters, 0)
    per_rank = max(n_adapters // len(PAPER_RANKS), 1)
    adapters = adapters_of_ranks(machine, per_rank)
    n = max(int(rate * duration_s), 1)
    arrival = np.cumsum(_stream(seed, 5, n_adapters, 1).exponential(1.0, n))
    arrival *= duration_s / arrival[-1]
    prompt, output = _lengths(trace, n, _stream(seed, 5, n_adapters, 2))
    order = np.stack([rng.permutation(per_rank) for _ in PAPER_RANKS])
    rank = _stream(seed, 5, n_adapters, 3).integers(0, len(PAPER_RANKS), n)
    inside = _stream(seed, 5, n_adapters, 4).choice(per_rank, n, p=power_law(per_rank))
    adapter = rank * per_rank + order[rank, inside]
    joins = _stream(seed, 5, n_adapters, 5).random(n) < share
    for k in range(10):
        now = (arrival >= k * duration_s / 10) & (arrival < (k + 1) * duration_s / 10)
        adapter[now & joins] = int(rng.integers(0, len(adapters)))
    return Workload(f"burst-{n_adapters}", adapters, arrival, adapter, prompt, output)


def churn(machine: Machine, n_adapters: int, rate: float, duration_s: float, seed: int, trace: Trace) -> Workload:
    """Adapters come and go: at any time a tenth of them is active (Zipf among them), and the active set
    slides over all of them during the run."""
    base = zipf(machine, n_adapters, rate, duration_s, seed, trace)
    rng = _stream(seed, 6, n_adapters, 0)
    active = max(n_adapters // 10, 1)
    n = len(base.arrival)
    first = (base.arrival / duration_s * (n_adapters - active)).astype(np.int64)
    # Popularity inside the active set belongs to the adapter, not to its place in the sliding window.
    score = rng.permutation(n_adapters)
    inside = _stream(seed, 6, n_adapters, 1).choice(active, n, p=power_law(active))
    adapter = np.empty(n, dtype=np.int64)
    for start in np.unique(first):
        here = first == start
        window = np.arange(start, start + active)
        adapter[here] = window[np.argsort(score[window])][inside[here]]
    return msgspec.structs.replace(base, name=f"churn-{n_adapters}", adapter=adapter)
