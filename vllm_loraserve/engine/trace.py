"""What the scheduler did: totals since start, and one JSON line per step when asked for."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)

ROWS_BUCKETS = (0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SHARE_BUCKETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
FLUSH_S = 1.0


@dataclass(slots=True)
class StepCounters:
    """Totals since start; histograms count values up to each bucket's bound, the last entry those above all."""

    steps: int = 0
    lora_steps: int = 0
    admitted: int = 0
    overtakes: int = 0
    """Admissions past an older request whose adapter found no room."""
    drains: int = 0
    """Steps in which room was being made for an aged request."""
    cut_chunks: int = 0
    """Prefill chunks that the work budget made shorter."""
    held_prefills: int = 0
    """Prefills that the work budget kept out of a step."""
    failed_requests: int = 0
    limited_requests: int = 0
    oldest_wait_s: float = 0.0
    """Of the requests that wait for an adapter now."""
    rank_rows: list[int] = field(default_factory=lambda: [0] * (len(ROWS_BUCKETS) + 1))
    cost_share: list[int] = field(default_factory=lambda: [0] * (len(SHARE_BUCKETS) + 1))
    """LoRA work over base work, of steps with LoRA."""

    def observe(self, rows: int, share: float) -> None:
        """A step with adapters ran."""
        self.lora_steps += 1
        self.rank_rows[sum(rows > bound for bound in ROWS_BUCKETS)] += 1
        self.cost_share[sum(share > bound for bound in SHARE_BUCKETS)] += 1


class StepTrace:
    """Appends JSON lines to a file; a file that can't be written costs one warning, never a step."""

    def __init__(self, path: str) -> None:
        self._file: TextIO | None = None
        self._flushed = time.monotonic()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            logger.warning("loraserve-config: trace_schedule=%r can't be written: %s", path, error)

    def write(self, **values: Any) -> None:
        """One step."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(values, separators=(",", ":")) + "\n")
            if time.monotonic() - self._flushed > FLUSH_S:
                self._file.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            logger.warning("The schedule trace ends here: %s", error)
            self._file = None

    def close(self) -> None:
        """Writes what is left."""
        if self._file is not None:
            self._file.close()
            self._file = None
