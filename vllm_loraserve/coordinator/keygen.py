"""`vllm-loraserve keygen`: makes the CURVE keys of a cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_loraserve.coordinator.curve import COORDINATOR_SECRET, KEYS_VARIABLE, KeysError, create_keys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve keygen`."""
    parser.add_argument("directory", type=Path, help="directory to write the keys to; made if missing")


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 when the directory has keys already."""
    try:
        create_keys(args.directory)
    except (KeysError, OSError) as error:
        print(f"vllm-loraserve keygen: {error}", file=sys.stderr)
        return 1
    print(f"Keys are in {args.directory}. Start the coordinator with --keys {args.directory};")
    print(f"give instances, routers and tools a copy without {COORDINATOR_SECRET}, named by ${KEYS_VARIABLE}.")
    return 0
