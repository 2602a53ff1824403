"""Pictures of simulated runs: throughput against the SLO, TTFT distribution, instances needed, load over
time.

Needs matplotlib (the `plot` extra); a missing one is a clear error, not a silent absence of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_loraserve.simulator.results import Result

STYLE = {
    "random": ("#9aa0a6", ":"),
    "contiguous": ("#5f6368", ":"),
    "toppings": ("#e8710a", "-"),
    "hrw": ("#12a4af", "--"),
    "min-cost-flow": ("#1a73e8", "--"),
    "dlora-proactive": ("#9334e6", "--"),
    "rank-weighted": ("#b8860b", "-."),
    "loraserve": ("#188038", "-"),
    "loraserve+": ("#d93025", "-"),
}
"""Colour and line of each system: the same in every picture."""


class PlotError(RuntimeError):
    """A picture that cannot be drawn; the message says what to install."""


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as e:
        raise PlotError("pictures need matplotlib; install `vllm-loraserve[plot]` or leave --plots away") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _style(name: str) -> dict[str, Any]:
    colour, line = STYLE.get(name, ("#000000", "-"))
    return {"color": colour, "linestyle": line, "linewidth": 2.4 if name.startswith("loraserve") else 1.5}


def _save(plt: Any, figure: Any, path: str | Path) -> Path:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return Path(path)


def slo_throughput(
    curves: Mapping[str, Sequence[tuple[float, float]]], slo_s: float, title: str, path: str | Path
) -> Path:
    """P95 TTFT against offered requests/s; `curves`: system -> [(requests/s, P95 seconds)]."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, points in curves.items():
        ordered = sorted((x, min(y, 100.0 * slo_s)) for x, y in points)
        axes.plot([x for x, _ in ordered], [y for _, y in ordered], marker="o", ms=3, label=name, **_style(name))
    axes.axhline(slo_s, color="#444444", linewidth=1)
    axes.text(axes.get_xlim()[0], slo_s * 1.08, f" SLO {slo_s:g} s", fontsize=9, color="#444444")
    axes.set_yscale("log")
    axes.set_xlabel("offered requests/s")
    axes.set_ylabel("P95 time to first token (s)")
    axes.set_title(title)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, ncols=2, frameon=False)
    return _save(plt, figure, path)


def ttft_cdf(results: Sequence[Result], title: str, path: str | Path) -> Path:
    """Cumulative distribution of time to first token of each run (log time axis)."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for r in results:
        values = np.sort(np.where(np.isfinite(r.ttft), r.ttft, np.nan))
        share = np.arange(1, len(values) + 1) / max(len(values), 1)
        axes.plot(np.maximum(values, 1e-3), share, label=r.system, **_style(r.system))
    axes.axhline(0.95, color="#444444", linewidth=0.8)
    axes.text(1.1e-3 if not results else axes.get_xlim()[0] * 1.05, 0.955, "P95", fontsize=8, color="#444444")
    axes.set_xscale("log")
    axes.set_xlabel("time to first token (s)")
    axes.set_ylabel("share of requests")
    axes.set_ylim(0.0, 1.01)
    axes.set_title(title)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return _save(plt, figure, path)


def servers_needed(needed: Mapping[str, int], title: str, path: str | Path, most: int) -> Path:
    """Bars: fewest instances that carry the load within the SLO; 0 means not even `most`, the most that were
    tried."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.8))
    names = list(needed)
    bars = axes.bar(names, [needed[n] for n in names], color=[_style(n)["color"] for n in names])
    axes.bar_label(bars, labels=[str(needed[n]) if needed[n] else f"more than {most}" for n in names], fontsize=9)
    axes.set_ylabel("instances")
    axes.set_title(title)
    axes.tick_params(axis="x", labelrotation=25, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(plt, figure, path)


def load_over_time(results: Sequence[Result], path: str | Path) -> Path:
    """Load of each server over time (see `Result.load`), one panel per system; above 1 requests queue."""
    plt = _pyplot()
    shown = [r for r in results if r.load]
    if not shown:
        raise PlotError("load over time: the runs have no load samples; pass sample_s > 0 to simulate")
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(8, 1.5 * len(shown) + 0.6), sharex=True, sharey=True, squeeze=False
    )
    colours = plt.get_cmap("viridis")
    for axes, r in zip(panels[:, 0], shown, strict=True):
        time = [t for t, _ in r.load]
        for i in range(r.servers):
            axes.plot(time, [v[i] for _, v in r.load], color=colours(i / max(r.servers - 1, 1)), linewidth=1.2)
        axes.set_title(r.system, loc="left", fontsize=9, pad=2)
        axes.axhline(1.0, color="#444444", linewidth=0.8)
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.2)
    panels[-1, 0].set_xlabel("time (s)")
    panels[len(shown) // 2, 0].set_ylabel("tokens in flight / KV capacity, one line for each server")
    figure.tight_layout()
    return _save(plt, figure, path)


def ratio_bars(ratios: Mapping[str, Mapping[str, float]], baseline: str, title: str, path: str | Path) -> Path:
    """Grouped bars: workload -> system -> SLO throughput relative to `baseline` (which is drawn as the line
    at 1)."""
    plt = _pyplot()
    workloads = list(ratios)
    systems = [s for s in next(iter(ratios.values())) if s != baseline]
    figure, axes = plt.subplots(figsize=(max(8.0, 1.05 * len(workloads)), 4.2))
    width = 0.82 / max(len(systems), 1)
    for i, s in enumerate(systems):
        x = np.arange(len(workloads)) + (i - (len(systems) - 1) / 2) * width
        axes.bar(x, [ratios[w].get(s, 0.0) for w in workloads], width, label=s, color=_style(s)["color"])
    axes.axhline(1.0, color="#444444", linewidth=1)
    axes.set_xticks(np.arange(len(workloads)), workloads, rotation=25, ha="right", fontsize=8)
    axes.set_ylabel(f"throughput within the SLO / {baseline}")
    axes.set_title(title, pad=44)
    axes.legend(fontsize=8, ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    return _save(plt, figure, path)
