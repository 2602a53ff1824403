"""Server processes of one machine: started under a guard, each with its log file, stopped together."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from vllm_loraserve.launcher import guard

GRACE_S = 15.0
"""Seconds between SIGTERM and SIGKILL."""


class Server:
    """One child process with its log. `process` is the guard; the server itself is the guard's child."""

    def __init__(self, name: str, command: list[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.command = command
        self.log = log
        self.env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0

    def start(self) -> None:
        """Starts it (again): the log is appended to. Call from the main thread (see guard.command_line)."""
        self.started_at = time.monotonic()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                guard.command_line(self.command, GRACE_S),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                # A session of its own: Ctrl-C in the terminal reaches us only, and we stop the servers in order.
                start_new_session=True,
            )

    @property
    def status(self) -> int | None:
        """Exit status of the server once it has ended and everything of it is gone, else None."""
        return None if self.process is None else self.process.poll()

    def pids(self) -> list[int]:
        """The guard and all processes below it, parents first; empty when it has ended."""
        if self.process is None or self.process.poll() is not None:
            return []
        children: dict[int, list[int]] = {}
        for pid, parent in _parents():
            children.setdefault(parent, []).append(pid)
        found = [self.process.pid]
        for pid in found:
            found.extend(children.get(pid, ()))
        return found

    def ask_to_stop(self) -> None:
        """SIGTERM; the guard follows with SIGKILL after GRACE_S."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9 of everything at once, as if the machine had lost it; returns when it is gone."""
        for pid in reversed(self.pids()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        with contextlib.suppress(OSError), open(self.log, encoding="utf-8", errors="replace") as log:
            return "".join(deque(log, maxlen=lines)).rstrip()
        return ""


def _parents() -> Iterable[tuple[int, int]]:
    """(pid, parent's pid) of every process."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as stat:
                yield int(name), int(stat.read().rpartition(")")[2].split()[1])


def stop_all(servers: Iterable[Server]) -> None:
    """Stops all at once and returns when every process is gone; a second Ctrl-C meanwhile kills them."""
    servers = list(servers)
    for server in servers:
        server.ask_to_stop()
    try:
        for server in servers:
            if server.process is not None:
                # The guard kills after GRACE_S; should the guard itself hang, we do.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.process.wait(GRACE_S + 15.0)
    finally:
        for server in servers:
            server.kill()


def healthy(url: str, timeout_s: float = 2.0) -> bool:
    """Whether GET `url`/health answers 200."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=timeout_s)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def listen_error(host: str, port: int) -> OSError | None:
    """Why no server can listen on `host`:`port` now; None: it can."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, _, _, address in found:
            try:
                probe = socket.socket(family, kind)
            except OSError:
                continue  # localhost may name an IPv6 address where the kernel has no IPv6; servers pass over it
            with probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        return error
    return None


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now."""
    return listen_error("127.0.0.1", port) is None


def free_ports(count: int, first: int, *, consecutive: bool = False, besides: Collection[int] = ()) -> list[int]:
    """`count` free ports from `first` upwards, one after the other if `consecutive`.

    They are looked for below the range of outgoing connections, which could take one before its server starts; above it
    only where `first` lies there. `besides`: ports that are spoken for. Raises OSError when there are not enough.
    """
    found: list[int] = []
    end = 32768 if first + count <= 32768 else 65536
    for port in range(first, end):
        if port not in besides and is_free(port):
            found.append(port)
        elif consecutive:
            found.clear()
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports from {first} to {end - 1}")
