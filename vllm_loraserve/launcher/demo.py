"""`vllm-loraserve demo`: a real cluster, six real adapters, mixed traffic, and a verdict.

Exit status 0 only if every answer was right.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError
from vllm_loraserve.coordinator.messages import GetTable, RoutingTable
from vllm_loraserve.launcher import assets, traffic
from vllm_loraserve.launcher.checks import check_vllm
from vllm_loraserve.launcher.cluster import Cluster, Plan
from vllm_loraserve.launcher.devices import this_machine
from vllm_loraserve.launcher.errors import StartError
from vllm_loraserve.launcher.processes import free_ports
from vllm_loraserve.launcher.progress import StartProgress
from vllm_loraserve.launcher.up import at_least_one, port_number

SMALL = ("--max-model-len", "1024", "--max-num-seqs", "32")
"""Options that make a small model start fast; what the demo asks for is short."""
SMALL_CPU = (*SMALL, "--kv-cache-memory-bytes", str(256 << 20), "--enforce-eager")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve demo`."""
    parser.add_argument("--instances", type=at_least_one, default=2, metavar="N", help="vLLM instances (default: 2)")
    parser.add_argument(
        "--requests", type=at_least_one, default=210, metavar="N", help="requests in all (default: 210)"
    )
    parser.add_argument(
        "--concurrency", type=at_least_one, default=16, metavar="N", help="requests at a time (default: 16)"
    )
    parser.add_argument("--model", metavar="DIR", help="a model directory in place of SmolLM2-135M-Instruct")
    parser.add_argument("--port", type=port_number, help="port of the router (default: a free one)")


def run(args: argparse.Namespace) -> int:
    """Exit status 0: every answer was right; 1: one was not, or the cluster did not start."""
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(stderr=True)
    state = Path(tempfile.mkdtemp(prefix="vllm-loraserve-demo-"))
    try:
        wrong = _demo(args, console, state)
    except (StartError, assets.AssetError, CoordinatorError, OSError, RuntimeError) as error:
        console.print(f"vllm-loraserve demo: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        console.print(f"the logs are in {state}/logs", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        shutil.rmtree(state, ignore_errors=True)
        return 130
    if wrong:
        console.print(f"{wrong} wrong answers; the logs are in {state}/logs", highlight=False, soft_wrap=True)
        return 1
    shutil.rmtree(state, ignore_errors=True)
    return 0


def plan_for(model: Path, words: Sequence[assets.WordAdapter], state: Path, instances: int, port: int | None) -> Plan:
    """A plan that fits the small model and the word adapters."""
    machine = this_machine()
    options: tuple[str, ...] = SMALL if machine.gpu_ids else SMALL_CPU
    if machine.slow_bfloat16:
        options += ("--dtype", "float32")
    return Plan(
        model=str(model),
        state=state,
        instances=instances,
        port=port or free_ports(1, 18000)[0],
        max_rank=max(word.rank for word in words),
        adapter_roots=(str(words[0].path.parent),),
        vllm_options=options,
        machine=machine,
    )


def _demo(args: argparse.Namespace, console: Console, state: Path) -> int:
    """Runs it all and prints the table; returns how many answers were wrong."""
    console.print("model and adapters: taken from the cache, or made now (a few minutes, once)", highlight=False)
    check_vllm()
    model = assets.model_path(args.model)
    words = assets.adapters(model)
    plan = plan_for(model, words, state, args.instances, args.port)
    with StartProgress(console) as progress:
        cluster = Cluster(plan, progress.show)
        progress.watch(cluster)
        cluster.start()
    try:
        console.print(f"{args.instances} instances serve {plan.model_name} at {cluster.url}/v1", highlight=False)
        answers, reference, seconds = asyncio.run(_traffic(args, cluster, words, console))
        table = asyncio.run(_routing_table(cluster.coordinator_endpoint))
    finally:
        console.print("stopping")
        cluster.stop()
    right = [traffic.is_right(answer, {w.name: w.word for w in words}, reference) for answer in answers]
    out = Console()
    if not out.is_terminal:
        out = Console(width=140)  # a file or a pipe has no width of its own; 80 columns would cut the table
    out.print(_table(plan.model_name, words, answers, right, seconds, table))
    for answer, good in zip(answers, right, strict=True):
        if not good:
            said = answer.error or repr(answer.text)
            console.print(f"wrong: {answer.request.model}: {answer.request.prompt} -> {said}", markup=False)
    out.print(f"{sum(right)} of {len(right)} answers right, {len(right) / seconds:.1f} requests/s", highlight=False)
    return len(right) - sum(right)


async def _traffic(
    args: argparse.Namespace, cluster: Cluster, words: Sequence[assets.WordAdapter], console: Console
) -> tuple[list[traffic.Answer], dict[str, str], float]:
    """(answers, the base model's reference, seconds that the mixed traffic took)"""
    base = cluster.plan.model_name
    async with traffic.client_for(cluster.url) as client:
        reference = await traffic.base_reference(client, base)
        for word in words:
            await asyncio.to_thread(cluster.add_adapter, word.name, word.path)
        requests = traffic.mixed([*(word.name for word in words), base], args.requests)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(f"{args.requests} requests, {args.concurrency} at a time", total=args.requests)
            began = time.monotonic()
            answers = await traffic.send(client, requests, args.concurrency, lambda _: progress.advance(task))
            return answers, reference, time.monotonic() - began


async def _routing_table(endpoint: str) -> RoutingTable:
    async with CoordinatorClient(endpoint) as client:
        return await client.ask(GetTable(), RoutingTable)


def _table(
    base: str,
    words: Sequence[assets.WordAdapter],
    answers: Sequence[traffic.Answer],
    right: Sequence[bool],
    seconds: float,
    routing: RoutingTable,
) -> Table:
    """One line per adapter and one for the base model; `routing`: where they were placed at the end."""
    table = Table(title="mixed traffic through the router")
    for column in ("model", "rank", "placed on", "requests", "correct", "TTFT p50", "TTFT p95", "tokens/s"):
        table.add_column(column, justify="left" if column in ("model", "placed on") else "right", no_wrap=True)
    routes = {entry.adapter.name: sorted(route.instance for route in entry.routes) for entry in routing.adapters}
    everywhere = sorted(entry.name for entry in routing.instances)
    for name, rank in [*((word.name, str(word.rank)) for word in words), (base, "base")]:
        mine = [(a, good) for a, good in zip(answers, right, strict=True) if a.request.model == name]
        first = sorted(a.ttft_s for a, _ in mine if a.ttft_s is not None)
        table.add_row(
            name,
            rank,
            ", ".join(routes.get(name, everywhere)),
            str(len(mine)),
            str(sum(good for _, good in mine)),
            _milliseconds(first, 0.50),
            _milliseconds(first, 0.95),
            f"{sum(a.tokens for a, _ in mine) / seconds:.1f}",
        )
    return table


def _milliseconds(values: Sequence[float], quantile: float) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0] * 1000:.0f} ms"
    cut = statistics.quantiles(values, n=100, method="inclusive")[round(quantile * 100) - 1]
    return f"{cut * 1000:.0f} ms"


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
