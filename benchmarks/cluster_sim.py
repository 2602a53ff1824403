"""Every placement and routing system on every workload, in the paper's world and in ours.

Worlds: `max-in-batch` is the paper's set-up (Llama-7B on 4 servers of 4 A100-40GB, S-LoRA kernels:
everybody in a step pays the largest rank); `rank-aware` is one H100-80GB per server with rank-aware
kernels; `rank-aware-24gb` the same kernels on 24 GB GPUs, where the arena and not compute is scarce. All
step costs are modelled, not measured. The SLO is P95 TTFT <= 10 s.

For each world, workload and system, over the seeds: `max_rps_slo` by bisection; at one common load (90 % of
what toppings can do) `p50_ttft_s`, `p95_ttft_s`, `p50_tbt_s`, `adapters_per_server` (the most copies that a server ever
held), `placed_per_server` (the most that were placed on one) and `bytes_moved`; `gpus_for_load`: servers needed for 3
times what toppings does on 4, and `placed_per_server_at_load` there (first seed). `bound`: the rate of the whole
cluster as one machine with one queue, which no system can beat (simulator/bound.py). The world `s-lora` (not among the
default ones) is `max-in-batch` with prompts and decodes priced apart.

    python benchmarks/cluster_sim.py --trace azure-llm-2023-conv.csv --json FILE [--plots DIR] [--quick]

Parameters were tuned on seeds 0..15; the default seeds are none of these, and a replay's seed also chooses
the piece of the trace. A seed means the same requests at every rate and for every system, so the ratios are paired.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from cluster_sim_conclusions import Bounds, Figures, conclusions
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from vllm_loraserve.simulator import plots
from vllm_loraserve.simulator.bound import simulate_bound
from vllm_loraserve.simulator.catalog import PAPER_SIX, Generate, generator
from vllm_loraserve.simulator.machine import MACHINES, Kernels, Machine
from vllm_loraserve.simulator.results import Result, write_json
from vllm_loraserve.simulator.search import fewest_servers, max_rate
from vllm_loraserve.simulator.simulation import Abort, simulate
from vllm_loraserve.simulator.systems import BASELINES, SYSTEMS
from vllm_loraserve.simulator.traces import read_trace
from vllm_loraserve.simulator.workload import Trace, synthetic_trace

WORLDS = {
    "max-in-batch": ("paper", Kernels.MAX_IN_BATCH),
    "rank-aware": ("h100", Kernels.RANK_AWARE),
    "rank-aware-24gb": ("l4", Kernels.RANK_AWARE),
    "s-lora": ("paper", Kernels.S_LORA),
}
DEFAULT_WORLDS = ("max-in-batch", "rank-aware", "rank-aware-24gb")
WORKLOADS = (*PAPER_SIX, "replay-50", "replay-100", "replay-200", "replay-1000", "replay-10000", "burst-200")
SYSTEM_NAMES = (*BASELINES, "loraserve", "loraserve+")
LARGE = {"replay-1000": 60.0, "replay-10000": 30.0}
"""Workloads of which only the first seed is run, for so many seconds, and servers are not counted: placing 10,000
adapters every 5 s takes longer than serving them."""
SLO_S = 10.0
TOLERANCE = 0.01
SERVERS = 4
COUNT_LOAD = 3.0
"""Servers are counted for so many times what toppings does on SERVERS: a dozen of them, so that one is 8 %."""
MOST_SERVERS = 48
TUNING_SEEDS = tuple(range(16))
SEEDS = {
    "max-in-batch": (101, 102, 103),
    "rank-aware": tuple(range(101, 111)),
    "rank-aware-24gb": tuple(range(101, 111)),
    "s-lora": (101, 102, 103),
}
"""Fewer where a run is longer."""
DURATION_S = {"max-in-batch": 600.0, "rank-aware": 120.0, "rank-aware-24gb": 120.0, "s-lora": 600.0}
"""Seconds of arrivals. The paper replays hours, in which an overloaded server's queue has time to grow."""


