"""A small machine, and a run of hand-made requests on it."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_loraserve.cluster.operating_points import StepCost
from vllm_loraserve.simulator.machine import Kernels, Machine
from vllm_loraserve.simulator.results import Result
from vllm_loraserve.simulator.simulation import simulate
from vllm_loraserve.simulator.systems import SYSTEMS
from vllm_loraserve.simulator.workload import Workload

COST = StepCost(base=0.010, prefill_token=1e-4, prefill_token_rank=1e-6, decode_token=1e-3, rank_row=1e-5)
MACHINE = Machine(
    step_cost=COST,
    max_batched_tokens=100,
    kv_tokens=10_000,
    arena_rows=256,
    row_bytes=1000,
    load_latency_s=0.0,
    h2d_bytes_s=1e12,
)
STEP = 0.010 + 1e-3 + 8e-5
"""A decode step of one rank-8 request."""


def run(
    requests: list[tuple[float, int, int, int]],
    ranks: tuple[int, ...] = (8, 128),
    machine: Machine = MACHINE,
    kernels: Kernels = Kernels.RANK_AWARE,
    servers: int = 1,
    **kw: Any,
) -> Result:
    """`requests`: (arrival, adapter, prompt, output)."""
    columns = np.array(requests, dtype=float)
    workload = Workload(
        "test",
        [machine.adapter(f"a{i}", r) for i, r in enumerate(ranks)],
        columns[:, 0],
        columns[:, 1].astype(int),
        columns[:, 2].astype(int),
        columns[:, 3].astype(int),
    )
    return simulate(workload, [machine] * servers, SYSTEMS["rank-weighted"], kernels, **kw)
