"""What a container or a service leaves this process of the machine: cgroup v2's cpu.max and memory.max."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


class Limits(NamedTuple):
    """None: no limit."""

    cores: int | None = None
    memory_bytes: int | None = None
    """What is left of it now; the page cache counts as free."""


def limits(root: Path = ROOT, membership: Path = MEMBERSHIP) -> Limits:
    """The narrowest of the limits of this process's cgroup and those above it."""
    cores: list[int] = []
    memory: list[int] = []
    for group in _groups(root, membership):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            cores.append(max(1, int(quota) // int(period)))
        with contextlib.suppress(OSError, ValueError):
            used = int((group / "memory.current").read_text()) - _page_cache(group)
            memory.append(max(0, int((group / "memory.max").read_text()) - used))
    return Limits(min(cores, default=None), min(memory, default=None))


def available_memory() -> int:
    """Bytes of memory that this process may take now: of the machine, or what is left of its container's limit."""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, KeyError, ValueError), open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
        memory = int(fields["MemAvailable"].split()[0]) << 10
    allowed = limits().memory_bytes
    return memory if allowed is None else min(memory, allowed)


def _groups(root: Path, membership: Path) -> list[Path]:
    """The cgroup of this process and those above it, as far as they can be seen from inside a container."""
    inner = ""
    with contextlib.suppress(OSError):
        inner = next((line[3:] for line in membership.read_text().splitlines() if line.startswith("0::")), "")
    group = root / inner.strip("/")
    return [group, *(parent for parent in group.parents if parent == root or root in parent.parents)]


def _page_cache(group: Path) -> int:
    """Bytes of files that the kernel gives up when memory is wanted."""
    with contextlib.suppress(OSError, ValueError):
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(fields.get("inactive_file", 0))
    return 0
