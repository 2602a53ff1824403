"""Questions answered by many runs: the highest request rate within the SLO, the fewest instances for a
load."""

from __future__ import annotations

from collections.abc import Callable

from vllm_loraserve.simulator.results import Result
from vllm_loraserve.simulator.simulation import Abort

Probe = Callable[[float, Abort | None], Result]
"""(requests/s or number of servers, abort rule) -> result."""


def max_rate(
    probe: Probe,
    ttft_s: float,
    *,
    guess: float,
    tolerance: float = 0.02,
    lowest: float = 0.05,
    q: float = 95.0,
    step: float = 1.3,
) -> float:
    """Highest request rate at which percentile `q` of TTFT stays within `ttft_s` seconds; 0.0 if not even
    `lowest` times `guess` does.

    Brackets from `guess` by the factor `step`, squared each time until it is 1.3 or more (a good guess wants a small
    one), then bisects (geometrically) to `tolerance`. Runs that fail are cut short.
    """
    abort = Abort(ttft_s, 1.0 - q / 100.0)

    def good(rate: float) -> bool:
        return probe(rate, abort).meets(ttft_s, q)

    low, high = 0.0, 0.0
    rate = guess
    if good(rate):
        while True:
            low, rate = rate, rate * step
            if not good(rate):
                high = rate
                break
            if rate > 1000.0 * guess:
                return rate
            step = step if step >= 1.3 else step**2
    else:
        while True:
            high, rate = rate, rate / step
            if rate < lowest * guess:
                return 0.0
            if good(rate):
                low = rate
                break
            step = step if step >= 1.3 else step**2
    while high / low > 1.0 + tolerance:
        middle = (low * high) ** 0.5
        if good(middle):
            low = middle
        else:
            high = middle
    return low


def fewest_servers(
    probe: Callable[[int, Abort | None], Result], ttft_s: float, *, most: int = 64, start: int = 1, q: float = 95.0
) -> int:
    """Fewest servers (from `start` on) with percentile `q` of TTFT within `ttft_s`; 0 when `most` are not
    enough.

    Doubles until it holds, then bisects.
    """
    abort = Abort(ttft_s, 1.0 - q / 100.0)
    low, high = start - 1, max(start, 1)
    while not probe(high, abort).meets(ttft_s, q):
        if high >= most:
            return 0
        low, high = high, min(high * 2, most)
    while high - low > 1:
        middle = (low + high) // 2
        if probe(middle, abort).meets(ttft_s, q):
            high = middle
        else:
            low = middle
    return high
