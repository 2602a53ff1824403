"""What rank-8 requests pay for sharing an instance with rank 128, at equal tokens/s: the paper's motivating figure.

Open-loop traffic of equal requests: all of rank 8, or every second one of rank 128. Three sides, alternating: stock
vLLM, our kernels with vLLM's scheduler, kernels and scheduler. Only rank-8 requests are measured. On a CPU stock serves
less than it is offered at any rate that tells anything about ours; it gets one short phase of each kind, and
`stock_serves_of_offered` says how far behind it is: its latencies are those of a growing queue.

    python benchmarks/rank_interference.py --model DIR --json FILE [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import asyncio
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

LOW, HIGH = ["low0", "low1"], ["high0", "high1"]
SIDES = {
    "stock": ["--enable-lora"],
    "kernels": ["--enable-loraserve", "--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler"],
    "ours": ["--enable-loraserve"],
}


LEAST_SAMPLES = 100
"""Requests that a P95 of ours is taken from."""


async def phase(url: str, shared: bool, rate: float, seconds: float, rng: random.Random) -> tuple[Seen, float]:
    """Poisson arrivals at `rate` requests/s, 64 tokens in and 16 out; what the rank-8 requests saw, and how much of
    what was offered was served at the rate of arrival (1: all)."""
    low, high = Seen(), Seen()
    jobs = []
    begin = time.monotonic()
    at = 0.0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        number = 0
        while (at := at + rng.expovariate(rate)) < seconds:
            await asyncio.sleep(max(begin + at - time.monotonic(), 0))
            is_high = shared and number % 2 == 1
            name = (HIGH if is_high else LOW)[number // 2 % 2]
            prompt = [rng.randrange(100, 40000) for _ in range(64)]
            into = high if is_high else low
            jobs.append(asyncio.ensure_future(stream(session, url, name, prompt, 16, into, float("inf"))))
            number += 1
        await asyncio.gather(*jobs)
    low.errors += high.errors
    return low, min(1.0, seconds / (time.monotonic() - begin))


async def run(model: Path, rate: float, seconds: float, rounds: int, stock_seconds: float) -> dict[str, Any]:
    """All phases on all sides; the figures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapters = {name: make_adapter(model, folder / name, 8, i) for i, name in enumerate(LOW)}
        adapters |= {name: make_adapter(model, folder / name, 128, 10 + i) for i, name in enumerate(HIGH)}
        common = ["--max-loras", "4", "--max-lora-rank", "128"]
        seen: dict[tuple[str, str], Seen] = {}
        served: dict[str, float] = {}
        async with servers(model, adapters, {side: [*flags, *common] for side, flags in SIDES.items()}, folder) as urls:
            for side, url in urls.items():
                await phase(url, True, rate, 1 if side == "stock" else 4, random.Random(0))
            for number in range(rounds):
                for kind in ("alone", "shared"):
                    for side in list(urls) if number % 2 else list(urls)[::-1]:
                        if side == "stock" and number:
                            continue
                        # The same arrivals and prompts for every side.
                        length = stock_seconds if side == "stock" else seconds
                        part, share = await phase(urls[side], kind == "shared", rate, length, random.Random(number))
                        seen.setdefault((side, kind), Seen()).add(part)
                        served[side] = min(share, served.get(side, 1.0))
    return figures(seen, rate) | {f"{side}_serves_of_offered": round(share, 3) for side, share in served.items()}


def figures(seen: dict[tuple[str, str], Seen], rate: float) -> dict[str, Any]:
    """P95 of TTFT and TPOT, alone and shared, and what sharing adds."""
    table = Table("side", "rank-8 traffic", "TTFT p95 ms", "TPOT p95 ms", "requests", "errors")
    rows: dict[str, dict[str, float]] = {}
    for (side, kind), part in seen.items():
        row = {
            "ttft_p95_ms": round(percentile(part.ttft, 95) * 1e3, 1),
            "tpot_p95_ms": round(percentile(part.tpot, 95) * 1e3, 1),
            "requests": part.requests,
            "errors": len(part.errors),
        }
        rows[f"{side}_{kind}"] = row
        table.add_row(side, kind, *(f"{value:g}" for value in row.values()))
    Console().print(table)
    result: dict[str, Any] = {"rows": rows, "requests_per_s": rate, **stamp()}
    for side in SIDES:
        for name in ("ttft", "tpot"):
            alone, shared = (rows[f"{side}_{kind}"][f"{name}_p95_ms"] for kind in ("alone", "shared"))
            result[f"p95_{name}_added_{side}"] = round(shared / alone - 1, 3)
    result["p95_ttft_added"] = result["p95_ttft_added_ours"]
    return result


def plot(result: dict[str, Any], file: Path) -> None:
    """Bars with their values: alone and shared, for each side; logarithmic, since stock is far from the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for axis, name in zip(axes, ("ttft", "tpot"), strict=True):
        for offset, kind in ((-0.2, "alone"), (0.2, "shared")):
            values = [result["rows"][f"{side}_{kind}"][f"{name}_p95_ms"] for side in SIDES]
            bars = axis.bar([i + offset for i in range(len(SIDES))], values, 0.4, label=kind)
            axis.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axis.set_yscale("log")
        axis.margins(y=0.1)
        axis.set_xticks(range(len(SIDES)), list(SIDES))
        axis.set_title(f"P95 {name.upper()} of rank-8 requests, ms")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> int:
    """Runs it and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=os.environ.get("LORASERVE_TEST_MODEL"))
    parser.add_argument("--rate", type=float, default=3.0, help="requests/s")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a phase")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--stock-seconds", type=float, default=4.0, help="of stock's one phase of each kind")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.model is None:
        from vllm_loraserve.launcher import assets

        args.model = assets.model_path()
    result = asyncio.run(run(Path(args.model), args.rate, args.seconds, args.rounds, args.stock_seconds))
    print({name: value for name, value in result.items() if "added" in name})
    for name, row in result["rows"].items():
        least = 1 if name.startswith("stock") else LEAST_SAMPLES
        if row["errors"] or row["requests"] < least:
            print(f"no figures: {name} has {row['errors']:g} errors, {row['requests']:g} requests", file=sys.stderr)
            return 1
    write_json(args.json, result)
    if args.plot is not None:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
