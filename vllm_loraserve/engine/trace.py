"""What the scheduler did: totals since start, and one JSON line per step when asked for."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.v1.request import Request

logger = logging.getLogger(__name__)

ROWS_BUCKETS = (0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SHARE_BUCKETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
FLUSH_S, FLUSH_BYTES = 1.0, 1 << 16


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
    rank_rows_sum: int = 0
    cost_share: list[int] = field(default_factory=lambda: [0] * (len(SHARE_BUCKETS) + 1))
    """LoRA work over base work, of steps with LoRA."""
    cost_share_sum: float = 0.0

    def observe(self, rows: int, share: float) -> None:
        """A step with adapters ran."""
        self.lora_steps += 1
        self.rank_rows[sum(rows > bound for bound in ROWS_BUCKETS)] += 1
        self.rank_rows_sum += rows
        self.cost_share[sum(share > bound for bound in SHARE_BUCKETS)] += 1
        self.cost_share_sum += share


def work_of(
    scheduled: Mapping[str, int], requests: Mapping[str, Request], rank_of: Callable[[Request], int]
) -> dict[str, Any]:
    """What a step computes: its tokens by adapter, and the totals of the step cost (`cluster.fit.StepSample`) that
    tokens make. `scheduled`: request -> tokens of it in the step."""
    by_adapter: dict[int, int] = {}
    totals = dict.fromkeys(
        ("prefill_tokens", "prefill_token_ranks", "decode_tokens", "decode_token_ranks", "context_tokens"), 0
    )
    for request_id, count in scheduled.items():
        request = requests[request_id]
        rank = rank_of(request)
        if request.lora_request is not None:
            adapter = request.lora_request.lora_int_id
            by_adapter[adapter] = by_adapter.get(adapter, 0) + count
        # What is scheduled counts as computed already.
        decode = request.num_computed_tokens - count >= request.num_prompt_tokens
        kind = "decode" if decode else "prefill"
        totals[f"{kind}_tokens"] += count
        totals[f"{kind}_token_ranks"] += count * rank
        totals["context_tokens"] += request.num_computed_tokens if decode else 0
    return {"lora_tokens": by_adapter, **totals}


class StepTrace:
    """Appends JSON lines to a file; a file that can't be written costs one warning, never a step.

    Several engines may append to one file: each writes whole lines, in one piece. `common`: fields of every line.
    """

    def __init__(self, path: str, **common: Any) -> None:
        self._file: int | None = None
        self._common, self._lines = common, bytearray()
        self._flushed = time.monotonic()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            logger.warning("loraserve-config: trace_schedule=%r can't be written: %s", path, error)

    def write(self, **values: Any) -> None:
        """One step."""
        if self._file is None:
            return
        self._lines += json.dumps(self._common | values, separators=(",", ":")).encode() + b"\n"
        if time.monotonic() - self._flushed > FLUSH_S or len(self._lines) > FLUSH_BYTES:
            self._flush(self._file)

    def _flush(self, file: int) -> None:
        self._flushed = time.monotonic()
        try:
            # In append mode one write of a regular file is never mixed with another's; only a full disk cuts it short.
            if os.write(file, self._lines) < len(self._lines):
                raise OSError("not all of it could be written")
        except OSError as error:
            logger.warning("The schedule trace ends here: %s", error)
            os.close(file)
            self._file = None
        self._lines.clear()

    def close(self) -> None:
        """Writes what is left."""
        if self._file is not None:
            self._flush(self._file)
        if self._file is not None:
            os.close(self._file)
            self._file = None
