"""`vllm-loraserve profile`: measures the operating points of a running instance and writes them to a file.

Adapters of the ranks to measure are made with random weights, of the modules and sizes of one that is registered
already, registered for the time of the measurement, and removed at its end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import save_file

from vllm_loraserve import __version__
from vllm_loraserve.cluster.fit import Fit, fit_step_cost
from vllm_loraserve.cluster.operating_points import OperatingPoints, OperatingPointsError, save
from vllm_loraserve.cluster.traced_steps import fit_without_outliers, read_steps
from vllm_loraserve.coordinator.adapters import SCRATCH_PREFIX
from vllm_loraserve.coordinator.asking import add_coordinator_arguments
from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.curve import KeysError, load_member_keys
from vllm_loraserve.coordinator.messages import (
    AddAdapter,
    GetStatus,
    InstanceEntry,
    RemoveAdapter,
    Status,
)
from vllm_loraserve.coordinator.profiling import Profiler, ProfilingError, Trial, Workload, connector

INSTANCE_KEYS = "LORASERVE_UPSTREAM_API_KEY", "VLLM_API_KEY"
"""Environment variables with the key that is sent to the instance: the router's for this, and vLLM's own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve profile`."""
    w = Workload()
    add_coordinator_arguments(parser)
    add = parser.add_argument
    add("--instance", default="", metavar="NAME", help="instance to measure; it should have no other traffic (first)")
    add("--ranks", default="8,16,32,64,128", metavar="R,R", help="ranks to measure (default %(default)s)")
    add("--adapters", type=int, default=2, metavar="N", help="adapters of each rank (default %(default)s)")
    add("--like", type=Path, metavar="DIR", help="adapter whose modules are used (default: one that is registered)")
    add("--scratch", type=Path, metavar="DIR", help="where to make adapters, inside an adapter root (beside --like)")
    add("--slo-ttft", type=float, default=w.slo_ttft_s, metavar="S", help="P95 time to first token (%(default)s)")
    add("--prompt-tokens", type=int, default=w.prompt_tokens, metavar="N", help="(default %(default)s)")
    add("--output-tokens", type=int, default=w.output_tokens, metavar="N", help="(default %(default)s)")
    add("--concurrency", type=int, default=w.concurrency, metavar="N", help="at most at once (default %(default)s)")
    add("--trial", type=float, default=w.trial_s, metavar="S", help="seconds of each run (default %(default)s)")
    add(
        "--steps",
        type=Path,
        metavar="FILE",
        help="the instance's --loraserve-config.trace_schedule: the step cost is fitted to the steps that these runs "
        "leave there, of prompts and decodes mixed, in place of single requests timed from outside",
    )
    add("--out", type=Path, default=Path("operating_points.json"), metavar="FILE", help="(default %(default)s)")
    add("--force", action="store_true", help="measure though the instance has traffic")


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 when nothing could be measured."""
    console = Console()
    try:
        points, fit, trials = asyncio.run(_profile(args, console))
        save(points, args.out)
    except (CoordinatorUnavailable, CoordinatorError, KeysError, ProfilingError, OperatingPointsError) as error:
        print(f"vllm-loraserve profile: {error}", file=sys.stderr)
        return 1
    except (OSError, aiohttp.ClientError) as error:
        print(f"vllm-loraserve profile: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    _render(points, fit, trials, console)
    console.print(
        f"Written to {args.out}; give it to the coordinator as --operating-points, and to "
        "instances as --loraserve-config.operating_points."
    )
    return 0


def _render(points: OperatingPoints, fit: Fit, trials: dict[int, list[Trial]], console: Console) -> None:
    table = Table(title=f"{points.model} on {points.device}: {points.slo}", title_justify="left")
    for column in ("rank", "tokens/s within the SLO", "P95 TTFT there", "tokens/s saturated", "runs"):
        table.add_column(column, justify="right")
    for rank, point in sorted(points.points.items()):
        runs = trials[rank]
        table.add_row(
            str(rank), f"{point:.1f}", f"{runs[-1].p95_ttft_s:.3f} s", f"{runs[0].tokens_per_s:.1f}", str(len(runs))
        )
    console.print(table)
    terms = ", ".join(f"{k} {v:.3g}" for k, v in msgspec.structs.asdict(fit.cost).items() if v)
    console.print(f"Step cost in seconds ({fit.samples} samples, mean error {fit.relative_error:.1%}): {terms}")


async def _profile(args: argparse.Namespace, console: Console) -> tuple[OperatingPoints, Fit, dict[int, list[Trial]]]:
    ranks = _ranks(args.ranks)
    workload = Workload(
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        concurrency=args.concurrency,
        trial_s=args.trial,
        slo_ttft_s=args.slo_ttft,
        prompt_lengths=tuple(
            sorted({max(1, args.prompt_tokens // 8), max(2, args.prompt_tokens // 2), args.prompt_tokens})
        ),
    )
    keys = load_member_keys(args.keys) if args.keys else None
    async with CoordinatorClient(args.coordinator, timeout_s=args.timeout, keys=keys) as client:
        status = await client.ask(GetStatus(), Status)
        instance = _choose(status, args.instance, args.force)
        began = time.time()
        like = args.like or _registered(status)
        base = status.table.base_model
        timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
        headers = _authorization(os.environ)
        async with (
            _adapters(client, like, args.scratch or like.parent, ranks, args.adapters) as by_rank,
            aiohttp.ClientSession(timeout=timeout, connector=connector(), headers=headers) as session,
        ):
            profiler = Profiler(session, instance.url, workload)
            with console.status("step samples"):
                fit = fit_step_cost(await profiler.step_samples(by_rank, base))
            points, trials = {}, {}
            for rank, names in by_rank.items():
                with console.status(f"rank {rank}"):
                    points[rank], trials[rank] = await profiler.operating_point(names)
            if args.steps is not None:
                fit = _fit_of_steps(args.steps, began)
    shape = f"{workload.prompt_tokens} prompt and {workload.output_tokens} output tokens"
    slo = f"P95 TTFT {workload.slo_ttft_s:g} s, {shape}"
    measured = OperatingPoints(
        points=points,
        step_cost=fit.cost,
        measured=True,
        model=base,
        dtype=instance.capacity.dtype,
        device=instance.capacity.device,
        tensor_parallel_size=instance.capacity.tensor_parallel,
        kernels=f"{instance.capacity.kernels} (vllm-loraserve {__version__})".lstrip(),
        slo=slo,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return measured, fit, trials


def _authorization(environment: Mapping[str, str]) -> dict[str, str]:
    """The header with the instance's key; empty where no key is known."""
    for variable in INSTANCE_KEYS:
        if key := environment.get(variable, "").strip():
            return {"Authorization": f"Bearer {key}"}
    return {}


def _fit_of_steps(trace: Path, began: float) -> Fit:
    """The step cost of the steps since `began` (Unix time) in a schedule trace."""
    try:
        steps = [step for step in read_steps(trace.read_text().splitlines()) if step.start >= began]
    except (ValueError, KeyError, TypeError) as error:
        raise ProfilingError(f"{trace} is no schedule trace of this version: {error!r}.") from None
    if not steps:
        raise ProfilingError(
            f"{trace} has no step of this run; start the instance with --loraserve-config.trace_schedule {trace}, on "
            "this machine or on a file system that both see."
        )
    return fit_without_outliers([step.sample for step in steps])[0]


def _ranks(text: str) -> list[int]:
    try:
        ranks = sorted({int(r) for r in text.split(",")})
    except ValueError:
        ranks = []
    if not ranks or ranks[0] < 1:
        raise ProfilingError(f"--ranks {text!r} is no list of positive numbers such as 8,64.")
    return ranks


def _choose(status: Status, name: str, force: bool) -> InstanceEntry:
    """The instance to measure; busy ones are refused, their figures would be others' too."""
    found = [i for i in status.table.instances if not name or i.name == name]
    if not found:
        raise ProfilingError(f"There is no live instance{f' {name!r}' if name else ''}; see `vllm-loraserve status`.")
    busy = found[0].load.running + found[0].load.waiting
    if busy and not force:
        raise ProfilingError(f"Instance '{found[0].name}' has {busy} requests; wait until it is idle, or give --force.")
    return found[0]


def _registered(status: Status) -> Path:
    for routes in status.table.adapters:
        if (Path(routes.adapter.source) / "adapter_model.safetensors").is_file():
            return Path(routes.adapter.source)
    raise ProfilingError("No registered adapter can be read from here; give one as --like.")


@contextlib.asynccontextmanager
async def _adapters(
    client: CoordinatorClient, like: Path, scratch: Path, ranks: Sequence[int], count: int
) -> AsyncIterator[dict[int, list[str]]]:
    """Rank -> names of adapters made and registered for as long as the context lasts."""
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=scratch))
    names: dict[int, list[str]] = {}
    try:
        for rank in ranks:
            for i in range(count):
                name = f"{folder.name.removeprefix('.')}-r{rank}-{i}"
                make_like(like, folder / name, rank, seed=1000 * rank + i)
                await client.request(AddAdapter(name=name, source=str(folder / name)))
                names.setdefault(rank, []).append(name)
        yield names
    finally:
        for name in (n for group in names.values() for n in group):
            with contextlib.suppress(CoordinatorError, CoordinatorUnavailable):
                await client.request(RemoveAdapter(name=name, drain_s=5.0))
        shutil.rmtree(folder, ignore_errors=True)


def make_like(like: Path, directory: Path, rank: int, seed: int = 0) -> Path:
    """A PEFT checkpoint with the modules of `like` (a directory), random weights of `rank` and no visible effect."""
    rng = np.random.default_rng(seed)
    tensors = {}
    with safe_open(like / "adapter_model.safetensors", framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
            shape = file.get_slice(key).get_shape()
            if key.endswith("lora_A.weight"):
                tensors[key] = rng.standard_normal((rank, shape[1]), dtype=np.float32)
            elif key.endswith("lora_B.weight"):
                tensors[key] = 1e-6 * rng.standard_normal((shape[0], rank), dtype=np.float32)
    config = json.loads((like / "adapter_config.json").read_text())
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
