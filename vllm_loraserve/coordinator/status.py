"""`vllm-loraserve status`: instances, adapters and placement, as the coordinator sees them."""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table

from vllm_loraserve.coordinator.asking import add_coordinator_arguments, ask, print_json
from vllm_loraserve.coordinator.messages import AdapterDemand, GetStatus, Status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve status`."""
    add_coordinator_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the whole status as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 when the coordinator does not answer."""
    status = ask(args, "status", GetStatus(), Status)
    if status is None:
        return 1
    if args.json:
        print_json(status)
    else:
        render(status, Console())
    return 0


def format_bytes(count: float) -> str:
    """A size for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def render(status: Status, console: Console) -> None:
    """Prints the tables."""
    table = status.table
    console.print(
        f"[bold]{table.base_model or 'no model yet'}[/]  policy {status.policy}, epoch {table.epoch}, "
        f"table {table.version}, up {status.uptime_s:.0f} s"
    )
    console.print(_instances(status))
    console.print(_adapters(status))
    for problem in status.problems:
        console.print(f"[yellow]! {problem}[/]")


def _instances(status: Status) -> Table:
    out = Table(title="Instances", title_justify="left")
    for column, justify in (
        ("instance", "left"), ("URL", "left"), ("device", "left"), ("running", "right"), ("waiting", "right"),
        ("KV", "right"), ("tokens/s", "right"), ("adapters", "right"), ("rank rows", "right"), ("seen", "right"),
    ):  # fmt: skip
        out.add_column(column, justify=justify)  # type: ignore[arg-type]
    ranks = {r.adapter.name: r.adapter.rank for r in status.table.adapters}
    now = time.time()
    for i in status.table.instances:
        rows = sum(ranks.get(r.name, 0) for r in i.resident)
        out.add_row(
            i.name, i.url, i.capacity.device, str(i.load.running), str(i.load.waiting), f"{i.load.kv_usage:.0%}",
            f"{i.load.tokens_per_s:.1f}", f"{len(i.resident)}", f"{rows}/{i.capacity.rank_rows}",
            f"{max(0.0, now - i.last_seen):.1f} s ago",
        )  # fmt: skip
    return out


def _adapters(status: Status) -> Table:
    out = Table(title="Adapters", title_justify="left")
    for column, justify in (
        ("adapter", "left"), ("rank", "right"), ("size", "right"), ("state", "left"), ("tokens/s", "right"),
        ("placed on", "left"), ("resident on", "left"),
    ):  # fmt: skip
        out.add_column(column, justify=justify)  # type: ignore[arg-type]
    demand: dict[str, AdapterDemand] = {d.name: d for d in status.demand}
    for routes in status.table.adapters:
        adapter = routes.adapter
        placed = ", ".join(f"{r.instance} {r.phi:.0%}" for r in routes.routes) or "-"
        held = [
            i.name
            for i in status.table.instances
            if any(c.name == adapter.name and c.sha256 == adapter.sha256 for c in i.resident)
        ]
        rate = demand[adapter.name].tokens_per_s if adapter.name in demand else 0.0
        out.add_row(
            adapter.name, str(adapter.rank), format_bytes(adapter.size_bytes), adapter.state, f"{rate:.1f}", placed,
            ", ".join(held) or "-",
        )  # fmt: skip
    return out
