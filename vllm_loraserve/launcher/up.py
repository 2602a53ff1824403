"""`vllm-loraserve up MODEL`: coordinator, router and instances on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from vllm_loraserve.cluster.operating_points import OperatingPointsError
from vllm_loraserve.cluster.operating_points import load as load_points
from vllm_loraserve.launcher.assets import AssetError
from vllm_loraserve.launcher.checks import check_model, check_vllm
from vllm_loraserve.launcher.cluster import Cluster, Plan
from vllm_loraserve.launcher.devices import value_of
from vllm_loraserve.launcher.errors import AdapterRefused, StartError
from vllm_loraserve.launcher.progress import StartProgress

TAKES_OPTIONS_AFTER_DASHES = True
CONFLICT = 409
SLOW_BFLOAT16 = (
    "this CPU has no AVX-512: in bfloat16 prompts take several times as long as with `-- --dtype float32`, which needs "
    "twice the memory"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve up`."""
    parser.usage = "%(prog)s MODEL [options] [-- options of vllm serve]"
    parser.add_argument("model", metavar="MODEL", help="model directory or hub id")
    parser.add_argument("--instances", type=at_least_one, default=2, metavar="N", help="vLLM instances (default: 2)")
    parser.add_argument(
        "--adapters",
        type=Path,
        metavar="DIR",
        help="register every adapter directly below this directory (for TENANT/NAME: adapters sync)",
    )
    parser.add_argument(
        "--adapter-root",
        action="append",
        default=[],
        metavar="DIR",
        help="directory that adapters may be registered from later; may be given several times",
    )
    parser.add_argument(
        "--allow-download", action="store_true", help="let adapters be downloaded that are registered by their hub id"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of the router (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=8000, help="port of the router (default: %(default)s)")
    parser.add_argument(
        "--max-rank", type=at_least_one, metavar="ROWS", help="largest adapter rank accepted (default: 256)"
    )
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="adapter registry and logs (default: one directory per model)"
    )
    parser.add_argument(
        "--operating-points",
        type=Path,
        metavar="FILE",
        help="what `vllm-loraserve profile` measured of such an instance, for placement and routing",
    )
    parser.epilog = "What follows `--` is given to every `vllm serve`, for example: -- --max-model-len 4096"


def run(args: argparse.Namespace) -> int:
    """Exit status 0 after Ctrl-C or SIGTERM, 1 when something could not be started or all instances have ended."""
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(stderr=True)
    try:
        check_vllm()
        check_model(args.model)
        found = adapters_in(args.adapters) if args.adapters else {}
        plan = Plan(
            model=args.model,
            state=args.state or state_dir(args.model),
            instances=args.instances,
            host=args.host,
            port=args.port,
            max_rank=args.max_rank,
            adapter_roots=tuple(str(Path(root).resolve()) for root in (args.adapters, *args.adapter_root) if root),
            vllm_options=tuple(args.after_dashes),
            coordinator_options=_coordinator_options(args),
        )
        if plan.machine.slow_bfloat16 and value_of("--dtype", plan.vllm_options) is None:
            console.print(SLOW_BFLOAT16, markup=False, highlight=False, soft_wrap=True)
        with StartProgress(console) as progress:
            cluster = Cluster(plan, progress.show)
            progress.watch(cluster)
            cluster.start()
        try:
            taken = register(cluster, found, console)
            if found and not taken:
                raise StartError(f"none of the adapters in {args.adapters} was accepted")
            _say_where(cluster, taken)
            return _until_it_ends(cluster)
        finally:
            console.print("stopping")
            cluster.stop()
    except (StartError, AssetError, OperatingPointsError, OSError) as error:
        console.print(f"vllm-loraserve up: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 0


def _coordinator_options(args: argparse.Namespace) -> tuple[str, ...]:
    """Raises OperatingPointsError for a file that can't be used: before anything is started."""
    options = []
    if args.allow_download:  # into the cache of this machine, which the instances read
        options.append("--allow-download")
    if args.operating_points is not None:
        load_points(args.operating_points)
        options += ["--operating-points", str(args.operating_points)]
    return tuple(options)


def state_dir(model: str) -> Path:
    """Where the registry and the logs of `model` are kept between runs: one directory per model."""
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "vllm-loraserve"
    identity = str(Path(model).resolve()) if os.path.isdir(model) else model
    readable = re.sub(r"[^\w.\-]+", "-", Path(identity).name)
    return base / f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def adapters_in(folder: Path) -> dict[str, Path]:
    """Name (the directory's) -> path of every adapter below `folder`; raises StartError when there is none."""
    if not folder.is_dir():
        raise StartError(f"--adapters {folder}: no such directory")
    found = {path.parent.name: path.parent.resolve() for path in sorted(folder.glob("*/adapter_config.json"))}
    if not found:
        raise StartError(f"--adapters {folder}: no subdirectory holds an adapter_config.json")
    return found


def register(cluster: Cluster, found: Mapping[str, Path], console: Console) -> list[str]:
    """Registers adapters by name and returns those that were accepted; each other gets a line.

    The registry outlives the cluster: one that knows a name with the content of an earlier start takes the present one.
    """

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    taken = []
    for name, path in found.items():
        try:
            try:
                cluster.add_adapter(name, path)
            except AdapterRefused as refused:
                if refused.status != CONFLICT:
                    raise
                cluster.remove_adapter(name)
                cluster.add_adapter(name, path)
                say(f"adapter {name} has changed since it was registered, and was registered anew")
            taken.append(name)
        except AdapterRefused as refused:
            say(str(refused), "red")
    return taken


def _say_where(cluster: Cluster, taken: Sequence[str]) -> None:
    model = next(iter(taken), cluster.plan.model_name)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    print(f"ready: {cluster.url}/v1 serves {cluster.plan.model_name} and {len(taken)} adapters given here")
    print(f"  curl {cluster.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    print(f"  vllm-loraserve status --coordinator {cluster.coordinator_endpoint}")
    print(f"  logs: {cluster.logs}")
    print("Ctrl-C stops everything", flush=True)


def _until_it_ends(cluster: Cluster) -> int:
    """Says when a part ends; returns 1 once nobody can be served any more."""
    ended: set[str] = set()
    while True:
        for server in cluster.servers:
            if server.status is not None and server.name not in ended:
                ended.add(server.name)
                print(f"{server.name} ended with status {server.status}; its log: {server.log}", file=sys.stderr)
        if "router" in ended or ended >= {server.name for server in cluster.instances}:
            return 1
        time.sleep(0.5)


def at_least_one(text: str) -> int:
    """A count; for argparse."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def port_number(text: str) -> int:
    """A port that a server can be told to listen on; for argparse."""
    number = _whole(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port from 1 to 65535")
    return number


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