def seeds_of(args: argparse.Namespace, world: str) -> tuple[int, ...]:
    """Those of the command line, else the world's own."""
    return tuple(args.seeds or SEEDS[world])


class Job(msgspec.Struct, frozen=True):
    """One (world, workload, system, seed)."""

    world: str
    workload: str
    system: str
    seed: int
    duration_s: float
    trace: str | None


@functools.lru_cache(maxsize=4)
def the_trace(path: str | None) -> Trace:
    """The trace of this process."""
    return read_trace(path) if path else synthetic_trace()


def setting(job: Job) -> tuple[Machine, Kernels, Generate]:
    """Machine, kernels and workload generator of a job."""
    name, kernels = WORLDS[job.world]
    machine = MACHINES[name]
    return machine, kernels, generator(job.workload, machine, the_trace(job.trace), job.duration_s)


def guess_rate(machine: Machine, make: Generate, seed: int) -> float:
    """A first guess of the cluster's request rate from operating points and mean lengths."""
    w = make(5.0, seed)
    op = machine.operating_points()
    cost = np.array([1.0 / op.at(a.rank) for a in w.adapters])[w.adapter]
    return SERVERS / float(((w.prompt + w.output) * cost).mean())


def run_at(job: Job, rate: float, servers: int = SERVERS, abort: Abort | None = None, sample_s: float = 0.0) -> Result:
    """One simulation of the job at `rate` requests/s."""
    machine, kernels, make = setting(job)
    return simulate(
        make(rate, job.seed),
        [machine] * servers,
        SYSTEMS[job.system],
        kernels,
        seed=job.seed,
        abort=abort,
        sample_s=sample_s,
    )


def find_rate(job: Job, guess: float, step: float) -> float:
    """The highest rate within the SLO."""
    return max_rate(
        lambda rate, abort: run_at(job, rate, abort=abort), SLO_S, guess=guess, tolerance=TOLERANCE, step=step
    )


def find_bound(job: Job, guess: float, step: float) -> float:
    """The highest rate of the pooled machine."""
    machine, _, make = setting(job)

    def probe(rate: float, abort: Abort | None) -> Result:
        return simulate_bound(make(rate, job.seed), [machine] * SERVERS, abort=abort)

    return max_rate(probe, SLO_S, guess=guess, tolerance=TOLERANCE, step=step)


Row = dict[str, float | int | str]
"""Figures of one run."""


class Rates(msgspec.Struct):
    """Highest rates within the SLO, seed by seed: of each system, and of the pooled machine."""

    by_system: dict[str, list[float]]
    bounds: list[float]


class Count(msgspec.Struct):
    """Servers for the larger load (0: MOST_SERVERS are not enough), and the most adapters placed on one of them."""

    servers: int = 0
    placed_per_server: int = 0


class Done(msgspec.Struct):
    """What a task found, by system."""

    rates: Rates
    rows: dict[str, list[Row]]
    counts: dict[str, Count]


class Task(msgspec.Struct, frozen=True):
    """One (world, workload) with all systems and seeds: searches start from what the others found. `parts`: folder
    where what is done is kept."""

    world: str
    workload: str
    systems: tuple[str, ...]
    seeds: tuple[int, ...]
    duration_s: float
    trace: str | None
    count_servers: bool
    parts: str | None

    def jobs(self, seed: int) -> dict[str, Job]:
        """One for each system."""
        return {s: Job(self.world, self.workload, s, seed, self.duration_s, self.trace) for s in self.systems}


T = TypeVar("T")


def kept_or_run(task: Task, part: str, kind: type[T], run: Callable[[], T]) -> T:
    """A part of the task's figures, from an earlier run that was cut short, or new."""
    file = Path(task.parts) / f"{task.world}-{task.workload}-{part}.json" if task.parts else None
    if file is not None and file.exists():
        return msgspec.json.decode(file.read_bytes(), type=kind)
    done = run()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.encode(done))
    return done


