"""What no placement and no routing can beat: the cluster as one machine with one queue.

`pooled` joins `n` servers into one that steps all their batches together. It knows no imbalance (one queue, first come
first served, so no server idles while another one queues), no second copy (an adapter's rows are read once a step,
not once on every server that runs it), no fragmentation of arenas and KV caches, and no interference (every token pays
its own rank). Real systems have all of these, so the highest rate of the pooled machine within an SLO bounds theirs
from above, as long as they serve each queue in order of arrival, as all of them do. What remains of a step is exactly
what the servers would do at the same time: the base cost once, everything that grows with tokens, rows or adapters
divided by `n`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_loraserve.simulator.machine import Kernels, Machine
from vllm_loraserve.simulator.results import Result
from vllm_loraserve.simulator.simulation import Abort, simulate
from vllm_loraserve.simulator.systems import System
from vllm_loraserve.simulator.workload import Workload

SHARED = (
    "prefill_token",
    "prefill_token_rank",
    "decode_token",
    "decode_token_rank",
    "rank_row",
    "adapter",
    "context_token",
)
"""Terms of the step cost that `n` servers divide among themselves."""
SYSTEM = System(name="bound", policy="random", period_s=0.0)
"""With one server there is nothing to place and nothing to choose."""


def pooled(machine: Machine, n: int) -> Machine:
    """One machine in place of `n` of `machine`; raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"bound: {n} servers; give at least one")
    cost = machine.step_cost
    return msgspec.structs.replace(
        machine,
        name=f"{n} x {machine.name}, pooled",
        step_cost=msgspec.structs.replace(cost, **{term: getattr(cost, term) / n for term in SHARED}),
        beside=None,
        max_batched_tokens=machine.max_batched_tokens * n,
        max_seqs=machine.max_seqs * n,
        kv_tokens=machine.kv_tokens * n,
        arena_rows=machine.arena_rows * n,
        slots=machine.slots * n,
        host_bytes=machine.host_bytes * n,
        h2d_bytes_s=machine.h2d_bytes_s * n,
        net_bytes_s=machine.net_bytes_s * n,
        disk_bytes_s=machine.disk_bytes_s * n,
        # One load after the other, where `n` servers have as many under way.
        load_latency_s=machine.load_latency_s / n,
        fetch_latency_s=machine.fetch_latency_s / n,
        disk_latency_s=machine.disk_latency_s / n,
    )


def simulate_bound(workload: Workload, machines: Sequence[Machine], *, abort: Abort | None = None) -> Result:
    """Runs `workload` on the pool of `machines` (all alike); see the module's text. Raises ValueError when they
    differ."""
    first = machines[0]
    if any(m != first for m in machines):
        raise ValueError("bound: the machines differ; a pool is made of equal ones")
    return simulate(workload, [pooled(first, len(machines))], SYSTEM, Kernels.RANK_AWARE, abort=abort)
