"""How fast placement is, and how little it moves: 10,000 adapters on 1,000 servers, 100,000 on 10,000.

Times `place` of a policy on one core (CPU time, median of the repeats), first from nothing, then after the
demand of 1 % of the adapters has changed, and reports the share of the held bytes that the second placement
copies.

    python benchmarks/placement_scale.py --json FILE [--policy loraserve] [--quick]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from datetime import date

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_loraserve.cluster.moves import diff
from vllm_loraserve.cluster.placement import (
    Placement,
    PlacementInput,
    PlacementPolicy,
    ServerSpec,
    make_policy,
    server_loads,
)
from vllm_loraserve.simulator.machine import H100
from vllm_loraserve.simulator.results import write_json
from vllm_loraserve.simulator.workload import PAPER_RANKS, power_law

POLICIES = ("loraserve", "loraserve+", "rank-weighted")
BARS = {"place_10k_s": 1.0, "place_100k_s": 30.0, "moved_fraction": 0.02}


def cluster(adapters: int, servers: int, seed: int = 0, load: float = 0.6) -> PlacementInput:
    """Adapters of the paper's ranks with power-law demand that loads the cluster to `load` of its operating
    points."""
    rng = np.random.default_rng([seed, adapters])
    ranks = rng.choice(PAPER_RANKS, adapters, p=(0.4, 0.25, 0.15, 0.12, 0.08))
    specs = [H100.adapter(f"a{i:06d}", int(r)) for i, r in enumerate(ranks)]
    share = rng.permutation(power_law(adapters, 0.7))
    op = H100.operating_points()
    cost = np.array([1.0 / op.at(int(r)) for r in ranks])
    demand = share * (load * servers / float(share @ cost))
    return PlacementInput(
        adapters=specs,
        servers=[ServerSpec(f"s{i:05d}", 2048, 100 * 2**30) for i in range(servers)],
        demand={s.name: float(d) for s, d in zip(specs, demand, strict=True)},
        op=op,
    )


def drifted(inp: PlacementInput, previous: Placement, seed: int = 1) -> PlacementInput:
    """The same cluster after 1 % of the adapters changed their demand by a factor between 1/4 and 4."""
    rng = np.random.default_rng(seed)
    names = [a.name for a in inp.adapters]
    demand = dict(inp.demand)
    for i in rng.choice(len(names), max(len(names) // 100, 1), replace=False):
        demand[names[i]] *= float(4.0 ** rng.uniform(-1, 1))
    return PlacementInput(adapters=inp.adapters, servers=inp.servers, demand=demand, op=inp.op, previous=previous)


def timed(policy: PlacementPolicy, inp: PlacementInput, repeats: int) -> tuple[float, Placement]:
    """Median CPU seconds of `place`, and its answer."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        placement = policy.place(inp)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), placement


def measure(name: str, adapters: int, servers: int, repeats: int) -> dict[str, float]:
    """Times and moved fraction of one policy at one size."""
    policy = make_policy(name)
    inp = cluster(adapters, servers)
    first_s, first = timed(policy, inp, repeats)
    changed = drifted(inp, first)
    again_s, second = timed(policy, changed, repeats)
    plan = diff(inp.adapters, first, second)
    loads = list(server_loads(changed, second).values())
    return {
        "place_s": first_s,
        "replace_s": again_s,
        "moved_fraction": plan.moved_fraction,
        "worst_over_mean_load": max(loads) / (sum(loads) / len(loads)),
        "unplaced": len(second.unplaced),
    }


def main() -> int:
    """Measures, prints, saves; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--policy", action="append", choices=POLICIES)
    parser.add_argument("--quick", action="store_true", help="only 10,000 adapters, one repeat")
    args = parser.parse_args()
    sizes = [(10_000, 1_000, 1 if args.quick else 3)]
    if not args.quick:
        sizes.append((100_000, 10_000, 1))
    results: dict[str, dict[str, dict[str, float]]] = {}
    table = Table(title="placement on one core")
    table.add_column("policy", no_wrap=True)
    for column in ("adapters", "servers", "place", "after 1 % changed", "bytes moved", "worst/mean load"):
        table.add_column(column, justify="right")
    for name in args.policy or POLICIES:
        for adapters, servers, repeats in sizes:
            r = measure(name, adapters, servers, repeats)
            results.setdefault(name, {})[f"{adapters}x{servers}"] = r
            table.add_row(
                name,
                f"{adapters:,}",
                f"{servers:,}",
                f"{r['place_s']:.2f} s",
                f"{r['replace_s']:.2f} s",
                f"{r['moved_fraction']:.2%}",
                f"{r['worst_over_mean_load']:.3f}",
            )
    Console().print(table)
    ours = {k: v for k, v in results.items() if k in ("loraserve", "loraserve+")}
    figures = {
        "place_10k_s": max(max(v["10000x1000"]["place_s"], v["10000x1000"]["replace_s"]) for v in ours.values()),
        "moved_fraction": max(r["moved_fraction"] for v in ours.values() for r in v.values()),
    }
    if not args.quick:
        figures["place_100k_s"] = max(
            max(v["100000x10000"]["place_s"], v["100000x10000"]["replace_s"]) for v in ours.values()
        )
    for key, value in figures.items():
        print(f"{key} = {value:.4g} (bar: < {BARS[key]:g}): {'holds' if value < BARS[key] else 'MISSED'}")
    if args.json:
        write_json(
            {
                "date": date.today().isoformat(),
                "command": "python benchmarks/placement_scale.py " + " ".join(sys.argv[1:]),
                "device": f"{platform.machine()}, one core, Python {platform.python_version()}",
                **figures,
                "note": "worst of loraserve and loraserve+, of the first placement and of the one after the change",
                "policies": results,
            },
            args.json,
        )
    return int(any(value >= BARS[key] for key, value in figures.items()))


if __name__ == "__main__":
    raise SystemExit(main())
