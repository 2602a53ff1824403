"""SIGTERM of an instance in a cluster: the routers hear of it first, and nothing that is cut off looks like an answer.

vLLM stops the engine while its HTTP server still listens. What comes then is a 500 with a traceback, or status 200 with
`finish_reason` "abort"; what `--shutdown-timeout` cuts off is "abort" too, or is never answered. So the coordinator is
told before the engine is, and what the engine gives up becomes a 503, which routers try elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.logger import init_logger

from vllm_loraserve.engine import request_errors

logger = init_logger("vllm.loraserve.stopping")

TELL_S = 5.0
"""Longest wait for the coordinator's answer."""
HEARD_S = 0.25
"""From that answer until routers have the new table (published within 20 ms) and what they had sent before is here."""

_stops: weakref.WeakKeyDictionary[Any, _Stop] = weakref.WeakKeyDictionary()


class _Stop:
    """What precedes the end of one engine client, whose server runs in the event loop that is running now."""

    def __init__(self, engine_client: Any, tell: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._outputs = engine_client.output_processor
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def begin(self) -> None:
        """Tells the coordinator; from now on what the engine aborts is an error."""
        request_errors.stopping.add(self._outputs)
        if threading.get_ident() == self._thread:
            return  # nobody is served any more, and the loop could not run what is waited for
        telling = asyncio.run_coroutine_threadsafe(self._tell(), self._loop)
        try:
            telling.result(TELL_S)
            time.sleep(HEARD_S)
        except Exception as error:
            telling.cancel()
            why = f"{type(error).__name__} {error}".rstrip()
            logger.warning("The coordinator was not told that this instance stops: %s", why)


@contextlib.contextmanager
def told_first(engine_client: Any, tell: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """While it lasts, the engine client is shut down only when `tell()` has ended in the loop that runs now; at its end
    those are answered who still wait for an engine that is no more."""
    _stops[engine_client] = _Stop(engine_client, tell)
    try:
        yield
    finally:
        _stops.pop(engine_client, None)
        status, reason = request_errors.ABORTED
        engine_client.output_processor.propagate_error(GracefulHTTPError(reason, status))


def wrap_shutdown(original: Callable[..., None]) -> Callable[..., None]:
    """AsyncLLM.shutdown, which the server calls in another thread than its loop's while it still listens."""

    @functools.wraps(original)
    def shutdown(self: Any, timeout: float | None = None) -> None:
        stop = _stops.pop(self, None)
        if stop is not None:
            stop.begin()
        original(self, timeout)

    return shutdown
