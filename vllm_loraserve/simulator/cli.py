"""`vllm-loraserve simulate`: run workloads under several systems and print, save and draw what came out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_loraserve.cluster.operating_points import OperatingPoints, OperatingPointsError, load
from vllm_loraserve.simulator.catalog import PAPER_SIX, CatalogError, generator, machine
from vllm_loraserve.simulator.machine import MACHINES, Kernels, Machine
from vllm_loraserve.simulator.plots import PlotError, load_over_time, ttft_cdf
from vllm_loraserve.simulator.results import Result, write_csv, write_json
from vllm_loraserve.simulator.simulation import Failure, simulate
from vllm_loraserve.simulator.systems import SYSTEMS, System
from vllm_loraserve.simulator.traces import TraceError, read_trace
from vllm_loraserve.simulator.workload import Trace, synthetic_trace

USAGE_ERRORS = (CatalogError, TraceError, OperatingPointsError, PlotError, ValueError)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that `simulate` and `size` share."""
    parser.add_argument(
        "--workload",
        action="append",
        metavar="NAME",
        help=f"{', '.join(PAPER_SIX)}, replay-N, zipf-N, burst-N, churn-N (N adapters) or replay-named; repeatable "
        "(default: poisson-shifting-skew)",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="lengths and arrival times: CSV with time, input and output columns (Azure), Mooncake or ServeGen JSON "
        "lines (default: synthetic lengths of a chat service)",
    )
    parser.add_argument(
        "--system",
        action="append",
        choices=sorted(SYSTEMS),
        metavar="NAME",
        help=f"one of {', '.join(SYSTEMS)}; repeatable (default: all)",
    )
    parser.add_argument("--machine", default="h100", help=f"{', '.join(MACHINES)} (default: h100)")
    parser.add_argument(
        "--kernels", default="rank-aware", choices=[k.value for k in Kernels], help="which rank a token pays for"
    )
    parser.add_argument("--points", metavar="FILE", help="measured operating points (from `vllm-loraserve profile`)")
    parser.add_argument("--rate", type=float, default=20.0, help="requests/s over the cluster (default: 20)")
    parser.add_argument("--duration", type=float, default=300.0, help="seconds of arrivals (default: 300)")
    parser.add_argument("--slo", type=float, default=10.0, help="P95 time to first token, seconds (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the summaries as JSON")
    parser.add_argument("--csv", metavar="FILE", help="write the summaries as CSV")
    parser.add_argument("--plots", metavar="DIR", help="draw pictures into this folder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `simulate`."""
    add_common_arguments(parser)
    parser.add_argument("--servers", type=int, default=4, help="instances (default: 4)")
    parser.add_argument("--period", type=float, help="seconds between placements (default: the system's)")
    parser.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="SERVER:FROM:TO",
        help="server number SERVER is dead between these seconds; repeatable",
    )


def prepare(args: argparse.Namespace) -> tuple[list[str], Trace, Machine, OperatingPoints | None, list[System]]:
    """Workload names, trace, machine, operating points and systems that the options ask for."""
    trace = read_trace(args.trace) if args.trace else synthetic_trace(seed=args.seed)
    on = machine(args.machine)
    points = load(args.points) if args.points else None
    if points is not None:
        on = on.with_points(points)
    for name, value in (("--rate", args.rate), ("--duration", args.duration), ("--slo", args.slo)):
        if not value > 0.0:
            raise ValueError(f"{name} {value}: it must be positive")
    systems = [SYSTEMS[s] for s in args.system or SYSTEMS]
    return args.workload or ["poisson-shifting-skew"], trace, on, points, systems


def parse_failure(text: str, servers: int) -> Failure:
    """SERVER:FROM:TO."""
    try:
        server, start, stop = text.split(":")
        failure = Failure(int(server), float(start), float(stop))
    except ValueError as e:
        raise ValueError(f"--fail {text!r}: expected SERVER:FROM:TO, for example 0:60:120") from e
    if not 0 <= failure.server < servers or not 0.0 <= failure.start < failure.stop:
        raise ValueError(f"--fail {text!r}: the server must be 0..{servers - 1} and FROM before TO")
    return failure


def progress_bar(console: Console) -> Progress:
    """The bar both commands show on a terminal; written to stderr, so that stdout stays a table."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True)


def run(args: argparse.Namespace) -> int:
    """Runs `simulate`; 2 for options or files that cannot be used."""
    try:
        return _run(args)
    except USAGE_ERRORS as e:
        print(f"vllm-loraserve simulate: {e}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    names, trace, on, points, systems = prepare(args)
    failures = [parse_failure(f, args.servers) for f in args.fail]
    if args.period is not None:
        systems = [msgspec.structs.replace(s, period_s=args.period) if s.period_s else s for s in systems]
    results: dict[str, list[Result]] = {}
    with progress_bar(Console(stderr=True)) as progress:
        for name in names:
            workload = generator(name, on, trace, args.duration)(args.rate, args.seed)
            for system in systems:
                task = progress.add_task(f"{name} under {system.name}", total=1.0)

                def advance(done: float, task: TaskID = task) -> None:
                    progress.update(task, completed=done)

                results.setdefault(name, []).append(
                    simulate(
                        workload,
                        [on] * args.servers,
                        system,
                        Kernels(args.kernels),
                        op=points,
                        seed=args.seed,
                        failures=failures,
                        sample_s=args.duration / 60.0,
                        on_progress=advance,
                    )
                )
                progress.remove_task(task)
    for name, runs in results.items():
        Console().print(table(name, runs, args.slo))
    rows = [r.summary() for runs in results.values() for r in runs]
    if args.json:
        write_json(
            {
                "machine": on.name,
                "kernels": args.kernels,
                "operating_points_measured": bool(points and points.measured),
                "adapter_popularity": "synthetic (no public LLM trace names adapters)",
                "trace": trace.name,
                "runs": rows,
            },
            args.json,
        )
    if args.csv:
        write_csv(rows, args.csv)
    if args.plots:
        folder = Path(args.plots)
        folder.mkdir(parents=True, exist_ok=True)
        for name, runs in results.items():
            ttft_cdf(runs, f"{name}, {args.rate:g} requests/s on {args.servers} servers", folder / f"{name}-ttft.png")
            load_over_time(runs, folder / f"{name}-load.png")
    return 0


def table(name: str, runs: list[Result], slo_s: float) -> Table:
    """The printed summary of one workload."""
    out = Table(
        title=f"{name}: {runs[0].offered_rps:.1f} requests/s on {runs[0].servers} servers",
        caption=f"P50, P95: of TTFT, seconds; SLO: P95 <= {slo_s:g} s; TBT: P50, milliseconds\nheld: most adapters on "
        "one server; GiB: moved between servers; busy: least..most, %",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    for column in ("system", "P50", "P95", "SLO", "TBT", "tokens/s", "held", "GiB", "busy"):
        out.add_column(column, justify="left" if column == "system" else "right", no_wrap=True)
    for r in runs:
        s = r.summary()
        out.add_row(
            r.system,
            f"{s['p50_ttft_s']:.2f}",
            f"{s['p95_ttft_s']:.2f}",
            "[green]met[/]" if r.meets(slo_s) else "[red]missed[/]",
            f"{1000 * float(s['p50_tbt_s']):.0f}",
            f"{r.tokens_per_s:.0f}",
            str(r.adapters_per_server),
            f"{r.bytes_moved / 2**30:.1f}",
            f"{100 * min(r.busy):.0f}..{100 * max(r.busy):.0f}",
        )
    return out
