"""How a thread that loads keeps out of the step's way: lower priority, other cores than the step's, and the
interpreter for no longer than it must.

On a CPU vLLM binds each worker's OpenMP threads to cores of their own and leaves some to everybody else. The worker's
first thread is bound too, to one of those cores, and every thread started from it inherits that: a loader would run on
the very core that the whole team waits for at the end of each operation. So a loader's thread takes the cores which the
engine core may use and the step does not.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Mapping

SWITCH_S = 0.0005
"""Longest that a thread holds the interpreter while another one waits for it; Python's own: ten times as long, which
would come on top of a step for each time that a loader has the interpreter when the step wants it."""
NICENESS = 10
"""Added to a loader thread's niceness: where it must share a core, the step goes first."""

_BINDINGS = ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PLACES")
"""Where vLLM tells OpenMP, for each of its libraries, which cores to take."""


def step_cores(environment: Mapping[str, str]) -> set[int]:
    """Cores that OpenMP is bound to, as vLLM writes them (numbers and ranges, in whatever brackets); empty: unbound."""
    text = next((environment[name] for name in _BINDINGS if environment.get(name)), "")
    cores: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def side_cores(allowed: set[int], step: set[int]) -> set[int]:
    """Where a loader runs: the allowed cores without the step's; all that are allowed when the step has every one."""
    return allowed - step or allowed


def step_aside() -> None:
    """Makes the calling thread one that loads; what the system refuses stays as it is."""
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
    thread = threading.get_native_id()
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, thread, NICENESS)
    parent, step = multiprocessing.parent_process(), step_cores(os.environ)
    if parent is None or parent.pid is None or not step:
        return
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(thread, side_cores(os.sched_getaffinity(parent.pid), step))
