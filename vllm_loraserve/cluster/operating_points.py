"""What one instance sustains at a given rank (operating points) and what one engine step costs.

An **operating point** OP[r] is the number of tokens/s (prompt and output together) that one instance sustains
under the SLO when every request uses an adapter of rank r. Placement weighs demand by it: demand / OP[rank]
is the share of one instance that an adapter asks for.

The file written by `vllm-loraserve profile` holds measured points together with the fitted step cost, and
says which model, dtype, device and kernels they belong to. Without such a file `shipped_defaults()` is
used; it is derived from a roofline of one device, marked `measured=False`, and good enough only to rank
adapters against each other.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

FORMAT_VERSION = 1


class OperatingPointsError(ValueError):
    """An operating-point file or table that cannot be used; the message names the field and the fix."""


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """Linear cost of one engine step, in seconds per unit.

    time = base + prefill_token * P + prefill_token_rank * sum(prefill tokens x rank)
         + decode_token * D + decode_token_rank * sum(decode tokens x rank)
         + rank_row * (rank rows read) + adapter * (distinct adapters) + context_token * (KV tokens read)

    Which rank enters (the adapter's own, the batch's maximum or the configured maximum) is the business of
    the caller: it depends on the kernels.
    """

    base: float = 0.0
    prefill_token: float = 0.0
    prefill_token_rank: float = 0.0
    decode_token: float = 0.0
    decode_token_rank: float = 0.0
    rank_row: float = 0.0
    adapter: float = 0.0
    context_token: float = 0.0

    def seconds(
        self,
        *,
        prefill_tokens: float = 0.0,
        prefill_token_ranks: float = 0.0,
        decode_tokens: float = 0.0,
        decode_token_ranks: float = 0.0,
        rank_rows: float = 0.0,
        adapters: float = 0.0,
        context_tokens: float = 0.0,
    ) -> float:
        """Seconds of a step with these totals (`*_token_ranks`: sum over tokens of the rank each one
        pays)."""
        return (
            self.base
            + self.prefill_token * prefill_tokens
            + self.prefill_token_rank * prefill_token_ranks
            + self.decode_token * decode_tokens
            + self.decode_token_rank * decode_token_ranks
            + self.rank_row * rank_rows
            + self.adapter * adapters
            + self.context_token * context_tokens
        )


class OperatingPoints(msgspec.Struct, frozen=True, kw_only=True):
    """OP[r] in tokens/s for the ranks that were profiled, and where they come from.

    `points` maps rank -> tokens/s that one instance of speed 1.0 sustains. `at(rank)` interpolates the
    *cost* per token (1/OP) linearly in the rank, which is exact for the linear step cost, and extrapolates
    with the last slope. `measured` is False for the shipped defaults.
    """

    points: dict[int, float]
    step_cost: StepCost | None = None
    measured: bool = False
    model: str = ""
    dtype: str = ""
    device: str = ""
    tensor_parallel_size: int = 1
    kernels: str = ""
    slo: str = ""
    date: str = ""
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not self.points:
            raise OperatingPointsError("operating points: `points` is empty; profile at least one rank")
        for rank, tokens_per_s in self.points.items():
            if rank < 1 or not tokens_per_s > 0.0:
                raise OperatingPointsError(
                    f"operating points: rank {rank} has {tokens_per_s!r} tokens/s; both must be positive"
                )
        if self.version != FORMAT_VERSION:
            raise OperatingPointsError(
                f"operating points: file format version {self.version}, this release reads {FORMAT_VERSION}; "
                "run `vllm-loraserve profile` again"
            )

    def at(self, rank: int) -> float:
        """Tokens/s one instance of speed 1.0 sustains at `rank` (interpolated between the profiled ranks)."""
        if rank in self.points:
            return self.points[rank]
        ranks = sorted(self.points)
        if len(ranks) == 1:
            return self.points[ranks[0]]
        i = min(max(bisect.bisect_left(ranks, rank), 1), len(ranks) - 1)
        lo, hi = ranks[i - 1], ranks[i]
        cost_lo, cost_hi = 1.0 / self.points[lo], 1.0 / self.points[hi]
        cost = cost_lo + (cost_hi - cost_lo) * (rank - lo) / (hi - lo)
        # Extrapolating below the first rank may cross zero on noisy measurements; never promise more than
        # twice the best point.
        return 1.0 / max(cost, 0.5 * min(1.0 / v for v in self.points.values()))

    def utilisation(self, rank: int, tokens_per_s: float) -> float:
        """Share of one instance of speed 1.0 that `tokens_per_s` at `rank` asks for."""
        return tokens_per_s / self.at(rank)


def load(path: str | Path) -> OperatingPoints:
    """Reads a file written by `save`; raises OperatingPointsError naming the file and the bad field."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=OperatingPoints)
    except FileNotFoundError as e:
        raise OperatingPointsError(f"operating points: no file {path}; write one with `vllm-loraserve profile`") from e
    except msgspec.DecodeError as e:
        raise OperatingPointsError(f"operating points: {path} cannot be read: {e}") from e


