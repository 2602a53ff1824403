"""`vllm-loraserve plan`: what a placement policy would change now, without changing it."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from vllm_loraserve.coordinator.asking import add_coordinator_arguments, ask, print_json
from vllm_loraserve.coordinator.messages import GetPlan, Plan
from vllm_loraserve.coordinator.status import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve plan`."""
    add_coordinator_arguments(parser)
    parser.add_argument("--policy", default="", metavar="NAME", help="policy to ask (default: the coordinator's)")
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 when there is no answer."""
    plan = ask(args, "plan", GetPlan(policy=args.policy), Plan)
    if plan is None:
        return 1
    if args.json:
        print_json(plan)
    else:
        render(plan, Console())
    return 0


def _ttft(seconds: float) -> str:
    return "without bound: an instance is overloaded" if seconds < 0 else f"{seconds:.3f} s"


def render(plan: Plan, console: Console) -> None:
    """Prints the moves and the forecast before and after."""
    moves = Table(title=f"Policy {plan.policy}: {format_bytes(plan.bytes)} to move", title_justify="left")
    for column in ("adapter", "instance", "action", "bytes"):
        moves.add_column(column)
    for m in plan.moves:
        moves.add_row(m.adapter, m.instance, m.action, format_bytes(m.bytes) if m.bytes else "-")
    if plan.moves:
        console.print(moves)
    else:
        console.print(f"Policy {plan.policy} would move nothing.")
    points = "measured" if plan.measured else "shipped defaults, not measured"
    table = Table(title=f"Predicted (operating points: {points})", title_justify="left")
    for column in ("instance", "load now", "load then", "adapters now", "then"):
        table.add_column(column, justify="left" if column == "instance" else "right")
    then = {f.instance: f for f in plan.then}
    for now in plan.now:
        after = then[now.instance]
        table.add_row(now.instance, f"{now.load:.2f}", f"{after.load:.2f}", str(now.adapters), str(after.adapters))
    console.print(table)
    console.print(f"P95 time to first token: now {_ttft(plan.p95_now_s)}, then {_ttft(plan.p95_then_s)}")
    console.print(f"{plan.demand}")
    console.print(("The loop would do this: " if plan.adopt else "The loop would not do this now: ") + plan.why)
