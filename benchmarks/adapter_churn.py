"""Steady traffic on resident adapters while cold adapters of rank 128 are asked for all the time: vLLM and ours.

Two warm adapters of rank 8 are decoded without pause, four requests at a time, and asked for anew every half second
(their TTFT is measured); meanwhile one client asks for one cold adapter of rank 128 after the other, out of four times
as many adapters as there are slots. Phases (calm, churn, and all-warm at uniform rank 8 for throughput) alternate
between the two servers; a phase's first seconds are not counted.

Stock vLLM on a CPU gathers a padded weight matrix for every token, so its absolute figures here say little about a GPU;
its own calm phase is what its gaps are compared with.

    python benchmarks/adapter_churn.py --model DIR --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table
from served import Seen, make_adapter, percentile, servers, stamp, stream, write_json

SLOTS, COLD_RANK, WARM_RANK = 4, 128, 8
COLD = [f"cold{i}" for i in range(4 * SLOTS - 2)]
WARM = ["warm0", "warm1"]
UNIFORM = ["warm0", "warm1", "warm2", "warm3"]
SKIP_S = 2.0


async def phase(url: str, kind: str, seconds: float, rng: random.Random) -> dict[str, Seen]:
    """One phase on one server: what the steady, the probing and the cold clients saw after its first seconds."""
    until = time.monotonic() + SKIP_S + seconds
    counted = (until - seconds, until)
    seen = {"steady": Seen(), "probe": Seen(), "cold": Seen()}
    cold = itertools.cycle(rng.sample(COLD, len(COLD)))

    def prompt(length: int) -> list[int]:
        return [rng.randrange(100, 40000) for _ in range(length)]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:

        async def steady(name: str) -> None:
            while time.monotonic() < until:
                await stream(session, url, name, prompt(16), 400, seen["steady"], until, counted)

        async def probe() -> None:
            for number in itertools.count():
                await asyncio.sleep(0.5)
                if time.monotonic() > until:
                    return
                await stream(session, url, WARM[number % 2], prompt(32), 2, seen["probe"], until + 60, counted)

        async def churn() -> None:
            while time.monotonic() < until:
                await stream(session, url, next(cold), prompt(16), 4, seen["cold"], until + 60, counted)

        names = UNIFORM if kind == "uniform" else [WARM[i % 2] for i in range(4)]
        jobs = [steady(name) for name in names]
        if kind != "uniform":
            jobs.append(probe())
        if kind == "churn":
            jobs.append(churn())
        await asyncio.gather(*jobs)
    return seen


async def run(model: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """All phases on both servers; the figures."""
    rng = random.Random(7)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapters = {name: make_adapter(model, folder / name, COLD_RANK, i) for i, name in enumerate(COLD)}
        adapters |= {name: make_adapter(model, folder / name, WARM_RANK, 100 + i) for i, name in enumerate(UNIFORM)}
        common = ["--max-loras", str(SLOTS), "--max-cpu-loras", str(SLOTS + 2), "--max-lora-rank", str(COLD_RANK)]
        sides = {"stock": ["--enable-lora", *common], "ours": ["--enable-loraserve", *common]}
        seen: dict[tuple[str, str], dict[str, Seen]] = {}
        async with servers(model, adapters, sides, folder) as urls:
            for side, url in urls.items():
                for kind in ("calm", "uniform"):
                    await phase(url, kind, 2, rng)
                print(f"{side} is warm", flush=True)
            for number in range(rounds):
                for kind in ("calm", "churn", "uniform"):
                    order = list(urls) if number % 2 else list(urls)[::-1]
                    for side in order:
                        result = await phase(urls[side], kind, seconds, rng)
                        into = seen.setdefault((side, kind), {name: Seen() for name in result})
                        for name, part in result.items():
                            into[name].add(part)
            if os.environ.get("LORASERVE_KEEP_LOGS"):
                for side in urls:
                    print((folder / f"{side}.log").read_text()[-6000:])
    return figures(seen, seconds * rounds)


def figures(seen: dict[tuple[str, str], dict[str, Seen]], seconds: float) -> dict[str, Any]:
    """The ratios of the issue and what they are made of."""
    table = Table("phase", "side", "gap p50 ms", "gap p99 ms", "warm TTFT p95 ms", "tokens/s", "cold done", "errors")
    rows: dict[str, dict[str, float]] = {}
    for (side, kind), parts in sorted(seen.items()):
        tokens = sum(part.tokens for part in parts.values())
        row = {
            "gap_p50_ms": percentile(parts["steady"].gaps, 50) * 1e3,
            "gap_p99_ms": percentile(parts["steady"].gaps, 99) * 1e3,
            "warm_ttft_p95_ms": percentile(parts["probe"].ttft, 95) * 1e3 if parts["probe"].ttft else 0.0,
            "tokens_per_s": tokens / seconds,
            "cold_requests": parts["cold"].requests,
            "errors": sum(len(part.errors) for part in parts.values()),
        }
        rows[f"{kind}_{side}"] = row = {name: round(value, 2) for name, value in row.items()}
        table.add_row(kind, side, *(f"{value:g}" for value in row.values()))
    Console().print(table)

    def ratio(name: str, above: str, below: str) -> float | None:
        """None when a phase was too short to have the figure."""
        over, under = rows[above][name], rows[below][name]
        return round(over / under, 3) if over and under else None

    return {
        "gap_p99_ratio_ours": ratio("gap_p99_ms", "churn_ours", "calm_ours"),
        "gap_p99_ratio_stock": ratio("gap_p99_ms", "churn_stock", "calm_stock"),
        "warm_ttft_p95_ratio": ratio("warm_ttft_p95_ms", "churn_ours", "churn_stock"),
        "throughput_churn_ratio": ratio("tokens_per_s", "churn_ours", "churn_stock"),
        "throughput_warm_ratio": ratio("tokens_per_s", "uniform_ours", "uniform_stock"),
        "rows": rows,
        "seconds_per_phase": seconds,
        "slots": SLOTS,
        "cold_adapters": len(COLD),
        "cold_rank": COLD_RANK,
        **stamp(),
    }


def main() -> int:
    """Runs it and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=os.environ.get("LORASERVE_TEST_MODEL"))
    parser.add_argument("--seconds", type=float, default=12.0, help="counted seconds of a phase")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model is None:
        from vllm_loraserve.launcher import assets

        args.model = assets.model_path()
    result = asyncio.run(run(Path(args.model), args.seconds, args.rounds))
    print({name: value for name, value in result.items() if str(name).endswith(("ratio", "ours", "stock"))})
    rows = result["rows"]
    failed = [name for name, row in rows.items() if row["errors"]]
    failed += [name for name, row in rows.items() if name.startswith("churn") and not row["cold_requests"]]
    if failed:
        print(f"no figures: requests failed, or no cold one was served, in {', '.join(failed)}", file=sys.stderr)
        return 1
    write_json(args.json, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
