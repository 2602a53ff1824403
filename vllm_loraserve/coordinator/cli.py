"""`vllm-loraserve coordinator`: runs the coordinator until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

from vllm_loraserve.cluster.operating_points import OperatingPointsError
from vllm_loraserve.cluster.operating_points import load as load_points
from vllm_loraserve.cluster.placement import PlacementError, make_policy, policy_names
from vllm_loraserve.coordinator.control import Controller, ControlOptions
from vllm_loraserve.coordinator.curve import KEYS_VARIABLE, CoordinatorKeys, KeysError, load_coordinator_keys
from vllm_loraserve.coordinator.metrics import serve_metrics
from vllm_loraserve.coordinator.registry import Registry, RegistryError
from vllm_loraserve.coordinator.server import CoordinatorServer, ServerError, ServerOptions

logger = logging.getLogger(__name__)

DEFAULT_POLICY = "loraserve+"


def _positive(kind: type[int] | type[float], or_zero: bool = False):  # type: ignore[no-untyped-def]
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not 0 <= value < float("inf") or (value == 0 and not or_zero):
            raise argparse.ArgumentTypeError(f"{text!r} is no number {'from 0 up' if or_zero else 'above 0'}")
        return value

    return parse


def default_database() -> Path:
    """Where the registry is unless told otherwise."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "vllm-loraserve" / "registry.sqlite"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve coordinator`."""
    server, control = ServerOptions(), ControlOptions()
    add = parser.add_argument
    add("--bind", default=server.bind, metavar="ENDPOINT", help=f"where requests are answered (default {server.bind})")
    add(
        "--publish",
        default="",
        metavar="ENDPOINT",
        help="where tables are published, if not at the address of --bind; routers look for the next port",
    )
    add(
        "--database",
        type=Path,
        default=default_database(),
        metavar="FILE",
        help="SQLite file of the adapter registry (default %(default)s)",
    )
    add(
        "--adapter-root",
        action="append",
        default=[],
        metavar="DIR",
        help="directory that adapters may be registered from; may be given several times",
    )
    add("--allow-download", action="store_true", help="let hub ids be downloaded for inspection")
    add("--base-model", default="", metavar="NAME", help="model of the cluster (default: the first instance's)")
    add(
        "--max-rank",
        type=_positive(int),
        default=control.max_rank,
        metavar="ROWS",
        help="largest adapter rank accepted (default %(default)s)",
    )
    add(
        "--policy",
        default=DEFAULT_POLICY,
        help=f"placement policy (default {DEFAULT_POLICY}): {', '.join(policy_names())}",
    )
    add(
        "--operating-points",
        type=Path,
        metavar="FILE",
        help="what `vllm-loraserve profile` measured (default: shipped values, good only to compare ranks)",
    )
    add(
        "--expiry",
        type=_positive(float),
        default=control.expiry_s,
        metavar="S",
        help="silence that ends an instance's membership (default %(default)g)",
    )
    add(
        "--settle",
        type=_positive(float, or_zero=True),
        default=control.settle_s,
        metavar="S",
        help="longest wait, after a restart, for the instances that were members before (default %(default)g)",
    )
    add(
        "--rebalance",
        type=_positive(float),
        default=control.rebalance_s,
        metavar="S",
        help="seconds between looks at the placement (default %(default)g)",
    )
    add("--keys", type=Path, metavar="DIR", help=f"CURVE keys of `vllm-loraserve keygen` (or ${KEYS_VARIABLE})")
    add("--insecure", action="store_true", help="allow a bind beyond loopback without keys")
    add("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics there")
    add("--metrics-host", default="127.0.0.1", metavar="HOST", help="address of the metrics port (default %(default)s)")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])


def run(args: argparse.Namespace) -> int:
    """Exit status 0 after SIGINT or SIGTERM, 1 when it can't start (one line says why)."""
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        policy = make_policy(args.policy)
        directory = args.keys or os.environ.get(KEYS_VARIABLE)
        keys = load_coordinator_keys(directory) if directory else None
        points = load_points(args.operating_points) if args.operating_points else None
        registry = Registry(args.database)
    except (PlacementError, OperatingPointsError, KeysError, RegistryError, OSError) as error:
        print(f"vllm-loraserve coordinator: {error}", file=sys.stderr)
        return 1
    for root in args.adapter_root:
        if not os.path.isdir(os.path.expanduser(root)):
            logger.warning("--adapter-root %s: there is no such directory (yet)", root)
    control = ControlOptions(
        base_model=args.base_model,
        max_rank=args.max_rank,
        expiry_s=args.expiry,
        settle_s=args.settle,
        rebalance_s=args.rebalance,
    )
    options = ServerOptions(
        bind=args.bind,
        publish=args.publish,
        adapter_roots=tuple(args.adapter_root),
        allow_download=args.allow_download,
        insecure=args.insecure,
    )
    try:
        controller = Controller(registry, policy, control, time.monotonic(), points)
        return asyncio.run(_serve(controller, options, keys, (args.metrics_host, args.metrics_port)))
    except (ServerError, ValueError, OverflowError, OSError) as error:  # OverflowError: a port that is none
        print(f"vllm-loraserve coordinator: {error}", file=sys.stderr)
        return 1
    finally:
        registry.close()


async def _serve(
    controller: Controller, options: ServerOptions, keys: CoordinatorKeys | None, metrics: tuple[str, int | None]
) -> int:
    server = CoordinatorServer(controller, options, keys)
    metrics_host, metrics_port = metrics
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with contextlib.ExitStack() as cleanup:
        if metrics_port is not None:
            cleanup.callback(serve_metrics(server.controller, server.counters, metrics_host, metrics_port))
        try:
            await server.start()
            await stop.wait()
        finally:
            await server.stop()
    return 0