def run_task(task: Task) -> tuple[Task, Done]:
    """All figures of one world and workload."""
    rates = kept_or_run(task, "rates", Rates, lambda: find_rates(task))
    rows = kept_or_run(task, "rows", dict[str, list[Row]], lambda: at_common_load(task, rates))
    counts: dict[str, Count] = {}
    if task.count_servers:
        counts = kept_or_run(task, "servers", dict[str, Count], lambda: count_all(task, rates))
    return task, Done(rates, rows, counts)


def find_rates(task: Task) -> Rates:
    """The highest rate of every system and of the bound."""
    found = Rates({s: [] for s in task.systems}, [])
    bounds = found.bounds
    for seed in task.seeds:
        jobs = task.jobs(seed)
        toppings = jobs["toppings"]
        if bounds:
            guess, step = bounds[-1], 1.1
        else:
            machine, _, make = setting(toppings)
            guess, step = guess_rate(machine, make, seed), 1.3
        bounds.append(find_bound(toppings, guess, step))
        for system, job in jobs.items():
            known = found.by_system[system]
            if known and known[-1] > 0.0:  # the same share of the bound as with the seed before
                guess, step = known[-1] / bounds[-2] * bounds[-1], 1.05
            else:
                guess, step = 0.9 * bounds[-1], 1.1
            known.append(find_rate(job, guess, step))
    return found


def at_common_load(task: Task, rates: Rates) -> dict[str, list[Row]]:
    """What every system does at 90 % of the rate of toppings, by seed."""
    rows: dict[str, list[Row]] = {s: [] for s in task.systems}
    for seed, load in zip(task.seeds, rates.by_system["toppings"], strict=True):
        for system, job in task.jobs(seed).items():
            rows[system].append(run_at(job, 0.9 * load).summary())
    return rows


def count_all(task: Task, rates: Rates) -> dict[str, Count]:
    """Servers that every system needs, with the first seed."""
    load = COUNT_LOAD * rates.by_system["toppings"][0]
    return {s: count_servers(job, load, rates.by_system[s][0]) for s, job in task.jobs(task.seeds[0]).items()}


def count_servers(job: Job, load: float, rate: float) -> Count:
    """Fewest servers for `load`, from the number that `rate` (what SERVERS do) makes likely."""
    likely = min(max(math.ceil(SERVERS * load / max(rate, 1e-9)), SERVERS), MOST_SERVERS)
    found = Count()

    def probe(n: int, abort: Abort | None) -> Result:
        result = run_at(job, load, servers=n, abort=abort)
        if result.meets(SLO_S) and (not found.servers or n < found.servers):
            found.servers, found.placed_per_server = n, result.placed_per_server
        return result

    if probe(likely, Abort(SLO_S)).meets(SLO_S):
        while likely > SERVERS and probe(likely - 1, Abort(SLO_S)).meets(SLO_S):
            likely -= 1
    elif likely < MOST_SERVERS:
        fewest_servers(probe, SLO_S, start=likely + 1, most=MOST_SERVERS)
    return found


def measure(
    args: argparse.Namespace, worlds: list[str], workloads: list[str], systems: list[str]
) -> tuple[Figures, Bounds]:
    """All runs: world -> workload -> system -> figures; world -> workload -> bound of each seed."""
    tasks = []
    for world in worlds:
        for workload in workloads:
            seeds, seconds = seeds_of(args, world), args.duration or DURATION_S[world]
            if workload in LARGE:
                seeds, seconds = seeds[:1], min(seconds, LARGE[workload])
            tasks.append(
                Task(world, workload, tuple(systems), seeds, seconds, args.trace, workload not in LARGE, args.parts)
            )
    figures: Figures = {world: {} for world in worlds}
    limits: Bounds = {world: {} for world in worlds}
    bar = Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True))
    with multiprocessing.Pool(args.jobs) as pool, bar as progress:
        shown = progress.add_task("worlds x workloads", total=len(tasks))
        for task, done in pool.imap_unordered(run_task, tasks):
            figures[task.world][task.workload] = {s: _figures(done, s) for s in task.systems}
            limits[task.world][task.workload] = done.rates.bounds
            progress.console.print(f"{task.world}, {task.workload}: done")
            progress.advance(shown)
    return (
        {world: {w: by[w] for w in workloads} for world, by in figures.items()},
        {world: {w: by[w] for w in workloads} for world, by in limits.items()},
    )


