"""One question to a coordinator from the command line; what `status`, `top`, `plan` and `explain` share."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TypeVar

import msgspec

from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.curve import KeysError, load_member_keys
from vllm_loraserve.coordinator.messages import AdapterRecord, Message, Request

Answer = TypeVar("Answer", bound=Message)


def add_coordinator_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every tool asking the coordinator has."""
    parser.add_argument(
        "--coordinator", default="tcp://127.0.0.1:5700", metavar="ENDPOINT", help="whom to ask (default: %(default)s)"
    )
    parser.add_argument("--keys", metavar="DIR", help="member keys (or $LORASERVE_KEYS)")
    parser.add_argument(
        "--timeout", type=float, default=5.0, metavar="S", help="seconds to wait for an answer (default: %(default)g)"
    )


def ask(args: argparse.Namespace, command: str, question: Request, answer: type[Answer]) -> Answer | None:
    """The coordinator's answer; None, with one line on stderr in the name of `command`, when there is none."""
    try:
        return asyncio.run(_ask(args, question, answer))
    except (CoordinatorUnavailable, CoordinatorError, KeysError) as error:
        print(f"vllm-loraserve {command}: {error}", file=sys.stderr)
        return None


async def _ask(args: argparse.Namespace, question: Request, answer: type[Answer]) -> Answer:
    async with client_of(args) as client:
        return await client.ask(question, answer)


def client_of(args: argparse.Namespace) -> CoordinatorClient:
    """A client as the options say; raises KeysError."""
    keys = load_member_keys(args.keys) if args.keys else None
    return CoordinatorClient(args.coordinator, timeout_s=args.timeout, keys=keys)


def print_json(answer: Message | list[AdapterRecord]) -> None:
    """The whole answer on stdout, for programs."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(answer)) + b"\n")
