"""Readers of request traces: Azure LLM 2023/2024 and other CSV files, Mooncake JSON lines, ServeGen output.

All give a `Trace` with times from zero. A file that cannot be understood raises TraceError with the line
and the fix.
"""

from __future__ import annotations

import csv
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np

from vllm_loraserve.simulator.workload import Trace

TIME_COLUMNS = ("timestamp", "time", "arrival", "arrival_time", "timestamp_s", "arrived_at")
PROMPT_COLUMNS = ("contexttokens", "input", "input_length", "prompt_tokens", "input_tokens", "request tokens")
OUTPUT_COLUMNS = ("generatedtokens", "output", "output_length", "output_tokens", "completion_tokens", "response tokens")
ADAPTER_COLUMNS = ("adapter", "client", "client_id", "lora", "function")


class TraceError(ValueError):
    """A trace file that cannot be read; the message names the file, the line and the fix."""


def read_trace(path: str | Path) -> Trace:
    """Reads a trace by its ending: `.jsonl` is Mooncake (or ServeGen JSON lines), everything else CSV."""
    path = Path(path)
    if not path.exists():
        raise TraceError(f"trace: no file {path}; give the path of a CSV or JSONL trace with --trace")
    rows = _jsonl_rows(path) if path.suffix in (".jsonl", ".json") else _csv_rows(path)
    if not rows:
        raise TraceError(f"trace: {path} has no requests")
    times = np.array([r[0] for r in rows])
    order = np.argsort(times, kind="stable")
    names = tuple(rows[i][3] for i in order) if rows[0][3] else None
    return Trace(
        path.stem,
        times[order] - times.min(),
        np.maximum(np.array([r[1] for r in rows], dtype=np.int64)[order], 1),
        np.maximum(np.array([r[2] for r in rows], dtype=np.int64)[order], 1),
        names,
    )


def _column(header: list[str], wanted: tuple[str, ...]) -> int | None:
    lower = [h.strip().lower() for h in header]
    return next((lower.index(w) for w in wanted if w in lower), None)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # Azure writes seven digits of fraction; datetime takes six.
        head, dot, fraction = text.strip().partition(".")
        digits = "".join(c for c in fraction if c.isdigit())[:6]
        moment = datetime.fromisoformat(head + (dot + digits if digits else ""))
        return (moment - datetime(1970, 1, 1)).total_seconds()


def _csv_rows(path: Path) -> list[tuple[float, int, int, str]]:
    with path.open(newline="") as f:
        reader = csv.reader(f)
        header = next(reader, [])
        columns = [_column(header, w) for w in (TIME_COLUMNS, PROMPT_COLUMNS, OUTPUT_COLUMNS)]
        if None in columns:
            raise TraceError(
                f"trace: {path} has the columns {', '.join(header)}; it needs a time, an input and an output column "
                f"(for example {TIME_COLUMNS[0]}, {PROMPT_COLUMNS[1]}, {OUTPUT_COLUMNS[1]})"
            )
        t, p, o = (c for c in columns if c is not None)
        a = _column(header, ADAPTER_COLUMNS)
        rows = []
        for line, row in enumerate(reader, start=2):
            if not row:
                continue
            try:
                rows.append((_seconds(row[t]), int(float(row[p])), int(float(row[o])), row[a] if a is not None else ""))
            except (ValueError, IndexError) as e:
                raise TraceError(f"trace: {path}, line {line}: {e}; expected time, input and output") from e
    return rows


def _jsonl_rows(path: Path) -> list[tuple[float, int, int, str]]:
    """Mooncake: timestamp in ms, input_length, output_length. ServeGen: timestamp in s, data.input_tokens."""
    rows = []
    for line, raw in enumerate(path.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            item = msgspec.json.decode(raw)
            if "input_length" in item:
                row = (float(item["timestamp"]) / 1000.0, item["input_length"], item["output_length"], "")
            else:
                data = item.get("data", item)
                client = str(item.get("client_id", item.get("client", "")))
                row = (float(item["timestamp"]), data["input_tokens"], data["output_tokens"], client)
            rows.append((row[0], int(row[1]), int(row[2]), row[3]))
        except (msgspec.DecodeError, KeyError, TypeError, ValueError) as e:
            raise TraceError(
                f"trace: {path}, line {line}: {e!r}; expected Mooncake (timestamp, input_length, output_length) or "
                "ServeGen (timestamp, data.input_tokens, data.output_tokens)"
            ) from e
    return rows
