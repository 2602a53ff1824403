"""How an engine core waits: for loads without running empty steps, and for its workers, on a CPU, without polling.

An engine core that has nothing to do but wait for adapters would run empty steps until one is ready, each of them a
message to every worker and back. It waits for the next request, or for the workers' next report, instead.

vLLM's engine core looks for its workers' next message in shared memory without a pause, for a second after the last
one, on a whole core. On a GPU machine that is a core to spare. On a CPU it is one of the step's own. There it looks for
`cpu_poll_s`, then sleeps until it is notified, or for `RECHECK_S`: vLLM's notifications may be lost when they follow
one another closely, and it looks again every 5 s. A worker looks as vLLM's does: nobody else computes then, and what
looks begins at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import time
from collections.abc import Callable
from typing import Any

from vllm_loraserve.config import LoRAServeConfig

RECHECK_S = 0.02
"""Longest sleep within what vLLM itself would poll for."""

_poll_s: float | None = None
"""Seconds of polling after a message in this process; None: vLLM's own."""


def install(config: LoRAServeConfig) -> None:
    """Makes this process, an engine core's, wait as the module's text says. Raises RuntimeError where the hooks do not
    fit the installed vLLM."""
    from vllm.platforms import current_platform

    from vllm_loraserve import plugin

    global _poll_s
    if (problem := plugin.install_engine_hooks()) is not None:
        raise RuntimeError(problem)
    if current_platform.is_cpu():
        _poll_s = config.cpu_poll_s


def wrap_spin_wait(original: Callable[..., None]) -> Callable[..., None]:
    """SpinCondition.wait that sleeps earlier in the engine core of an engine on a CPU."""

    @functools.wraps(original)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if _poll_s is not None:
            own = self.__dict__.setdefault("loraserve_own_busy_loop_s", self.busy_loop_s)
            if time.monotonic() <= self.last_read + own:
                most = int(RECHECK_S * 1000)
                timeout_ms = most if timeout_ms is None else min(timeout_ms, most)
            self.busy_loop_s = min(own, _poll_s)
        original(self, timeout_ms)

    return wait


class Doorbell:
    """A descriptor that can be read when something was put into `requests` since `answer`."""

    def __init__(self, requests: queue.Queue[Any]) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        put = requests.put_nowait

        def put_nowait(item: Any) -> None:
            put(item)
            os.eventfd_write(self.fd, 1)

        requests.put_nowait = put_nowait  # type: ignore[method-assign]

    def answer(self) -> None:
        """It has been heard: forgets what was put until now."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)


def wrap_process_input_queue(original: Callable[..., None]) -> Callable[..., None]:
    """EngineCoreProc._process_input_queue that first lets a scheduler of ours wait for loads."""

    @functools.wraps(original)
    def _process_input_queue(self: Any) -> None:
        wait = getattr(self.scheduler, "wait_for_loads", None)
        # Engines that run in step with others (data parallel) hold those up when they wait; what is in flight is to be
        # collected.
        if wait is not None and not self.engines_running and not self.batch_queue and self.is_running():
            wait(self.input_queue)
        original(self)

    return _process_input_queue
