"""A plan for a cluster of stubs, and a way to see which processes are alive."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from vllm_loraserve.launcher.cluster import Plan, Programs
from vllm_loraserve.launcher.devices import Machine
from vllm_loraserve.launcher.processes import free_ports

STUB = str(Path(__file__).parent / "stub_server.py")


def stub_programs() -> Programs:
    return Programs(*((sys.executable, STUB, role) for role in ("coordinator", "router", "instance")))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    model = tmp_path / "model"
    model.mkdir()
    return Plan(
        model=str(model),
        state=tmp_path / "state",
        port=free_ports(1, 21000)[0],
        programs=stub_programs(),
        machine=Machine(cores=2),
        start_timeout_s=30.0,
    )


def is_alive(pid: int) -> bool:
    """A zombie counts as dead: nobody may have reaped it yet."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_dead(pids: Iterable[int], timeout_s: float = 10.0) -> list[int]:
    """The processes that are still alive after `timeout_s` seconds."""
    pids, deadline = list(pids), time.monotonic() + timeout_s
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive
