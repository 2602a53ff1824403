"""What `cluster_sim.py` says of its own tables: the ratios that the project promises, with confidence intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from vllm_loraserve.simulator.systems import STATIC_SLORA

Figures = dict[str, dict[str, dict[str, Any]]]
"""World -> workload -> system -> figures."""
Bounds = dict[str, dict[str, list[float]]]
"""World -> workload -> highest rate of the pooled machine, by seed."""


def ratio_with_interval(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Geometric mean of the paired ratios and its 95 % confidence interval (t distribution over the
    seeds)."""
    logs = np.log(np.array(ours) / np.maximum(np.array(theirs), 1e-9))
    mean = float(logs.mean())
    half = 0.0
    if len(logs) > 1:
        half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def conclusions(figures: Figures, bounds: Bounds, most_servers: int) -> dict[str, Any]:
    """The figures that the project promises, computed from the tables. `most_servers`: so many were tried at most where
    servers for a load were counted."""

    def by_seed(world: str, workload: str, system: str) -> list[float]:
        return list(figures[world][workload][system]["max_rps_slo_by_seed"])

    out: dict[str, Any] = {}
    if "max-in-batch" in figures:
        table = figures["max-in-batch"]
        worst = {
            w: ratio_with_interval(
                by_seed("max-in-batch", w, "loraserve"),
                np.min([by_seed("max-in-batch", w, s) for s in STATIC_SLORA], axis=0).tolist(),
            )
            for w in table
        }
        toppings = {
            w: ratio_with_interval(by_seed("max-in-batch", w, "loraserve"), by_seed("max-in-batch", w, "toppings"))
            for w in table
        }

        def saved(versus: tuple[str, ...]) -> float:
            """Largest share of servers that loraserve saves against the worst of `versus`."""
            return max(
                1.0 - r["loraserve"]["gpus_for_load"] / max(r[s]["gpus_for_load"] or most_servers + 1 for s in versus)
                for r in table.values()
                if r["loraserve"]["gpus_for_load"]
            )

        out["paper"] = {
            "loraserve_over_worse_static": worst,
            "loraserve_over_toppings": toppings,
            "loraserve_over_toppings_mean": math.exp(float(np.mean([math.log(v["ratio"]) for v in toppings.values()]))),
            "gpus_saved_over_static_up_to": saved(STATIC_SLORA),
            "gpus_saved_over_toppings_up_to": saved(("toppings",)),
            **{
                f"{key}_ratio_to_toppings_up_to": max(
                    (r["toppings"][key] / r["loraserve"][key] for r in table.values() if r["loraserve"][key]),
                    default=0.0,
                )
                for key in ("adapters_per_server", "placed_per_server", "placed_per_server_at_load")
            },
            "p95_ttft_ratio_to_worse_static_up_to": max(
                max(r[s]["p95_ttft_s"] for s in STATIC_SLORA) / max(r["loraserve"]["p95_ttft_s"], 1e-3)
                for r in table.values()
            ),
        }
    for world in figures:
        if world == "max-in-batch":
            continue
        rows = {}
        for workload, by_system in figures[world].items():
            others = [s for s in by_system if s != "loraserve+"]
            best = max(others, key=lambda s: by_system[s]["max_rps_slo"])
            rows[workload] = {
                "best_other": best,
                **ratio_with_interval(by_seed(world, workload, "loraserve+"), by_seed(world, workload, best)),
                "bound_over_best_other": ratio_with_interval(bounds[world][workload], by_seed(world, workload, best))[
                    "ratio"
                ],
                "share_of_bound": ratio_with_interval(by_seed(world, workload, "loraserve+"), bounds[world][workload])[
                    "ratio"
                ],
            }
        out[world] = {"loraserve+_over_best_other": rows}
    return out
