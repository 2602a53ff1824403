"""One vLLM instance as this router sees it: where it is, what it is doing, whether it can be trusted just now.

The circuit breaker is closed while requests succeed. A lost or refused connection opens it for `FIRST_PAUSE_S`,
doubled with every further failure up to `LONGEST_PAUSE_S`; after the pause one request is let through to try, and
its success closes the breaker. `ERRORS_IN_A_ROW` answers of 500 with no other answer between them open it too: an API
server outlives its engine and, always idle, would draw all requests. One such answer may be the request's own fault. A
503 is no such error: the instance is there, and serves the request when it can.
"""

from __future__ import annotations

import asyncio

from vllm_loraserve.coordinator.messages import InstanceEntry
from vllm_loraserve.router.ledger import Ledger

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
ERRORS_IN_A_ROW = 3
ERRORS = frozenset((500, 502, 504))


class Upstream:
    """An instance and this router's own counts of it. Times are of the caller's monotonic clock, in seconds."""

    __slots__ = (
        "attempts",
        "entry",
        "epoch",
        "errors",
        "failures",
        "gone",
        "in_flight",
        "ledger",
        "opened_until",
        "trial",
        "url",
    )

    def __init__(self, entry: InstanceEntry, epoch: int = 0) -> None:
        self.entry = entry
        self.url = entry.url.rstrip("/")
        self.in_flight = 0
        self.ledger = Ledger()
        self.failures = 0
        self.errors = 0
        """Answers of 500 since the last that was none."""
        self.opened_until = 0.0
        self.trial = False
        self.epoch = epoch
        """Of the last table that listed it."""
        self.gone = False
        """Out of the table, or draining: no new requests; those that run may finish."""
        self.attempts: set[Attempt] = set()

    @property
    def name(self) -> str:
        """The instance's name in the cluster."""
        return self.entry.name

    def available(self, now: float) -> bool:
        """Whether a request may go there: in the table and the breaker closed, or open and due for a trial."""
        return not self.gone and (self.failures == 0 or (now >= self.opened_until and not self.trial))

    def load(self) -> float:
        """Requests there, the larger of what it reports (all routers, a heartbeat old) and what we sent (now)."""
        reported = self.entry.load.running + self.entry.load.waiting
        return float(reported if reported > self.in_flight else self.in_flight)

    def started(self) -> None:
        """A request is sent: counts it, and takes the trial of an open breaker."""
        self.in_flight += 1
        if self.failures:
            self.trial = True

    def finished(self) -> None:
        """A request is over, however it ended."""
        self.in_flight -= 1
        self.trial = False

    def answered(self, status: int, now: float) -> None:
        """The instance answered with this HTTP status: the breaker closes, or opens after so many errors in a row."""
        if status not in ERRORS:
            self.failures = self.errors = 0
            return
        self.errors += 1
        if self.failures or self.errors >= ERRORS_IN_A_ROW:
            self.failed(now)

    def failed(self, now: float) -> None:
        """The connection was refused, timed out or died: the breaker opens, or stays open for longer."""
        if now < self.opened_until:
            return  # requests that were under way when it died tell nothing new
        self.failures += 1
        self.opened_until = now + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self.failures - 1))


class Attempt:
    """One request under way to one instance, so that it can be called back when the instance is declared dead."""

    __slots__ = ("called_back", "last_byte", "task")

    def __init__(self, task: asyncio.Task[object], now: float) -> None:
        self.task = task
        self.last_byte = now
        """Since when the instance is waited for; infinite while the client is."""
        self.called_back = False

    def call_back(self) -> None:
        """Makes the attempt fail as if its connection had died."""
        if not self.called_back:
            self.called_back = True
            self.task.cancel("instance declared dead")