def save(points: OperatingPoints, path: str | Path) -> None:
    """Writes the versioned JSON file that `load` reads."""
    Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(points), indent=2) + b"\n")


# One H100, an 8B Llama, all seven linear modules, rank-aware kernels. From a roofline, not measured:
# 5.24 MB per rank row at 3 TB/s, 16 GB of weights per step, 26.7 us of base GEMM per prompt token.
H100_8B_STEP_COST = StepCost(
    base=6.0e-3,
    prefill_token=2.67e-5,
    prefill_token_rank=1.5e-7,
    decode_token=8.0e-6,
    decode_token_rank=2.0e-8,
    rank_row=1.75e-6,
    adapter=3.0e-5,
    context_token=4.4e-8,
)

DEFAULT_RANKS: Sequence[int] = (4, 8, 16, 32, 64, 128, 256)


def points_from_step_cost(
    cost: StepCost,
    ranks: Iterable[int] = DEFAULT_RANKS,
    *,
    prompt_tokens: float = 1024.0,
    output_tokens: float = 200.0,
    adapters_per_step: float = 8.0,
    tokens_per_step: float = 2048.0,
    utilisation: float = 0.85,
) -> dict[int, float]:
    """OP[r] implied by a step cost for a homogeneous load of (prompt, output) tokens.

    The instance runs full chunked-prefill steps of `tokens_per_step` tokens, prompts and outputs in the
    proportion of the load, with `adapters_per_step` distinct adapters of rank r; `utilisation` is the share
    of its capacity that keeps the queue within the SLO.
    """
    total = prompt_tokens + output_tokens
    prefill = tokens_per_step * prompt_tokens / total
    decode = tokens_per_step - prefill
    out = {}
    for r in ranks:
        step = cost.seconds(
            prefill_tokens=prefill,
            prefill_token_ranks=prefill * r,
            decode_tokens=decode,
            decode_token_ranks=decode * r,
            rank_rows=adapters_per_step * r,
            adapters=adapters_per_step,
            context_tokens=decode * (prompt_tokens + output_tokens / 2),
        )
        out[r] = utilisation * tokens_per_step / step
    return out


def shipped_defaults() -> OperatingPoints:
    """Points used until somebody profiles; `measured` is False and every user of them should say so."""
    return OperatingPoints(
        points=points_from_step_cost(H100_8B_STEP_COST),
        step_cost=H100_8B_STEP_COST,
        measured=False,
        model="8B Llama (roofline)",
        dtype="bfloat16",
        device="H100 (roofline, not measured)",
        kernels="rank-aware",
        slo="none (85 % utilisation)",
        date="",
    )


def relative_costs(op: OperatingPoints, ranks: Iterable[int]) -> Mapping[int, float]:
    """Cost of a token at each rank relative to the cheapest one asked for (for tables and explanations)."""
    costs = {r: 1.0 / op.at(r) for r in ranks}
    least = min(costs.values(), default=1.0)
    return {r: c / least for r, c in costs.items()}
