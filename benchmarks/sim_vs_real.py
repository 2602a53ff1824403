"""Is the simulator right? The same trace on two real instances and in the simulator, side by side.

Starts a whole cluster (coordinator, router, two vLLM instances with the plugin) on this machine and replays pieces of a
trace with adapters of several ranks through the router. The first pieces calibrate: all requests at once, a replay at
half the rate at which those finished, and all at once again. The instances' schedule traces of these give the step cost
while the other instance is idle, and while it computes (they share the machine's cores). Then other pieces are replayed
at given loads, and the simulator runs with these measurements on the very same requests. Reported of both: throughput,
P50 and P95 time to first token; and the relative errors. The placement is the real coordinator's, read before each
replay and left alone during it: what is compared is the model of the instances and of routing. A load below 1 is the
share of time that the simulated instances are busy, one above 1 a multiple of the rate at which they finish requests
that are all there at once.

Each instance runs its worker inside the engine core's process (`--executor uni`). With `mp`, vLLM's default on a CPU,
an instance's two processes wait for one another by polling, so that two instances want four cores where each of them
computes on one; the simulator models no such waits (`--executor mp` shows what they do).

Lengths and arrivals are those of an Azure 2023 trace file (`--trace`; else synthetic ones like it), lengths divided by
`--shrink` so that a small model on a CPU keeps up; who asks for which adapter is drawn (no public trace says). Prompts
are random token ids, outputs have exactly the length that the trace says.

    python benchmarks/sim_vs_real.py --trace azure-llm-2023-conv.csv --json benchmarks/results/sim_vs_real.json \
        --plot docs/images/sim-vs-real.png
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np

from vllm_loraserve.cluster.fit import Fit, predict_step
from vllm_loraserve.cluster.operating_points import OperatingPoints, points_from_step_cost
from vllm_loraserve.cluster.placement import Placement
from vllm_loraserve.cluster.traced_steps import alone_and_beside, fit_without_outliers, read_steps
from vllm_loraserve.coordinator.client import CoordinatorClient
from vllm_loraserve.coordinator.messages import GetTable, RoutingTable
from vllm_loraserve.coordinator.profile import make_like
from vllm_loraserve.coordinator.profiling import Profiler, connector
from vllm_loraserve.coordinator.profiling import Workload as ProfileWorkload
from vllm_loraserve.launcher import assets
from vllm_loraserve.launcher.cluster import Cluster
from vllm_loraserve.launcher.demo import plan_for
from vllm_loraserve.simulator.machine import Kernels, Machine
from vllm_loraserve.simulator.results import Result
from vllm_loraserve.simulator.simulation import simulate
from vllm_loraserve.simulator.systems import RoutingMode, System
from vllm_loraserve.simulator.traces import read_trace
from vllm_loraserve.simulator.workload import Trace, Workload, synthetic_trace

RANKS = (8, 16, 32, 64, 128)
PER_RANK = 2
MAX_BATCHED_TOKENS = 512
MAX_SEQS = 32
MAX_MODEL_LEN = 1024
VOCABULARY = (1000, 20000)
CALIBRATION_LOAD = 0.5


class Busy:
    """CPU taken by others: what the machine was busy for, less this process and its children (Linux; else 0)."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = [os.getpid(), *pids]
        self._start = self._read()

    def share(self) -> float:
        """CPUs' worth that others have used since the start, as a share of all CPUs."""
        total, busy, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return max(0.0, (busy - own) / max(total, 1e-9))

    def _read(self) -> tuple[float, float, float]:
        try:
            values = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
            own = 0
            for pid in self._pids:
                with contextlib.suppress(OSError):
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    own += int(fields[11]) + int(fields[12])
        except OSError:
            return 0.0, 0.0, 0.0
        idle = values[3] + values[4]
        return float(sum(values)), float(sum(values) - idle), float(own)


class Replay(msgspec.Struct):
    """What one replay showed; seconds and tokens/s."""

    ttft: list[float]
    tokens_per_s: float
    duration_s: float