def _figures(done: Done, system: str) -> dict[str, Any]:
    rates, rows, count = done.rates.by_system[system], done.rows[system], done.counts.get(system)
    return {
        "max_rps_slo": float(np.mean(rates)),
        "max_rps_slo_by_seed": rates,
        "gpus_for_load": count.servers if count is not None else None,
        "placed_per_server_at_load": count.placed_per_server if count is not None else None,
        **{k: max(int(r[k]) for r in rows) for k in ("adapters_per_server", "placed_per_server")},
        **{
            k: float(np.median([float(r[k]) for r in rows]))
            for k in ("offered_rps", "p50_ttft_s", "p95_ttft_s", "p50_tbt_s", "bytes_moved")
        },
    }


def show(figures: Figures, bounds: Bounds, found: dict[str, Any]) -> None:
    """Prints the tables."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file or a pipe has no width of its own
    for world, by_workload in figures.items():
        systems = list(next(iter(by_workload.values())))
        table = Table(title=f"{world}: requests/s within P95 TTFT <= {SLO_S:g} s on {SERVERS} servers")
        table.add_column("workload", no_wrap=True)
        for s in (*systems, "bound"):
            table.add_column(s, justify="right")
        for workload, by_system in by_workload.items():
            best = max(by_system[s]["max_rps_slo"] for s in systems)
            cells = []
            for s in systems:
                value = by_system[s]["max_rps_slo"]
                cells.append(f"[bold]{value:.1f}[/]" if value >= 0.995 * best else f"{value:.1f}")
            table.add_row(workload, *cells, f"{np.mean(bounds[world][workload]):.1f}")
        console.print(table)
    for world, facts in found.items():
        console.print(f"[bold]{world}[/]")
        for key, value in facts.items():
            if isinstance(value, dict):
                for workload, r in value.items():
                    note = ""
                    if "best_other" in r:
                        note = f" over {r['best_other']}; bound {r['bound_over_best_other']:.3f}"
                    console.print(f"  {key}, {workload}: {r['ratio']:.3f} ({r['low']:.3f}..{r['high']:.3f}){note}")
            else:
                console.print(f"  {key}: {value:.3f}")


def draw(args: argparse.Namespace, figures: Figures) -> None:
    """The pictures of docs/simulator.md, from one held-out seed."""
    folder = Path(args.plots)
    folder.mkdir(parents=True, exist_ok=True)
    for world, by_workload in figures.items():
        ratios = {
            w: {s: r["max_rps_slo"] / max(by["toppings"]["max_rps_slo"], 1e-9) for s, r in by.items()}
            for w, by in by_workload.items()
        }
        plots.ratio_bars(
            ratios, "toppings", f"{world}: SLO throughput relative to toppings", folder / f"{world}-throughput.png"
        )
        chosen = "poisson-uniform" if world == "max-in-batch" else "poisson-shifting-skew"
        if chosen not in by_workload:
            chosen = next(iter(by_workload))
        counted = next((w for w, r in by_workload.items() if r["toppings"]["gpus_for_load"] is not None), None)
        if counted is not None:
            row = by_workload[counted]
            load = COUNT_LOAD * row["toppings"]["max_rps_slo_by_seed"][0]
            plots.servers_needed(
                {s: r["gpus_for_load"] for s, r in row.items()},
                f"{world}, {counted}: servers for {load:.0f} requests/s",
                folder / f"{world}-servers.png",
                MOST_SERVERS,
            )
        seconds = args.duration or DURATION_S[world]
        by_system = by_workload[chosen]
        top = max(r["max_rps_slo"] for r in by_system.values())
        jobs = {s: Job(world, chosen, s, seeds_of(args, world)[0], seconds, args.trace) for s in by_system}
        curves = {
            s: [(f * top, run_at(job, f * top).ttft_percentile(95)) for f in (0.3, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1)]
            for s, job in jobs.items()
        }
        plots.slo_throughput(curves, SLO_S, f"{world}, {chosen}", folder / f"{world}-slo.png")
        common = 0.9 * by_system["toppings"]["max_rps_slo"]
        runs = [run_at(job, common, sample_s=seconds / 60) for job in jobs.values()]
        plots.ttft_cdf(runs, f"{world}, {chosen} at {common:.1f} requests/s", folder / f"{world}-ttft.png")
        plots.load_over_time(
            [r for r in runs if r.system in ("contiguous", "toppings", "loraserve", "loraserve+")],
            folder / f"{world}-load.png",
        )


def main() -> int:
    """Runs, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plots", metavar="DIR")
    parser.add_argument("--trace", metavar="FILE", help="Azure LLM 2023 conversation trace (default: synthetic)")
    parser.add_argument("--world", action="append", choices=list(WORLDS))
    parser.add_argument("--workload", action="append")
    parser.add_argument("--system", action="append", choices=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, nargs="+", help="the same in every world (default: 101 and some more)")
    parser.add_argument("--duration", type=float, metavar="S", help=f"seconds of arrivals (default: {DURATION_S})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--parts", metavar="DIR", help="keep what is done there; a run that was cut short goes on")
    parser.add_argument("--quick", action="store_true", help="three workloads, short runs, one seed (not for figures)")
    args = parser.parse_args()
    workloads = args.workload or list(WORKLOADS)
    if args.quick:
        workloads = args.workload or ["poisson-uniform", "poisson-shifting-skew", "replay-50"]
        args.duration, args.seeds = args.duration or 40.0, seeds_of(args, DEFAULT_WORLDS[0])[:1]
    systems = list(args.system or SYSTEM_NAMES)
    if "toppings" not in systems:
        systems.insert(0, "toppings")
    start = time.monotonic()
    figures, bounds = measure(args, args.world or list(DEFAULT_WORLDS), workloads, systems)
    found = conclusions(figures, bounds, MOST_SERVERS) if set(SYSTEM_NAMES) <= set(systems) else {}
    show(figures, bounds, found)
    if args.plots:
        draw(args, figures)
    wall = time.monotonic() - start
    print(f"{wall:.0f} s on {args.jobs} processes")
    if args.json:
        write_json(
            {
                "date": date.today().isoformat(),
                "command": " ".join(
                    [
                        "python benchmarks/cluster_sim.py",
                        *(Path(a).name if a == args.trace else a for a in sys.argv[1:]),
                    ]
                ),
                "device": f"simulated; {platform.machine()}, Python {platform.python_version()}",
                "machines": {w: MACHINES[WORLDS[w][0]].name for w in figures},
                "trace": the_trace(args.trace).name,
                "adapter_popularity": "synthetic: no public LLM trace names adapters",
                "tuned_on_seeds": TUNING_SEEDS,
                "seeds": {w: seeds_of(args, w) for w in figures},
                "duration_s": {w: args.duration or DURATION_S[w] for w in figures},
                "large_workloads": {"duration_s": LARGE},
                "servers": SERVERS,
                "gpus_for_load_is_for": f"{COUNT_LOAD:g} times what toppings does on {SERVERS}",
                "most_servers": MOST_SERVERS,
                "slo": f"P95 TTFT <= {SLO_S:g} s",
                "wall_s": round(wall, 1),
                "conclusions": found,
                "bounds": bounds,
                "figures": figures,
            },
            args.json,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
