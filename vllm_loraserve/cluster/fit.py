"""Fitting a step cost to measured steps.

`fit_step_cost` is non-negative least squares, weighted so that short steps count as much as long ones:
every coefficient is a cost, so a negative one could only be noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from scipy.optimize import nnls

from vllm_loraserve.cluster.operating_points import OperatingPointsError, StepCost

TERMS = (
    "base",
    "prefill_token",
    "prefill_token_rank",
    "decode_token",
    "decode_token_rank",
    "rank_row",
    "adapter",
    "context_token",
)


class StepSample(msgspec.Struct, frozen=True, kw_only=True):
    """One measured engine step: its totals (see `StepCost.seconds`) and how long it took."""

    seconds: float
    prefill_tokens: float = 0.0
    prefill_token_ranks: float = 0.0
    decode_tokens: float = 0.0
    decode_token_ranks: float = 0.0
    rank_rows: float = 0.0
    adapters: float = 0.0
    context_tokens: float = 0.0

    def totals(self) -> list[float]:
        """The row of the regression, in the order of TERMS."""
        return [
            1.0,
            self.prefill_tokens,
            self.prefill_token_ranks,
            self.decode_tokens,
            self.decode_token_ranks,
            self.rank_rows,
            self.adapters,
            self.context_tokens,
        ]


class Fit(msgspec.Struct, frozen=True):
    """A fitted step cost and its mean relative error on the samples it was fitted to."""

    cost: StepCost
    relative_error: float
    samples: int


def predict_step(cost: StepCost, sample: StepSample) -> float:
    """Seconds that `cost` predicts for the step of `sample`."""
    coefficients = [getattr(cost, t) for t in TERMS]
    return float(np.dot(coefficients, sample.totals()))


def fit_step_cost(samples: Sequence[StepSample]) -> Fit:
    """Step cost of measured steps; raises OperatingPointsError with fewer samples than coefficients."""
    usable = [s for s in samples if s.seconds > 0.0]
    if len(usable) < len(TERMS):
        raise OperatingPointsError(
            f"step cost: {len(usable)} usable samples for {len(TERMS)} coefficients; profile more steps"
        )
    x = np.array([s.totals() for s in usable])
    y = np.array([s.seconds for s in usable])
    weighted = x / y[:, None]
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    solution, _ = nnls(weighted / scale, np.ones(len(y)), maxiter=1000)
    coefficients = solution / scale
    error = float(np.mean(np.abs(weighted @ coefficients - 1.0)))
    return Fit(StepCost(**dict(zip(TERMS, coefficients.tolist(), strict=True))), error, len(usable))