def make_trace(options: argparse.Namespace) -> Trace:
    """The trace with its lengths divided by `--shrink` and cut to what the small model takes."""
    trace = read_trace(options.trace) if options.trace else synthetic_trace(seed=options.seed)
    prompt = np.clip(trace.prompt // options.shrink, 4, 384)
    output = np.clip(trace.output // options.shrink, 2, 96)
    return msgspec.structs.replace(trace, prompt=prompt, output=output)


def make_workload(trace: Trace, machine: Machine, count: int, start: int, seed: int) -> Workload:
    """`count` requests of the trace from `start` on; adapters with Zipf popularity, ranks shuffled over it."""
    rng = np.random.default_rng([seed, start])
    adapters = [machine.adapter(f"rank{r}-{i}", r) for r in RANKS for i in range(PER_RANK)]
    weights = 1.0 / np.arange(1, len(adapters) + 1)
    popular = np.random.default_rng(seed).permutation(len(adapters))
    part = slice(start, start + count)
    arrival = trace.arrival[part] - trace.arrival[start]
    return Workload(
        name=f"{trace.name}[{start}:{start + count}]",
        adapters=adapters,
        arrival=arrival,
        adapter=popular[rng.choice(len(adapters), count, p=weights / weights.sum())].astype(np.int64),
        prompt=trace.prompt[part],
        output=trace.output[part],
    )


class Calibration(msgspec.Struct):
    """What is measured of the instances before the replays; seconds."""

    alone: Fit
    beside: Fit
    """The step cost while the other instance computes."""
    outside: float
    """Of a request's time to first token, what is spent outside of the engine, the router included."""
    slower: float
    """How many times as long a step takes beside a busy neighbour as the step cost alone says (median)."""
    left_out: int
    """Steps that were not used, since something else held them up."""


def calibration(trace: Path, short: list[float], short_until: float, since: float) -> Calibration:
    """From the schedule trace: steps from `since` on give the step cost. `short`: times to first token of single short
    prompts, which ran before `short_until` (both Unix times)."""
    steps = read_steps(trace.read_text().splitlines())
    prompts = [s.sample.seconds for s in steps if s.start < short_until and s.sample.prefill_tokens]
    alone, beside = alone_and_beside(s for s in steps if s.start >= since)
    fit, left_alone = fit_without_outliers(alone)
    fit_beside, left_beside = fit_without_outliers(beside)
    return Calibration(
        fit,
        fit_beside,
        outside=max(0.0, statistics.median(short) - statistics.median(prompts)),
        slower=statistics.median(s.seconds / predict_step(fit.cost, s) for s in beside),
        left_out=left_alone + left_beside,
    )


def calibrate(router: str, trace: Path, pieces: list[Workload], model: str, seed: int) -> Calibration:
    """Replays three pieces and reads what they leave in the schedule trace; see the module's text."""
    short = asyncio.run(short_requests(router, model))
    short_until = time.time()
    names = [a.name for a in pieces[0].adapters]
    _say(f"all of {len(pieces[0].arrival)} requests at once, to warm up")
    drained = asyncio.run(replay(router, pieces[0].scaled(1e6), names, seed))
    since = time.time()
    rate = CALIBRATION_LOAD * len(pieces[0].arrival) / drained.duration_s
    _say(f"measuring step costs at {rate:.2f} requests/s")
    asyncio.run(replay(router, pieces[1].scaled(rate), names, seed))
    _say("and all at once again")
    asyncio.run(replay(router, pieces[2].scaled(1e6), names, seed))
    return calibration(trace, short, short_until, since)


async def short_requests(router: str, model: str) -> list[float]:
    """Times to first token of short prompts, one after the other."""
    shape = ProfileWorkload(vocabulary=VOCABULARY)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector()) as session:
        profiler = Profiler(session, router, shape)
        # A second token, so that another step follows the prompt's, whose length is then known.
        return [await profiler.first_token_s(model, 8, 2) for _ in range(15)]


async def block_tokens(url: str) -> int:
    """Tokens of a KV block of the instance, from its `/metrics`."""
    async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as answer:
        text = await answer.text()
    found = re.search(r'cache_config_info\{[^}]*block_size="(\d+)"', text)
    if found is None:
        raise RuntimeError(f"{url}/metrics names no block_size")
    return int(found[1])


async def replay(url: str, workload: Workload, names: list[str], seed: int) -> Replay:
    """Sends the workload's requests at their times through the router; raises RuntimeError when one fails."""
    rng = random.Random(seed)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        start = time.monotonic() + 0.2

        async def one(i: int) -> tuple[float, float]:
            prompt = [rng.randrange(*VOCABULARY) for _ in range(int(workload.prompt[i]))]
            body = {
                "model": names[int(workload.adapter[i])],
                "prompt": prompt,
                "max_tokens": int(workload.output[i]),
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            due = start + float(workload.arrival[i])
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            first = 0.0
            async with session.post(url + "/v1/completions", json=body) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"request {i}: {answer.status}: {(await answer.text())[:300]}")
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        if b'"error"' in line:
                            raise RuntimeError(f"request {i}: {line!r}")
                        first = first or time.monotonic()
            return first - due, time.monotonic()

        done = await asyncio.gather(*(one(i) for i in range(len(workload.arrival))))
    duration = max(end for _, end in done) - start
    tokens = int((workload.prompt + workload.output).sum())
    return Replay([ttft for ttft, _ in done], tokens / duration, duration)


def at_load(
    workload: Workload, machine: Machine, system: System, points: OperatingPoints, load: float, placement: Placement
) -> Workload:
    """The workload stretched in time to a load (see the module's text)."""
    if load > 1.0:
        together = workload.scaled(1e6)
        drained = simulate(together, [machine] * 2, system, Kernels.RANK_AWARE, op=points, placement=placement)
        return workload.scaled(load * len(workload.arrival) / drained.duration_s)
    low, high = 0.01, 100.0
    for _ in range(18):
        rate = (low * high) ** 0.5
        result = simulate(
            workload.scaled(rate), [machine] * 2, system, Kernels.RANK_AWARE, op=points, placement=placement
        )
        low, high = (rate, high) if statistics.mean(result.busy) < load else (low, rate)
    return workload.scaled(low)


def placement_of(table: RoutingTable) -> Placement:
    """The coordinator's placement with the simulator's names of the servers."""
    server = {entry.name: f"s{i:04d}" for i, entry in enumerate(table.instances)}
    return Placement(phi={a.adapter.name: {server[r.instance]: r.phi for r in a.routes} for a in table.adapters})


def write_profile(coordinator: str, like: Path, scratch: Path, out: Path) -> None:
    """Runs `vllm-loraserve profile` on the first instance, in a form short enough for a small model on a CPU."""
    _say(f"vllm-loraserve profile, to {out}")
    command = [sys.executable, "-m", "vllm_loraserve.cli", "profile", "--coordinator", coordinator]
    command += ["--instance", "instance-0", "--like", str(like), "--scratch", str(scratch), "--out", str(out)]
    command += ["--ranks", "8,128", "--adapters", "1", "--concurrency", "8", "--trial", "10"]
    command += ["--prompt-tokens", "96", "--output-tokens", "24", "--slo-ttft", "1"]
    subprocess.run(command, check=True)


async def touch(url: str, models: list[str]) -> None:
    """One short request for each adapter, so that all are resident: the replays measure no first loads."""
    async with aiohttp.ClientSession() as session:
        for model in models:
            body = {"model": model, "prompt": [1000], "max_tokens": 1}
            async with session.post(url + "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                await answer.read()


def compare(real: Replay, simulated: Result, outside: float) -> dict[str, float]:
    """Both sides and the relative errors; `outside`, seconds a request spends outside of the engine, is added to the
    simulated TTFT."""
    out: dict[str, float] = {}
    ttft = np.asarray(simulated.ttft) + outside
    for name, measured, predicted in (
        ("tokens_per_s", real.tokens_per_s, simulated.tokens_per_s),
        ("p50_ttft_s", float(np.percentile(real.ttft, 50)), float(np.percentile(ttft, 50))),
        ("p95_ttft_s", float(np.percentile(real.ttft, 95)), float(np.percentile(ttft, 95))),
    ):
        out |= {f"real_{name}": measured, f"sim_{name}": predicted, f"error_{name}": predicted / measured - 1.0}
    return out


async def routing_table(endpoint: str) -> RoutingTable:
    async with CoordinatorClient(endpoint) as client:
        return await client.ask(GetTable(), RoutingTable)


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    model = assets.model_path(options.model)
    words = assets.adapters(model)
    made = scratch / "adapters"
    names = {r: [f"rank{r}-{i}" for i in range(PER_RANK)] for r in RANKS}
    for rank, group in names.items():
        for i, name in enumerate(group):
            make_like(words[0].path, made / name, rank, seed=rank + i)
    plan = plan_for(model, words, scratch / "state", instances=2, port=None)
    plan_options = ["--no-enable-prefix-caching", "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)]
    plan_options += ["--max-num-seqs", str(MAX_SEQS), "--max-model-len", str(MAX_MODEL_LEN), "--enable-chunked-prefill"]
    plan_options += ["--max-loras", str(len(RANKS) * PER_RANK)]
    plan_options += ["--loraserve-config.host_gib", "2"]  # room for all adapters on both: no fetch while measuring
    # The simulator does not model the bound on prefill of large ranks beside decodes.
    plan_options += ["--loraserve-config.lora_share", "null"]
    steps = scratch / "steps.jsonl"
    plan_options += ["--loraserve-config.trace_schedule", str(steps)]
    if options.executor == "uni":
        plan_options += ["--distributed-executor-backend", "uni"]
    plan = dataclasses.replace(
        plan,
        adapter_roots=(str(made),),
        vllm_options=_without(plan.vllm_options, plan_options) + tuple(plan_options),
        # Placed as adapters are registered, and then left alone: a replay must not change what is compared.
        coordinator_options=("--policy", options.policy, "--rebalance", "3600"),
    )
    _say(f"starting two instances of {plan.model_name}")
    cluster = Cluster(plan)
    if options.executor == "uni":
        for server in cluster.instances:
            # Else vLLM takes `mp` on a CPU whatever is asked for, so as to bind OpenMP's threads, which the launcher
            # leaves unbound here.
            server.env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with cluster.running():
        for group in names.values():
            for name in group:
                cluster.add_adapter(name, made / name)
        pids = [pid for server in cluster.servers for pid in server.pids()]
        router = cluster.url
        asyncio.run(touch(router, [name for group in names.values() for name in group]))
        table = asyncio.run(routing_table(cluster.coordinator_endpoint))
        capacity = table.instances[0].capacity
        block = asyncio.run(block_tokens(cluster.instance_url(0)))
        machine = Machine(
            name="measured",
            max_batched_tokens=MAX_BATCHED_TOKENS,
            max_seqs=MAX_SEQS,
            kv_tokens=capacity.kv_tokens - block,  # vLLM keeps one block for itself
            kv_block=block,
            arena_rows=capacity.rank_rows,
            max_rank=max(RANKS),
            row_bytes=max(1, table.adapters[0].adapter.size_bytes // table.adapters[0].adapter.rank),
            schedules_ahead=False,  # vLLM turns asynchronous scheduling off on a CPU
        )
        trace = make_trace(options)
        pieces = [make_workload(trace, machine, options.requests, i * options.requests, options.seed) for i in range(3)]
        others = Busy(pids)
        found = calibrate(router, steps, pieces, names[RANKS[0]][0], options.seed)
        others_calibrating = others.share()
        fit = found.alone
        machine = msgspec.structs.replace(machine, step_cost=fit.cost, beside=found.beside.cost)
        _say(
            f"mean error of the fit {fit.relative_error:.1%} ({fit.samples} steps), beside a neighbour "
            f"{found.beside.relative_error:.1%} ({found.beside.samples}), {found.left_out} left out; steps take "
            f"{found.slower:.2f} times as long there; {found.outside * 1e3:.1f} ms outside the engine"
        )
        if options.profile is not None:
            write_profile(cluster.coordinator_endpoint, words[0].path, made, options.profile)
        points = OperatingPoints(points=points_from_step_cost(fit.cost), step_cost=fit.cost, measured=True)
        # What the real router does where no operating points are given.
        system = System(name=options.policy, policy=options.policy, routing=RoutingMode.PHI_LIVE, period_s=0.0)
        runs = []
        for number, load in enumerate(options.loads, len(pieces)):
            base = make_workload(trace, machine, options.requests, number * options.requests, options.seed)
            placement = placement_of(asyncio.run(routing_table(cluster.coordinator_endpoint)))
            workload = at_load(base, machine, system, points, load, placement)
            _say(f"load {load:g}: {workload.rate:.2f} requests/s, {workload.arrival[-1]:.0f} s")
            others = Busy(pids)
            real = asyncio.run(replay(cluster.url, workload, [a.name for a in workload.adapters], options.seed))
            others_share = others.share()
            simulated = simulate(workload, [machine] * 2, system, Kernels.RANK_AWARE, op=points, placement=placement)
            runs.append(
                {"load": load, "rate": workload.rate, "requests": options.requests, "cpu_of_others": others_share}
                | compare(real, simulated, found.outside)
            )
            runs[-1]["ttft_s"] = {"real": real.ttft, "simulated": (simulated.ttft + found.outside).tolist()}
            _show(runs[-1])
    return {
        "policy": options.policy,
        "executor": options.executor,
        "step_cost": msgspec.structs.asdict(fit.cost),
        "step_cost_fit_error": fit.relative_error,
        "step_cost_samples": fit.samples,
        "step_cost_beside": msgspec.structs.asdict(found.beside.cost),
        "step_cost_beside_fit_error": found.beside.relative_error,
        "step_cost_beside_samples": found.beside.samples,
        "steps_left_out": found.left_out,
        "times_as_long_beside": found.slower,
        "kv_tokens": machine.kv_tokens,
        "kv_block": machine.kv_block,
        "outside_engine_s": found.outside,
        "cpu_of_others_while_calibrating": others_calibrating,
        "trace": Path(options.trace).name if options.trace else "synthetic",
        "shrink": options.shrink,
        "runs": runs,
        "worst_abs_error": {
            key: max(abs(run[f"error_{key}"]) for run in runs) for key in ("tokens_per_s", "p50_ttft_s", "p95_ttft_s")
        },
    }


def _without(options: tuple[str, ...], replaced: list[str]) -> tuple[str, ...]:
    """`options` less those that `replaced` sets anew (each `--name value`)."""
    names = {o for o in replaced if o.startswith("--")}
    kept: list[str] = []
    position = 0
    while position < len(options):
        width = 2 if position + 1 < len(options) and not options[position + 1].startswith("--") else 1
        if options[position] not in names:
            kept += options[position : position + width]
        position += width
    return tuple(kept)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(run: dict[str, float]) -> None:
    print(f"load {run['load']:g}, {run['rate']:.2f} requests/s; others took {run['cpu_of_others']:.0%} of the CPUs")
    print(f"  {'':28} {'real':>10} {'simulated':>10} {'error':>8}")
    for key, label in (("tokens_per_s", "tokens/s"), ("p50_ttft_s", "P50 TTFT, s"), ("p95_ttft_s", "P95 TTFT, s")):
        print(
            f"  {label:28} {run[f'real_{key}']:10.3f} {run[f'sim_{key}']:10.3f} {run[f'error_{key}']:+8.1%}", flush=True
        )


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Distribution of TTFT, real beside simulated, for each load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(4 * len(runs), 3.2), sharey=True, squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        for side, style in (("real", "-"), ("simulated", "--")):
            values = np.sort(run["ttft_s"][side])
            axis.plot(values, np.arange(1, len(values) + 1) / len(values), style, label=side)
        axis.set_title(f"load {run['load']:g}, {run['rate']:.2f} requests/s", fontsize=10)
        axis.set_xlabel("time to first token, s")
        axis.axhline(0.95, color="grey", linewidth=0.5)
    axes[0][0].set_ylabel("share of requests")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the distributions of TTFT there")
    parser.add_argument("--trace", type=Path, help="CSV with time, input and output tokens")
    parser.add_argument("--model", help="model directory (default: the test model)")
    parser.add_argument("--policy", default="loraserve", help="placement policy of both sides")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.75, 1.2], help="shares of the capacity")
    parser.add_argument("--requests", type=int, default=120, help="requests per load")
    parser.add_argument("--executor", choices=("mp", "uni"), default="uni", help="of both instances")
    parser.add_argument("--shrink", type=int, default=8, help="divisor of the trace's lengths")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="also run `vllm-loraserve profile`, writing FILE")
    parser.add_argument("--requests-too", action="store_true", help="write every request's time to first token, too")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sim-vs-real-") as scratch:
        result = measure(options, Path(scratch))
    if options.plot is not None:
        draw(result["runs"], options.plot)
    if not options.requests_too:
        for run in result["runs"]:
            del run["ttft_s"]
    if options.json is not None:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": f"{os.cpu_count()} CPUs {platform.machine()}, Python {platform.python_version()}",
            "command": " ".join(["python", "benchmarks/sim_vs_real.py", *sys.argv[1:]]),
        }
        options.json.write_text(json.dumps(about | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
