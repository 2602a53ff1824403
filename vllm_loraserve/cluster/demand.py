"""Demand per adapter: windows of observed tokens/s, forecasts chosen by back-testing, bursts.

`DemandHistory` is fed with (adapter, tokens, time) or with whole instance reports; time is always passed
in. A forecaster maps the closed windows, an array [adapters, windows] of tokens/s with the oldest first, to
tokens/s of the next period. Which one fits the traffic is decided by `backtest` on the same windows, and
the choice is explained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Forecaster = Callable[[Array], Array]


def last_value(windows: Array) -> Array:
    """The last closed window."""
    return windows[:, -1].copy()


def ewma(windows: Array, alpha: float = 0.4) -> Array:
    """Exponentially weighted mean; `alpha` is the weight of the newest window."""
    n = windows.shape[1]
    weights = alpha * (1.0 - alpha) ** np.arange(n - 1, -1, -1)
    return windows @ (weights / weights.sum())


def linear_trend(windows: Array, last: int = 6) -> Array:
    """Least-squares line through the last windows, one window ahead, never below zero (the paper's
    "extrapolated recent history")."""
    w = windows[:, -last:]
    n = w.shape[1]
    if n < 3:
        return last_value(windows)
    t = np.arange(n) - (n - 1) / 2
    slope = (w @ t) / (t @ t)
    return np.maximum(w.mean(axis=1) + slope * ((n + 1) / 2), 0.0)


def robust(windows: Array) -> Array:
    """Median of last value, EWMA and trend: follows a drift, shrugs off one odd window."""
    return np.median(np.stack([last_value(windows), ewma(windows), linear_trend(windows)]), axis=0)


FORECASTERS: dict[str, Forecaster] = {
    "last": last_value,
    "ewma": ewma,
    "trend": linear_trend,
    "robust": robust,
}


class Backtest(msgspec.Struct, frozen=True):
    """Error of each forecaster on past windows: sum |forecast - observed| / sum observed; and the choice."""

    errors: dict[str, float]
    chosen: str
    origins: int

    def explain(self) -> str:
        """One line for a log or `explain`."""
        if not self.origins:
            return f"forecast by {self.chosen}: too little history to back-test"
        table = ", ".join(f"{n} {e:.1%}" for n, e in sorted(self.errors.items(), key=lambda kv: kv[1]))
        return f"forecast by {self.chosen}: back-tested error over {self.origins} periods: {table}"


def backtest(windows: Array, min_history: int = 3, default: str = "robust") -> Backtest:
    """Rolling-origin back-test of all forecasters on `windows`; the least error wins, `default` on a tie or
    when there is too little history (fewer than `min_history` + 2 windows)."""
    n = windows.shape[1]
    origins = range(min_history, n)
    total = float(windows[:, min_history:].sum())
    if n < min_history + 2 or total <= 0.0:
        return Backtest({}, default, 0)
    errors = {
        name: float(sum(np.abs(f(windows[:, :i]) - windows[:, i]).sum() for i in origins) / total)
        for name, f in FORECASTERS.items()
    }
    best = min(errors.values())
    chosen = default if errors[default] <= best * 1.02 else min(errors, key=lambda k: (errors[k], k))
    return Backtest(errors, chosen, len(origins))


class DemandHistory:
    """Windows of tokens per adapter.

    `window_s`: length of a window; `windows`: how many closed ones are kept. An adapter that was never seen
    has no demand; one that falls silent decays out of the windows and is forgotten when its last window
    leaves.
    """

    def __init__(self, window_s: float = 10.0, windows: int = 12) -> None:
        if not window_s > 0.0 or windows < 1:
            raise ValueError(f"demand: window_s={window_s} and windows={windows} must be positive")
        self.window_s = window_s
        self.windows = windows
        self.forecaster = "robust"
        self.last_backtest = Backtest({}, "robust", 0)
        self._index: dict[str, int] = {}
        self._tokens = np.zeros((0, windows + 1))
        self._current = 0
        self._started = False
        self._seen_windows = 0

    def add(self, adapter: str, tokens: float, now: float) -> None:
        """`tokens` (prompt + output) of `adapter` were asked for at `now` (seconds, any origin)."""
        self._roll(now)
        row = self._row(adapter)  # may grow the array
        self._tokens[row, -1] += tokens

    def add_report(self, tokens: Mapping[str, float], now: float) -> None:
        """A whole report of one instance: adapter -> tokens since its last report."""
        self._roll(now)
        for adapter, n in tokens.items():
            row = self._row(adapter)
            self._tokens[row, -1] += n

    def _row(self, adapter: str) -> int:
        row = self._index.get(adapter)
        if row is None:
            row = self._index[adapter] = len(self._index)
            if row >= len(self._tokens):
                grown = np.zeros((max(64, 2 * row), self.windows + 1))
                grown[: len(self._tokens)] = self._tokens
                self._tokens = grown
        return row

    def _roll(self, now: float) -> None:
        window = int(now // self.window_s)
        if not self._started:
            self._started, self._current = True, window
        steps = window - self._current
        if steps <= 0:
            return
        self._current = window
        self._seen_windows = min(self._seen_windows + steps, self.windows)
        steps = min(steps, self.windows + 1)
        self._tokens[:, :-steps] = self._tokens[:, steps:]
        self._tokens[:, -steps:] = 0.0
        alive = np.asarray(self._tokens[: len(self._index)].any(axis=1))
        if len(alive) > 64 and alive.mean() < 0.5:
            names = [n for n, row in self._index.items() if alive[row]]
            self._tokens = self._tokens[[self._index[n] for n in names]]
            self._index = {n: i for i, n in enumerate(names)}

    def rates(self, now: float) -> tuple[list[str], Array]:
        """Names and tokens/s [adapters, closed windows], oldest first; only windows since the first
        report."""
        self._roll(now)
        n = max(self._seen_windows, 0)
        return list(self._index), self._tokens[: len(self._index), self.windows - n : self.windows] / self.window_s

    def forecast(self, now: float, forecaster: str | None = None) -> dict[str, float]:
        """Tokens/s expected of each adapter in the next window. Before the first window closes, the running
        one is used. `forecaster`: a name of FORECASTERS; None: the one that back-tests best."""
        names, rates = self.rates(now)
        if not names:
            return {}
        if not rates.shape[1]:
            elapsed = max(now - self._current * self.window_s, 0.1 * self.window_s)
            return dict(zip(names, (self._tokens[: len(names), -1] / elapsed).tolist(), strict=True))
        if forecaster is None:
            self.last_backtest = backtest(rates)
            forecaster = self.last_backtest.chosen
        self.forecaster = forecaster
        return dict(zip(names, FORECASTERS[forecaster](rates).tolist(), strict=True))

    def bursts(self, now: float, expected: Mapping[str, float], factor: float = 2.0, share: float = 0.05) -> list[str]:
        """Adapters whose running window asks for more than `factor` times what placement `expected` of them
        and for at least `share` of all traffic more than expected: reason enough for an early rebalance.

        The running window must be a quarter old, so that one request is not a burst.
        """
        self._roll(now)
        elapsed = now - self._current * self.window_s
        if elapsed < 0.25 * self.window_s or not self._index:
            return []
        running = self._tokens[: len(self._index), -1] / elapsed
        floor = share * max(float(running.sum()), sum(expected.values()))
        out = []
        for name, row in self._index.items():
            before = expected.get(name, 0.0)
            if running[row] > factor * before and running[row] - before > floor:
                out.append(name)
        return out
