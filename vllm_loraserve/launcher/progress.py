"""What a person sees while a cluster starts: one line per part on a terminal, one line per event elsewhere."""

from __future__ import annotations

import re
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_loraserve.launcher.cluster import Cluster

_PREFIX = re.compile(r"^(\(.*?\)\s*)?([A-Z]+ \d\d-\d\d [\d:]+ |[\d\- :,]+ [A-Z]+ )?(\[\S+\]\s*|\S+: )?")
"""What stands before the message in a line of vLLM's log, or of ours."""


class StartProgress:
    """Context manager. On a terminal the latest log line of every part that is not ready is shown beside it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._states: dict[str, tuple[str, float]] = {}
        self._cluster: Cluster | None = None
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=4, transient=True)

    def watch(self, cluster: Cluster) -> None:
        """Shows the logs of this cluster's parts."""
        self._cluster = cluster

    def show(self, part: str, state: str) -> None:
        """Takes an event of Cluster."""
        after = time.monotonic() - self._began
        self._states[part] = (state, after)
        if not self._console.is_terminal:
            self._console.print(f"{part} {state} ({after:.0f} s)", highlight=False, soft_wrap=True)

    def __enter__(self) -> StartProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis")
        for part, (state, after) in self._states.items():
            ready = state == "ready"
            seconds = after if ready else time.monotonic() - self._began
            doing = "ready" if ready else self._last_words(part)
            style = "green" if ready else "dim"
            table.add_row(part, f"{seconds:.0f} s", Text(doing, style=style))
        return table

    def _last_words(self, part: str) -> str:
        servers = self._cluster.servers if self._cluster is not None else []
        log = next((server.tail(1) for server in servers if server.name == part), "")
        return _PREFIX.sub("", log.split("\r")[-1]).strip() or "starting"
