"""`vllm-loraserve`: one command line; each subcommand lives in the room that does its work."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from vllm_loraserve import __version__

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "up": ("vllm_loraserve.launcher.up", "start a whole cluster on this machine"),
    "demo": ("vllm_loraserve.launcher.demo", "start a cluster with a small model and six adapters, and check it"),
    "router": ("vllm_loraserve.router.cli", "serve the OpenAI API for a cluster, choosing an instance per request"),
    "coordinator": ("vllm_loraserve.coordinator.cli", "run the coordinator: registry, placement, routing table"),
    "status": ("vllm_loraserve.coordinator.status", "show instances, adapters and where they are"),
    "adapters": (
        "vllm_loraserve.coordinator.adapters",
        "list, add and remove adapters, or keep them as a directory has them",
    ),
    "top": ("vllm_loraserve.coordinator.top", "show the same again and again, the busiest adapters first"),
    "doctor": ("vllm_loraserve.transfer.doctor", "say what this machine has for fast adapter transfers"),
    "keygen": ("vllm_loraserve.coordinator.keygen", "make the keys that protect a cluster across machines"),
    "simulate": ("vllm_loraserve.simulator.cli", "run workloads under several systems in a simulated cluster"),
    "size": ("vllm_loraserve.simulator.size", "how many instances a load needs within an SLO"),
    "plan": ("vllm_loraserve.coordinator.plan", "show what a placement policy would change, without changing it"),
    "explain": ("vllm_loraserve.coordinator.explain", "say why an adapter is where it is"),
    "profile": ("vllm_loraserve.coordinator.profile", "measure what an instance sustains at each adapter rank"),
}
"""name -> (module, one-line help). The module has `add_arguments(parser)` and `run(args) -> int`; it is
imported only when its subcommand is asked for, so that `status` does not pay for torch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status (2: wrong usage)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # argparse has no reliable "everything after --" behind optional positionals, so it's taken off here.
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, after_dashes = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(prog="vllm-loraserve", description=__import__("vllm_loraserve").__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((a for a in argv if not a.startswith("-")), None)
    modules = {}
    for name, (module, text) in SUBCOMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name == asked:
            modules[name] = importlib.import_module(module)
            modules[name].add_arguments(sub)
    args = parser.parse_args(argv, argparse.Namespace(after_dashes=after_dashes))
    if after_dashes and not getattr(modules[args.command], "TAKES_OPTIONS_AFTER_DASHES", False):
        parser.error(f"{args.command} takes no options after --")
    try:
        return int(modules[args.command].run(args))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
