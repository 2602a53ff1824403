"""Which goals a result of `gpu_lora_kernels.py` meets.

    python benchmarks/gpu_lora_goals.py benchmarks/results/gpu_lora_kernels.json

prints the verdicts anew from a stored result and writes them into it. Ratios are stock's time divided by ours. Every
goal is judged on all figures that the result holds for it, by the worst of them.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Figures = dict[str, float]
"""Figures by the case that they are of."""

FLAT = 1.15
"""What still counts as flat: the largest over the smallest time of ours."""
MIXED_DECODE = ("D1", "D2")
"""Batches with 16 adapters of mixed ranks."""
MANY_DECODE = ("D1", "D2", "D3")
ONE_ADAPTER = ("D4", "D5", "P1")
PREFILL = ("P1", "P2")


def judge(result: Row) -> list[Row]:
    """One entry for each goal: `goal`, `at_least` or `at_most`, `value` and `where` (the worst figure and its case),
    `figures` (how many there are), `met` (True, False or "not run")."""
    rows: dict[str, list[Row]] = {
        name: result.get(name, []) if result.get("measured") else []
        for name in ("linears", "step", "slots", "interference")
    }
    middle = list(ratios(rows["linears"], MANY_DECODE, "stock tuned").values())
    return [
        at_least("one adapter of the rank that stock is set to: each linear", 0.95, own_rank_ratios(rows["linears"])),
        at_least("decode step, 16 mixed adapters: tuned stock", 1.4, ratios(rows["step"], MIXED_DECODE, "stock tuned")),
        at_least("decode step, 16 mixed adapters: default stock", 1.8, ratios(rows["step"], MIXED_DECODE, "stock")),
        at_least("prefill step: tuned stock", 1.05, ratios(rows["step"], PREFILL, "stock tuned")),
        at_least("prefill, each linear: tuned stock", 1.05, ratios(rows["linears"], PREFILL, "stock tuned")),
        at_most("flat in the number of slots", FLAT, growth(rows["slots"])),
        at_most("flat when one adapter among small ones grows", FLAT, growth(rows["interference"])),
        # Below this, kernels are not where time should go: memory is.
        at_least("median of D1..D3, each linear: tuned stock", 1.15, {"": statistics.median(middle)} if middle else {}),
    ]


def of_batches(rows: Iterable[Row], prefixes: tuple[str, ...]) -> list[tuple[str, Row]]:
    """The rows of these batches, with the name of each case."""
    return [(f"{r['model']} {r['layer']}, {r['batch']}", r) for r in rows if r["batch"].startswith(prefixes)]


def ratios(rows: Iterable[Row], prefixes: tuple[str, ...], side: str) -> Figures:
    return {name: row["ratio"][side] for name, row in of_batches(rows, prefixes)}


def own_rank_ratios(rows: Iterable[Row]) -> Figures:
    """Against the fastest stock side that pads nothing: in D5 all of them, else the one at the batch's own rank."""
    return {
        name: min(row["ratio"].values()) if row["batch"].startswith("D5") else row["ratio"]["stock at own rank"]
        for name, row in of_batches(rows, ONE_ADAPTER)
    }


def growth(rows: Iterable[Row]) -> Figures:
    """Per linear, the largest over the smallest time of ours along a curve of at least two points."""
    curves: dict[str, list[float]] = {}
    for row in rows:
        curves.setdefault(f"{row['model']} {row['layer']}", []).append(row["us"]["ours"])
    return {name: max(times) / min(times) for name, times in curves.items() if len(times) > 1}


def at_least(goal: str, bar: float, figures: Figures) -> Row:
    where = min(figures, key=figures.__getitem__, default=None)
    return _verdict({"goal": goal, "at_least": bar}, figures, where, where is not None and figures[where] >= bar)


def at_most(goal: str, bar: float, figures: Figures) -> Row:
    where = max(figures, key=figures.__getitem__, default=None)
    return _verdict({"goal": goal, "at_most": bar}, figures, where, where is not None and figures[where] <= bar)


def _verdict(goal: Row, figures: Figures, where: str | None, met: bool) -> Row:
    if where is None:
        return goal | {"value": None, "where": None, "figures": 0, "met": "not run"}
    return goal | {"value": figures[where], "where": where, "figures": len(figures), "met": met}


def lines(verdicts: Iterable[Row]) -> list[str]:
    """The verdicts for people."""
    words = {True: "met", False: "MISSED", "not run": "not run"}
    found = []
    for verdict in verdicts:
        bar = f">= {verdict['at_least']}" if "at_least" in verdict else f"<= {verdict['at_most']}"
        value = "" if verdict["value"] is None else f"{verdict['value']:.2f} {verdict['where']}".rstrip()
        found.append(f"{words[verdict['met']]:8}{verdict['goal']} {bar}  {value}".rstrip())
    return found


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: gpu_lora_goals.py RESULT.json", file=sys.stderr)
        return 2
    file = Path(sys.argv[1])
    result = json.loads(file.read_text())
    result["goals"] = judge(result)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines(result["goals"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
