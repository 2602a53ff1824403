"""`vllm-loraserve explain ADAPTER`: why an adapter is where it is."""

from __future__ import annotations

import argparse

from vllm_loraserve.coordinator.asking import add_coordinator_arguments, ask
from vllm_loraserve.coordinator.messages import Explain, Explanation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve explain`."""
    parser.add_argument("adapter", help="name of a registered adapter")
    add_coordinator_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 when there is no such adapter or no answer."""
    explanation = ask(args, "explain", Explain(name=args.adapter), Explanation)
    if explanation is None:
        return 1
    print("\n".join(explanation.lines))
    return 0
