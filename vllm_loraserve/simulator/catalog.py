"""Workloads and machines by name, for the command line and the benchmarks."""

from __future__ import annotations

import re
from collections.abc import Callable

from vllm_loraserve.simulator.machine import MACHINES, Machine
from vllm_loraserve.simulator.workload import (
    ARRIVALS,
    POPULARITIES,
    Trace,
    Workload,
    burst,
    churn,
    named_replay,
    paper_workload,
    replay,
    zipf,
)

PAPER_SIX = tuple(f"{a}-{p}" for a in ARRIVALS for p in POPULARITIES)
NUMBERED = ("replay", "zipf", "burst", "churn")

Generate = Callable[[float, int], Workload]
"""(requests/s, seed) -> workload."""


class CatalogError(ValueError):
    """An unknown name; the message lists the known ones."""


def machine(name: str) -> Machine:
    """A ready-made machine."""
    if name not in MACHINES:
        raise CatalogError(f"unknown machine {name!r}; known: {', '.join(MACHINES)}")
    return MACHINES[name]


def generator(name: str, on: Machine, trace: Trace, duration_s: float) -> Generate:
    """The generator of workload `name`: one of the paper's six ("poisson-shifting-skew"), "replay-N",
    "zipf-N", "burst-N", "churn-N" with N adapters, or "replay-named" for a trace that names its adapters.

    A replay runs as much of the trace as fits `duration_s` at the rate asked for.
    """
    if name in PAPER_SIX:
        arrivals, popularity = name.split("-", 1)
        return lambda rate, seed: paper_workload(on, arrivals, popularity, rate, duration_s, seed, trace)
    if name == "replay-named":
        return lambda rate, seed: named_replay(on, _part(trace, rate, duration_s, seed), rate, seed)
    found = re.fullmatch(rf"({'|'.join(NUMBERED)})-(\d+)", name)
    if found is None:
        known = ", ".join((*PAPER_SIX, *(f"{n}-N" for n in NUMBERED), "replay-named"))
        raise CatalogError(f"unknown workload {name!r}; known: {known}")
    kind, count = found[1], int(found[2])
    if kind == "replay":
        return lambda rate, seed: replay(on, _part(trace, rate, duration_s, seed), rate, count, seed)
    make = {"zipf": zipf, "burst": burst, "churn": churn}[kind]
    return lambda rate, seed: make(on, count, rate, duration_s, seed, trace)


def _part(trace: Trace, rate: float, duration_s: float, seed: int) -> Trace:
    """About rate x duration requests of the trace in a row. Different seeds start at different places, the same seed at
    the same one for every rate."""
    return trace.around((seed * 7919) % len(trace.arrival), max(int(rate * duration_s), 1))
