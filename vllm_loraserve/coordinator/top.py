"""`vllm-loraserve top`: what `status` shows, drawn anew every few seconds, the busiest adapters first."""

from __future__ import annotations

import argparse
import asyncio
import sys

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from vllm_loraserve.coordinator.asking import add_coordinator_arguments, client_of
from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.curve import KeysError
from vllm_loraserve.coordinator.messages import GetStatus, Status
from vllm_loraserve.coordinator.status import picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve top`."""
    add_coordinator_arguments(parser)
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (default: 2)")


def run(args: argparse.Namespace) -> int:
    """Until Ctrl-C; exit status 1 where there is no screen to draw on or the keys are unusable."""
    console = Console()
    if not console.is_terminal:
        print("vllm-loraserve top: the output is no terminal; `vllm-loraserve status` prints once", file=sys.stderr)
        return 1
    if not 0.1 <= args.every <= 3600:
        print(f"vllm-loraserve top: --every {args.every:g} is not from 0.1 to 3600 s", file=sys.stderr)
        return 1
    try:
        asyncio.run(watch(args, console))
    except KeysError as error:
        print(f"vllm-loraserve top: {error}", file=sys.stderr)
        return 1
    return 0


async def watch(args: argparse.Namespace, console: Console, looks: int | None = None) -> None:
    """Draws so many looks (None: for ever). A coordinator that does not answer leaves the last picture, and a line
    that says so."""
    last: RenderableType = Text("")
    async with client_of(args) as client:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while looks is None or looks > 0:
                last = await _look(client, console, last, live)
                looks = None if looks is None else looks - 1
                if looks != 0:
                    await asyncio.sleep(args.every)


async def _look(client: CoordinatorClient, console: Console, last: RenderableType, live: Live) -> RenderableType:
    try:
        status = await client.ask(GetStatus(), Status)
    except (CoordinatorUnavailable, CoordinatorError) as error:
        live.update(Group(last, Text(f"! {error}", style="red")), refresh=True)
        return last
    # What is left of the screen belongs to adapters.
    without = len(console.render_lines(picture(status, console.width, most=0)))
    last = picture(status, console.width, most=max(1, console.height - without))
    live.update(last, refresh=True)
    return last
