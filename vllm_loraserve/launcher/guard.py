"""A small parent for one server process, so that nothing of it is ever left behind.

    python -m vllm_loraserve.launcher.guard PARENT_PID GRACE_S COMMAND...

runs COMMAND and ends with its exit status (128 + N after signal N). SIGTERM or SIGINT, and the death of the process
PARENT_PID by whatever cause (kill -9 included), stop the command: SIGTERM first, SIGKILL after GRACE_S seconds. When
the command has ended, what it started and left behind (vLLM's engine core after a kill -9 of its API server) is killed
too. If the guard itself is killed, the command gets SIGTERM from the kernel.

It knows its descendants because it is their subreaper (prctl(2)): orphans become its children. Linux only, standard
library only, no thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}


def command_line(command: list[str], grace_s: float) -> list[str]:
    """The command line that runs `command` under a guard which watches the calling process.

    Call it from the main thread's process; the kernel sends the death signal when the *thread* that started the guard
    ends, so start guards from the main thread.
    """
    return [sys.executable, "-m", "vllm_loraserve.launcher.guard", str(os.getpid()), f"{grace_s:g}", *command]


def main(argv: list[str]) -> int:
    """Runs to the end of the command; see the module's docstring."""
    parent, grace_s, command = int(argv[0]), float(argv[1]), argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        return 128 + signal.SIGTERM  # it died before the kernel was told to watch it

    def in_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)

    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=in_child)
    except OSError as error:
        print(f"can't run {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    status = _until_it_ends(child.pid, grace_s)
    _kill_descendants()
    return status


def _until_it_ends(child: int, grace_s: float) -> int:
    """Reaps children and passes the stop signal on until `child` has ended; returns its exit status."""
    kill_at: float | None = None
    while True:
        wait = 3600.0 if kill_at is None else max(0.0, kill_at - time.monotonic())
        received = signal.sigtimedwait(WATCHED, wait)
        if received is None:
            if kill_at is not None:
                _send(child, signal.SIGKILL)
                kill_at = None
        elif received.si_signo != signal.SIGCHLD:
            if kill_at is None:
                kill_at = time.monotonic() + grace_s
            _send(child, signal.SIGTERM)
        for pid, status in _reap():
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _reap() -> Iterator[tuple[int, int]]:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def _children() -> list[int]:
    me = os.getpid()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as stat:
            # The command in parentheses may hold anything; the parent's pid is the second field after it.
            if int(stat.read().rpartition(")")[2].split()[1]) == me:
                found.append(int(name))
    return found


def _kill_descendants() -> None:
    """Kills level by level: the children of what dies become ours."""
    deadline = time.monotonic() + 10.0
    while (left := _children()) and time.monotonic() < deadline:
        for pid in left:
            _send(pid, signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, 0.2)
        for _ in _reap():
            pass


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
