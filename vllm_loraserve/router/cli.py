"""`vllm-loraserve router`: options, and the server's life from start to drained end."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from vllm_loraserve.cluster.operating_points import StepCost
from vllm_loraserve.cluster.operating_points import load as load_points
from vllm_loraserve.coordinator.client import publish_endpoint
from vllm_loraserve.coordinator.curve import default_member_keys
from vllm_loraserve.router.app import Router, RouterConfig
from vllm_loraserve.router.auth import ADMIN_KEY_ENV, API_KEY_ENV, UPSTREAM_KEY_ENV, load_keys

logger = logging.getLogger(__name__)


def _number(kind: type[int] | type[float], least: float, unit: str, most: float = float("inf")):  # type: ignore[no-untyped-def]
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of {unit}") from None
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is below {least:g} {unit}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most:g} {unit}")
        return value

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-loraserve router`."""
    defaults = RouterConfig()
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--coordinator", metavar="ENDPOINT", help="coordinator, such as tcp://127.0.0.1:5700")
    where.add_argument(
        "--instances",
        nargs="+",
        metavar="URL",
        help="vLLM base URLs, in place of a coordinator; adapters as they list",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=_number(int, 0, "port", 65535), default=8000, help="0: any free (default: %(default)s)"
    )
    parser.add_argument("--reuse-port", action="store_true", help="share the port with other routers on this host")
    for option, variable, what in (
        ("api-key", API_KEY_ENV, ""),
        ("admin-api-key", ADMIN_KEY_ENV, " to load and unload adapters"),
    ):
        parser.add_argument(
            f"--{option}-file",
            type=Path,
            metavar="FILE",
            help=f"keys that clients must send{what}, one a line (also: environment {variable})",
        )
    for option, kind, least, unit, help_text in (
        ("max-concurrency", int, 1, "requests", "requests this router has under way on one instance"),
        ("max-queue", int, 0, "requests", "requests that may wait when all instances are full; more get 429"),
        ("queue-timeout-s", float, 0.001, "seconds", "longest wait in that queue, then 429"),
        ("max-attempts", int, 1, "tries", "instances tried for one request before it fails with 503"),
        ("max-body-bytes", int, 1, "bytes", "largest request body; larger ones get 413"),
        ("idle-timeout-s", float, 0.001, "seconds", "longest silence of an instance in an answer, then 504"),
        ("client-timeout-s", float, 0.001, "seconds", "longest time that a client may leave a stream unread"),
        ("connect-timeout-s", float, 0.001, "seconds", "longest time to connect to an instance"),
        ("unload-drain-s", float, 0, "seconds", "time that running requests get when their adapter is unloaded"),
    ):
        default = getattr(defaults, option.replace("-", "_"))
        parser.add_argument(
            f"--{option}",
            type=_number(kind, least, unit),
            default=default,
            metavar=unit.upper(),
            help=f"{help_text} (default: {default})",
        )
    parser.add_argument(
        "--drain-s",
        type=_number(float, 0, "seconds"),
        default=30.0,
        help="time that running requests get when the router is told to stop (default: %(default)g)",
    )
    parser.add_argument(
        "--operating-points",
        type=Path,
        metavar="FILE",
        help="what `vllm-loraserve profile` measured: predict finish times by this, not by what the coordinator says",
    )
    parser.add_argument("--access-log", action="store_true", help="log every request")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def config_from(args: argparse.Namespace) -> RouterConfig:
    """The configuration that parsed arguments and the environment describe. Raises ValueError for addresses, and
    for files of keys or operating points, that can't be used."""
    _check_addresses(args.coordinator, args.instances or ())
    if args.coordinator is not None:
        default_member_keys()  # that they can be read is better known before anything is started
    names = (
        *("max_concurrency", "max_queue", "queue_timeout_s", "max_attempts", "max_body_bytes"),
        *("idle_timeout_s", "client_timeout_s", "connect_timeout_s", "unload_drain_s"),
    )
    return RouterConfig(
        coordinator=args.coordinator,
        instances=tuple(args.instances or ()),
        keys=load_keys(os.environ, API_KEY_ENV, args.api_key_file),
        admin_keys=load_keys(os.environ, ADMIN_KEY_ENV, args.admin_api_key_file),
        upstream_key=os.environ.get(UPSTREAM_KEY_ENV, ""),
        step_cost=_step_cost(args.operating_points),
        **{name: getattr(args, name) for name in names},
    )


def _check_addresses(coordinator: str | None, instances: Sequence[str]) -> None:
    if coordinator is not None:
        if not coordinator.startswith(("tcp://", "ipc://")):
            raise ValueError(f"The coordinator endpoint '{coordinator}' has no transport; give tcp://HOST:PORT.")
        publish_endpoint(coordinator)
    for url in instances:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The instance URL '{url}' is none; give http://HOST:PORT.")


def _step_cost(file: Path | None) -> StepCost | None:
    if file is None:
        return None
    cost = load_points(file).step_cost
    if cost is None:
        raise ValueError(f"{file} has no step cost; run `vllm-loraserve profile` again")
    return cost


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM, then lets running requests finish; 1 when the port can't be had."""
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = config_from(args)
    except ValueError as error:
        print(f"vllm-loraserve router: {error}", file=sys.stderr)
        return 2
    try:
        import uvloop
    except ImportError:  # not on every platform; slower, otherwise the same
        logger.warning("uvloop is not installed; the router takes about half as many requests")
        factory = asyncio.new_event_loop
    else:
        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_serve(config, args))
    except OSError as error:
        text = f"can't listen on {args.host}:{args.port}: {_plain(error)}"
        print(f"vllm-loraserve router: {text}; choose another --host or --port", file=sys.stderr)
        return 1
    return 0


def _plain(error: OSError) -> str:
    """The system's words; asyncio's repeat the address, a failed name look-up has words of its own."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)


async def _serve(config: RouterConfig, args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        Router(config).app,
        access_log=logging.getLogger("vllm_loraserve.router.access") if args.access_log else None,
        handler_cancellation=True,
        shutdown_timeout=args.drain_s,
        keepalive_timeout=75.0,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, args.host, args.port, reuse_port=args.reuse_port or None, backlog=1024).start()
        host, port = runner.addresses[0][:2]
        logger.info("Router listens on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        # What exists now lives as long as the process; scanning it again and again only adds pauses.
        gc.collect()
        gc.freeze()
        await stop.wait()
        logger.info("Router stops; running requests have %g s", args.drain_s)
    finally:
        await runner.cleanup()
