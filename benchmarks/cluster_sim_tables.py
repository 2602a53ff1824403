"""Writes the tables of docs/simulator.md from the figures of `cluster_sim.py`.

    python benchmarks/cluster_sim_tables.py benchmarks/results/cluster_sim.json docs/simulator.md

Everything between the markers `<!-- TABLES -->` and `<!-- END OF TABLES -->` is replaced; without the second argument
the tables are printed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

BEGIN, END = "<!-- TABLES -->", "<!-- END OF TABLES -->"
LATENCY = ("contiguous", "toppings", "hrw", "loraserve", "loraserve+")


def row(cells: list[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def head(first: str, others: list[str]) -> list[str]:
    """Heading of a table with one text column and figures."""
    return [row([first, *others]), row(["---", *("---:" for _ in others)])]


def world_tables(data: dict[str, Any], world: str) -> list[str]:
    """Throughput with the bound, latency and memory at the common load, servers."""
    figures, bounds = data["figures"][world], data["bounds"][world]
    systems = list(next(iter(figures.values())))
    seconds = data["duration_s"][world]
    seeds = data["seeds"][world]
    listed = ", ".join(map(str, seeds)) if len(seeds) <= 3 else f"{seeds[0]} to {seeds[-1]}"
    large = {w: s for w, s in data["large_workloads"]["duration_s"].items() if w in figures}
    out = [f"### {world}: {data['machines'][world]}", ""]
    out.append(f"Seeds {listed}; {seconds:g} s of arrivals.")
    if large:
        shorter = ", ".join(f"{w} {min(s, seconds):g} s" for w, s in large.items())
        out.append(f"Seed {seeds[0]} alone and shorter: {shorter}.")
    out += [f"Requests/s within {data['slo']} on {data['servers']} servers:", ""]
    out += head("workload", [*systems, "bound"])
    for workload, by in figures.items():
        best = max(by[s]["max_rps_slo"] for s in systems)
        rates = [by[s]["max_rps_slo"] for s in systems]
        cells = [f"**{v:.1f}**" if v >= 0.995 * best else f"{v:.1f}" for v in rates]
        bound = sum(bounds[workload]) / len(bounds[workload])
        out.append(row([workload, *cells, f"{bound:.1f}"]))
    out += [
        "",
        "At 90 % of what toppings can do: P95 TTFT (s) / most adapters placed on a server / most held / GiB moved:",
        "",
    ]
    shown = [s for s in LATENCY if s in systems]
    out += head("workload", shown)
    for workload, by in figures.items():
        cells = [
            f"{by[s]['p95_ttft_s']:.2f} / {by[s]['placed_per_server']} / {by[s]['adapters_per_server']} / "
            f"{by[s]['bytes_moved'] / 2**30:.1f}"
            for s in shown
        ]
        out.append(row([workload, *cells]))
    counted = {w: by for w, by in figures.items() if by[systems[0]]["gpus_for_load"] is not None}
    if counted:
        most = data["most_servers"]
        out += ["", f"Servers for {data['gpus_for_load_is_for']} (> {most}: not even {most}):", ""]
        out += head("workload", systems)
        for workload, by in counted.items():
            out.append(row([workload, *(str(by[s]["gpus_for_load"] or f"> {most}") for s in systems)]))
    return [*out, ""]


def ratios(data: dict[str, Any]) -> list[str]:
    """What the project promises, with intervals."""
    out: list[str] = []
    found = data["conclusions"]
    if "paper" in found:
        paper = found["paper"]
        out += ["### Ratios, with 95 % intervals over the seeds", "", "`loraserve` in the paper's world:", ""]
        out += head("workload", ["over the worse static one", "over toppings"])
        for workload, worse in paper["loraserve_over_worse_static"].items():
            out.append(row([workload, interval(worse), interval(paper["loraserve_over_toppings"][workload])]))
        out += ["", f"Over toppings on average: {paper['loraserve_over_toppings_mean']:.2f}.", ""]
    for world, facts in found.items():
        if world == "paper":
            continue
        out += [f"`loraserve+`, {world}:", ""]
        out += head("workload", ["best other", "loraserve+ over it", "bound over it", "loraserve+ / bound"])
        for workload, r in facts["loraserve+_over_best_other"].items():
            cells = [r["best_other"], interval(r), f"{r['bound_over_best_other']:.2f}", f"{r['share_of_bound']:.3f}"]
            out.append(row([workload, *cells]))
        out.append("")
    return out


def interval(r: dict[str, float]) -> str:
    """Ratio and interval; one seed has none."""
    if r["low"] == r["high"]:
        return f"{r['ratio']:.2f}"
    return f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"


def main(arguments: list[str]) -> int:
    """Prints or puts in place."""
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    data = msgspec.json.decode(Path(arguments[0]).read_bytes())
    lines = [line for world in data["figures"] for line in world_tables(data, world)] + ratios(data)
    text = "\n".join(lines).strip()
    if len(arguments) == 1:
        print(text)
        return 0
    page = Path(arguments[1])
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or END not in rest:
        print(f"{page} lacks {BEGIN} or {END}; put both where the tables belong", file=sys.stderr)
        return 1
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
