"""`vllm-loraserve status`: instances, adapters and placement, as the coordinator sees them."""

from __future__ import annotations

import argparse
import time
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vllm_loraserve.coordinator.asking import add_coordinator_arguments, ask, print_json
from vllm_loraserve.coordinator.messages import AdapterDemand, AdapterRoutes, GetStatus, RoutingTable, Status

WIDE = 120
"""Columns of a terminal that also shows where instances are and what they run on."""


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
        console = Console()
        # A file or a pipe has no width of its own, and 80 columns would cut the tables.
        render(status, console if console.is_terminal else Console(width=160))
    return 0


def format_bytes(count: float) -> str:
    """A size for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_seconds(seconds: float) -> str:
    """A duration for people, in its two largest units."""
    for unit, size, smaller, rest in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // rest:.0f} {smaller}"
    return f"{seconds:.0f} s"


def render(status: Status, console: Console) -> None:
    """Prints the tables."""
    console.print(picture(status, console.width), highlight=False)


def picture(status: Status, width: int, most: int | None = None) -> Group:
    """The tables for so many columns; `most`: only so many adapters, the busiest first."""
    table = status.table
    parts: list[RenderableType] = [
        Text.assemble(
            (table.base_model or "no model yet", "bold"),
            f": {len(table.instances)} instances, {len(table.adapters)} adapters; policy {status.policy}, "
            f"coordinator up {format_seconds(status.uptime_s)}; {_routing(table)}",
        )
    ]
    if not table.instances:
        hint = "vllm serve MODEL --enable-loraserve --loraserve-config.coordinator ENDPOINT"
        parts.append(Text(f"No instance has joined yet: {hint}", style="yellow"))
    parts += [_instances(status, with_place=width >= WIDE), _adapters(status, most)]
    parts += [Text(f"! {problem}", style="yellow") for problem in status.problems]
    return Group(*parts)


def _routing(table: RoutingTable) -> str:
    if table.prediction is None:
        return "requests by fraction and load"
    by = "measured" if table.prediction.measured else "shipped, not measured"
    what = "predicted finish time" if table.prediction.choice == "finish-time" else "least added cost"
    return f"requests by {what} (step cost {by})"


def _table(title: str, *columns: tuple[str, Literal["left", "right"]]) -> Table:
    """Names are never cut or broken: people copy them."""
    out = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, justify in columns:
        out.add_column(column, justify=justify, no_wrap=column != "served by")
    return out


def _instances(status: Status, with_place: bool) -> Table:
    place: list[tuple[str, Literal["left", "right"]]] = [("URL", "left"), ("device", "left")]
    out = _table(
        "Instances",
        ("instance", "left"), ("running", "right"), ("waiting", "right"), ("KV", "right"),
        ("tokens/s", "right"), ("adapters", "right"), ("arena rows", "right"), ("seen", "right"),
        *(place if with_place else ()),
    )  # fmt: skip
    ranks = {r.adapter.name: r.adapter.rank for r in status.table.adapters}
    now = time.time()
    for i in status.table.instances:
        rows = sum(ranks.get(r.name, 0) for r in i.resident if r.tier == "arena")
        seen = "stopping" if i.draining else f"{max(0.0, now - i.last_seen):.1f} s ago"
        out.add_row(
            escape(i.name), str(i.load.running), str(i.load.waiting), f"{i.load.kv_usage:.0%}",
            f"{i.load.tokens_per_s:.1f}", f"{len(i.resident)}", f"{rows}/{i.capacity.rank_rows}",
            seen,
            *((escape(i.url), escape(i.capacity.device)) if with_place else ()),
        )  # fmt: skip
    return out


def _adapters(status: Status, most: int | None) -> Table:
    out = _table(
        "Adapters",
        ("adapter", "left"), ("rank", "right"), ("size", "right"), ("state", "left"), ("running", "right"),
        ("tokens/s", "right"), ("served by", "left"),
    )  # fmt: skip
    demand: dict[str, AdapterDemand] = {d.name: d for d in status.demand}
    idle = AdapterDemand(name="", tokens_per_s=0.0)
    every = status.table.adapters
    if most is not None:
        every = tuple(sorted(every, key=lambda r: demand.get(r.adapter.name, idle).tokens_per_s, reverse=True))
    for routes in every[:most]:
        adapter = routes.adapter
        asked = demand.get(adapter.name, idle)
        out.add_row(
            escape(adapter.name), str(adapter.rank), format_bytes(adapter.size_bytes), adapter.state,
            str(asked.running), f"{asked.tokens_per_s:.1f}", escape(_served_by(status, routes)),
        )  # fmt: skip
    base = demand.get("", idle)
    out.add_row(
        "(base model)",
        "",
        "",
        "",
        str(base.running),
        f"{base.tokens_per_s:.1f}",
        "all" if status.table.instances else "-",
    )
    if most is not None and len(every) > most:
        out.add_row(f"... and {len(every) - most} that are asked for less")
    return out


def _served_by(status: Status, routes: AdapterRoutes) -> str:
    """Instances with their fractions; what is not loaded there yet, and copies that get no requests, are marked."""
    adapter = routes.adapter
    held = {
        i.name
        for i in status.table.instances
        if any(c.name == adapter.name and c.sha256 == adapter.sha256 for c in i.resident)
    }
    out = [f"{r.instance} {r.phi:.0%}" + ("" if r.instance in held else " (not loaded)") for r in routes.routes]
    out += [f"{name} (spare copy)" for name in sorted(held - {r.instance for r in routes.routes})]
    return ", ".join(out) or "-"
