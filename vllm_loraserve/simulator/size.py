"""`vllm-loraserve size`: how many instances a load needs within an SLO, under each system."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_loraserve.simulator.catalog import generator
from vllm_loraserve.simulator.cli import USAGE_ERRORS, add_common_arguments, prepare, progress_bar
from vllm_loraserve.simulator.machine import Kernels
from vllm_loraserve.simulator.plots import servers_needed
from vllm_loraserve.simulator.results import Result, write_csv, write_json
from vllm_loraserve.simulator.search import fewest_servers
from vllm_loraserve.simulator.simulation import Abort, simulate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `size`."""
    add_common_arguments(parser)
    parser.add_argument("--most", type=int, default=64, help="give up beyond this many instances (default: 64)")


def run(args: argparse.Namespace) -> int:
    """Runs `size`; 2 for options or files that cannot be used."""
    try:
        return _run(args)
    except USAGE_ERRORS as e:
        print(f"vllm-loraserve size: {e}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    names, trace, on, points, systems = prepare(args)
    needed: dict[str, dict[str, int]] = {}
    with progress_bar(Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names) * len(systems))
        for name in names:
            workload = generator(name, on, trace, args.duration)(args.rate, args.seed)
            for system in systems:
                progress.update(task, description=f"{name} under {system.name}")

                def probe(n: int, abort: Abort | None, system=system, workload=workload) -> Result:  # type: ignore[no-untyped-def]
                    return simulate(
                        workload, [on] * n, system, Kernels(args.kernels), op=points, seed=args.seed, abort=abort
                    )

                needed.setdefault(name, {})[system.name] = fewest_servers(probe, args.slo, most=args.most)
                progress.advance(task)
    console = Console()
    console.print(f"instances for {args.rate:g} requests/s with P95 TTFT <= {args.slo:g} s on {on.name}")
    table = Table()
    table.add_column("system")
    for name in names:
        table.add_column(name, justify="right")
    for system in systems:
        cells = [needed[n][system.name] for n in names]
        table.add_row(system.name, *(str(c) if c else f"> {args.most}" for c in cells))
    console.print(table)
    rows: list[dict[str, float | int | str]] = [
        {"workload": n, "system": s, "servers": count, "rate": args.rate, "slo_s": args.slo}
        for n, by_system in needed.items()
        for s, count in by_system.items()
    ]
    if args.json:
        write_json({"machine": on.name, "kernels": args.kernels, "trace": trace.name, "needed": rows}, args.json)
    if args.csv:
        write_csv(rows, args.csv)
    if args.plots:
        folder = Path(args.plots)
        folder.mkdir(parents=True, exist_ok=True)
        for name, by_system in needed.items():
            title = f"{name}: instances for {args.rate:g} requests/s with P95 TTFT <= {args.slo:g} s"
            servers_needed(by_system, title, folder / f"{name}-servers.png", args.most)
    return 0
