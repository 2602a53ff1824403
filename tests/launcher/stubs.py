"""Stubs in place of a cluster's servers, and a way to see which processes are alive."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from vllm_loraserve.launcher.cluster import Programs

STUB = str(Path(__file__).parent / "stub_server.py")


PATIENCE_S = 120.0
"""For what is certain to come, on any machine: only a defect uses it up."""


def stub_programs() -> Programs:
    return Programs(*((sys.executable, STUB, role) for role in ("coordinator", "router", "instance")))


def is_alive(pid: int) -> bool:
    """A zombie counts as dead: nobody may have reaped it yet."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_dead(pids: Iterable[int], timeout_s: float = PATIENCE_S) -> list[int]:
    """The processes that are still alive after `timeout_s` seconds."""
    pids, deadline = list(pids), time.monotonic() + timeout_s
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive
