"""`vllm-loraserve explain ADAPTER`: why an adapter is where it is."""

from __future__ import annotations

import argparse
import asyncio
import sys

from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.curve import KeysError, load_member_keys
from vllm_loraserve.coordinator.messages import Explain, Explanation
from vllm_loraserve.coordinator.status import add_coordinator_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve explain`."""
    parser.add_argument("adapter", help="name of a registered adapter")
    add_coordinator_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 when there is no such adapter or no answer."""
    try:
        explanation = asyncio.run(_ask(args))
    except (CoordinatorUnavailable, CoordinatorError, KeysError) as error:
        print(f"vllm-loraserve explain: {error}", file=sys.stderr)
        return 1
    print("\n".join(explanation.lines))
    return 0


async def _ask(args: argparse.Namespace) -> Explanation:
    keys = load_member_keys(args.keys) if args.keys else None
    async with CoordinatorClient(args.coordinator, timeout_s=args.timeout, keys=keys) as client:
        return await client.ask(Explain(name=args.adapter), Explanation)
