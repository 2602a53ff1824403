"""What a simulated instance is made of: step cost, limits, links; and the two ready-made machines.

A `Machine` is the hardware and its engine settings; `Kernels` says which rank a token pays for. Ready-made
machines are *modelled* (rooflines and published figures), not measured; a measured `OperatingPoints` file
replaces their step cost with `with_points`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from vllm_loraserve.cluster.operating_points import (
    H100_8B_STEP_COST,
    OperatingPoints,
    OperatingPointsError,
    StepCost,
    points_from_step_cost,
)
from vllm_loraserve.cluster.placement import AdapterSpec, ServerSpec


class Kernels(StrEnum):
    """Which rank a token's LoRA work is charged at."""

    PADDED = "padded"
    """Stock vLLM: everybody pays the configured maximum rank, in time and in arena rows; loads stall the
    step."""
    MAX_IN_BATCH = "max-in-batch"
    """S-LoRA, the paper's world: everybody in a step pays the largest rank of that step; memory is paged by
    rank."""
    S_LORA = "s-lora"
    """The same, less generous to separating ranks: prompts pay the largest rank of the step's prompts, decodes that
    of its decodes."""
    RANK_AWARE = "rank-aware"
    """Ours: every token pays its own adapter's rank."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One instance: engine limits in tokens, rank rows and bytes; links in bytes/s; latencies in seconds."""

    name: str = "machine"
    step_cost: StepCost = H100_8B_STEP_COST
    max_batched_tokens: int = 2048
    max_seqs: int = 256
    kv_tokens: int = 300_000
    kv_block: int = 0
    """Tokens of a KV block (vLLM: 16 on most GPUs, 128 on a CPU): a request takes blocks as it grows, and the last one
    that was admitted gives way when none is left. 0: a request holds its prompt and output from admission on."""
    arena_rows: int = 2048
    slots: int = 0
    """Most distinct adapters resident in the arena; 0: as many as fit."""
    host_bytes: int = 200 * 2**30
    max_rank: int = 128
    row_bytes: int = 5_242_880
    """Bytes of one rank row of the model (all modules, all workers): adapter bytes = rank x row_bytes."""
    page_rows: int = 8
    speed: float = 1.0
    h2d_bytes_s: float = 25e9
    net_bytes_s: float = 25e9
    disk_bytes_s: float = 2e9
    load_latency_s: float = 1e-3
    fetch_latency_s: float = 2e-3
    disk_latency_s: float = 20e-3
    beside: StepCost | None = None
    """Instances that share a host's cores: what a step costs while another one is busy (None: the same as alone)."""
    schedules_ahead: bool = False
    """Asynchronous scheduling: the step after the running one is fixed already, so an arrival joins the one after."""

    def adapter(self, name: str, rank: int) -> AdapterSpec:
        """The spec of an adapter of `rank` that targets all modules of this machine's model."""
        rows = -(-rank // self.page_rows) * self.page_rows
        return AdapterSpec(name, rank, rows, rows * self.row_bytes)

    def server(self, name: str) -> ServerSpec:
        """What placement is told about an instance on this machine."""
        return ServerSpec(name, self.arena_rows, self.host_bytes, 0, self.speed)

    def with_points(self, points: OperatingPoints) -> Machine:
        """This machine with the step cost of a measured operating-point file."""
        if points.step_cost is None:
            raise OperatingPointsError(
                "operating points: the file has no `step_cost`; run `vllm-loraserve profile` again to fit one"
            )
        return msgspec.structs.replace(self, step_cost=points.step_cost)

    def operating_points(self) -> OperatingPoints:
        """OP[r] that follow from the step cost (what profiling this machine at homogeneous rank would
        find)."""
        return OperatingPoints(
            points=points_from_step_cost(
                self.step_cost, tokens_per_step=float(self.max_batched_tokens), adapters_per_step=5.0
            ),
            step_cost=self.step_cost,
            device=self.name,
            slo="85 % utilisation",
        )


PAPER = Machine(
    name="paper: Llama-7B, TP 4, A100-40GB, S-LoRA kernels (modelled)",
    # Llama-7B on four A100s under S-LoRA: about 8 requests/s per server at Azure lengths (the paper's weak
    # scaling: 32 requests/s on 4 servers). Rank 128 costs a prompt token 1.73x of rank 8, with which a rank-8
    # request beside rank-128 ones sees about the paper's P95 TTFT, 84 % worse than beside rank 8. Decode pays
    # little for rank, as the paper's unchanged TBT shows.
    step_cost=StepCost(
        base=1.2e-2,
        prefill_token=5.5e-5,
        prefill_token_rank=3.5e-7,
        decode_token=3.0e-5,
        decode_token_rank=1.0e-7,
        rank_row=3.0e-7,
        adapter=2.0e-5,
        context_token=3.0e-8,
    ),
    kv_tokens=240_000,
    arena_rows=4096,
    host_bytes=400 * 2**30,
    row_bytes=2 * 2**20,  # attention projections only, fp16: 16 MiB at rank 8
)
"""The paper's set-up; the calibration is ours, from the figures that are public."""

H100 = Machine(
    name="H100-80GB, 8B Llama, rank-aware kernels (modelled)",
    kv_tokens=310_000,
    arena_rows=2048,
    host_bytes=100 * 2**30,
)
"""One H100 with an 8B Llama: 10 GiB of arena for 2,048 rank rows."""

L4 = Machine(
    name="24 GB GPU, 8B Llama fp8, rank-aware kernels (modelled)",
    # 242 TFLOP/s fp8 dense at 60 %, 300 GB/s: about 1/4 of the H100 in compute, 1/10 in bandwidth.
    step_cost=StepCost(
        base=3.0e-2,
        prefill_token=1.1e-4,
        prefill_token_rank=6.0e-7,
        decode_token=2.0e-5,
        decode_token_rank=1.0e-7,
        rank_row=1.75e-5,
        adapter=6.0e-5,
        context_token=2.2e-7,
    ),
    max_seqs=128,
    kv_tokens=70_000,
    arena_rows=512,
    host_bytes=24 * 2**30,
    h2d_bytes_s=12e9,
    net_bytes_s=3e9,
)
"""A small inference GPU, where memory and not compute decides how many adapters a server can serve."""

MACHINES = {"paper": PAPER, "h100": H100, "l4": L4}
