"""Looking at adapter sources beside the event loop: a few at a time, and none that hangs keeps the others waiting.

A file system that does not answer (a mount whose server is gone) blocks its thread for ever. So each inspection has a
daemon thread of its own, which does not keep the process either; after `timeout_s` it counts as hanging, is answered
with an error, and its place goes to the next. A source that hangs is refused at once until it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from vllm_loraserve.coordinator.membership import Refused

HUNG_MOST = 64
"""Threads that may hang; beyond, all sources are refused until one of them ends."""
Found = TypeVar("Found")


class Inspections:
    """At most `places` at a time, of `timeout_s` seconds each; one event loop."""

    def __init__(self, places: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._places = asyncio.Semaphore(places)
        self._hung: Counter[str] = Counter()

    async def run(self, source: str, look: Callable[[], Found]) -> Found:
        """What `look`, called on a thread, returns or raises. Refused `internal` when `source` does not answer."""
        async with self._places:
            if self._hung[source] or self._hung.total() >= HUNG_MOST:
                raise Refused("internal", f"The adapter source '{source}' hangs; see to its file system.")
            found = self._start(source, look)
            done, _ = await asyncio.wait([found], timeout=self.timeout_s)
            if not done:
                self._hung[source] += 1
                found.add_done_callback(lambda _: self._answers(source))
                raise Refused(
                    "internal",
                    f"The adapter source '{source}' could not be read within {self.timeout_s:g} s; "
                    "see to its file system.",
                )
            return found.result()

    def _answers(self, source: str) -> None:
        self._hung -= Counter([source])

    def _start(self, source: str, look: Callable[[], Found]) -> asyncio.Future[Found]:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Found] = loop.create_future()

        def deliver(value: Found | None, error: BaseException | None) -> None:
            if found.done():
                return
            if error is None:
                found.set_result(value)  # type: ignore[arg-type]
            else:
                found.set_exception(error)
                found.exception()  # it may be late, and nobody's any more

        def run() -> None:
            value, error = None, None
            try:
                value = look()
            except BaseException as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(deliver, value, error)

        threading.Thread(target=run, name="loraserve-inspection", daemon=True).start()
        return found
