"""Nothing is left behind, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stubs import PATIENCE_S, is_alive, wait_until_dead

from vllm_loraserve.launcher import guard

TREE = """
import subprocess, sys, os, signal, time
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(1000)
"""
"""A server with a child that left its session, as a daemon would."""


def start(tmp_path: Path, kind: str = "plain", grace_s: float = PATIENCE_S) -> tuple[subprocess.Popen[bytes], int, int]:
    """(guard, pid of the server, pid of the server's child)"""
    pids = tmp_path / "pids"
    process = subprocess.Popen(guard.command_line([sys.executable, "-c", TREE, str(pids), kind], grace_s))
    deadline = time.monotonic() + PATIENCE_S
    while not pids.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server, child = map(int, pids.read_text().split())
    return process, server, child


@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_status_is_the_commands(code: int) -> None:
    done = subprocess.run(guard.command_line(["sh", "-c", f"exit {code}"], 1.0), check=False, timeout=PATIENCE_S)
    assert done.returncode == code


def test_a_signal_is_reported_as_shells_do() -> None:
    done = subprocess.run(guard.command_line(["sh", "-c", "kill -9 $$"], 1.0), check=False, timeout=PATIENCE_S)
    assert done.returncode == 128 + signal.SIGKILL


def test_a_command_that_does_not_exist() -> None:
    done = subprocess.run(
        guard.command_line(["/no/such/program"], 1.0), check=False, timeout=PATIENCE_S, capture_output=True, text=True
    )
    assert done.returncode == 127
    assert "can't run /no/such/program" in done.stderr


def test_sigterm_stops_the_whole_tree(tmp_path: Path) -> None:
    process, server, child = start(tmp_path)
    process.terminate()
    assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert wait_until_dead([server, child]) == []


def test_a_stubborn_server_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    process, server, child = start(tmp_path, "stubborn", grace_s=0.5)
    began = time.monotonic()
    process.terminate()
    assert process.wait(PATIENCE_S) == 128 + signal.SIGKILL
    assert time.monotonic() - began >= 0.5
    assert wait_until_dead([server, child]) == []


def test_what_a_killed_server_leaves_is_killed(tmp_path: Path) -> None:
    process, server, child = start(tmp_path)
    os.kill(server, signal.SIGKILL)
    assert process.wait(PATIENCE_S) == 128 + signal.SIGKILL
    assert wait_until_dead([child]) == []


def test_a_killed_guard_takes_its_server_along(tmp_path: Path) -> None:
    process, server, child = start(tmp_path)
    try:
        process.kill()
        process.wait(PATIENCE_S)
        assert wait_until_dead([server]) == []
    finally:
        os.kill(child, signal.SIGKILL)  # nobody is left who could know of it


def test_the_death_of_the_watched_parent_stops_it(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys\n"
        "from vllm_loraserve.launcher import guard\n"
        "process = subprocess.Popen(guard.command_line([sys.executable, '-c', *sys.argv[1:]], 100.0))\n"
        "print(process.pid, flush=True)\n"
        "process.wait()\n"
    )
    pids = tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, "-c", script, TREE, str(pids), "plain"], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    guard_pid = int(parent.stdout.readline())
    deadline = time.monotonic() + PATIENCE_S
    while not pids.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    watched = [guard_pid, *map(int, pids.read_text().split())]
    assert all(is_alive(pid) for pid in watched)
    parent.kill()
    parent.wait(PATIENCE_S)
    assert wait_until_dead(watched) == []
