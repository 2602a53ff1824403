"""How the scheduler's reason for ending a request reaches its client.

vLLM's engine core can end a request with an error, and the front end then says "Internal server error". The reason and
the HTTP status travel in `stop_reason`; the front end's output processor turns them into the exception that vLLM
answers with that status. Offline, the reason is in the output's `stop_reason`, or in `error` of a pooling request.

Of an engine that is being stopped (`stopping.py`), requests that it aborts are answered with a 503: vLLM's answer has
status 200 and what was generated so far.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

PREFIX = "loraserve-error"
ABORTED = HTTPStatus.SERVICE_UNAVAILABLE, "This instance is shutting down; try again, on another one."

stopping: weakref.WeakSet[Any] = weakref.WeakSet()
"""Output processors whose engine is being stopped."""


def stop_reason(status: HTTPStatus, reason: str) -> str:
    """What a request that was ended by the scheduler carries."""
    return f"{PREFIX}:{int(status)}:{reason}"


def parse(text: Any) -> tuple[HTTPStatus, str] | None:
    """(status, reason) of what `stop_reason` made; None for anything else."""
    if not isinstance(text, str) or not text.startswith(PREFIX + ":"):
        return None
    _, status, reason = text.split(":", 2)
    return HTTPStatus(int(status)), reason


def _error(processor: Any, output: Any) -> tuple[HTTPStatus, str] | None:
    """What the end of a request means for its client where it is an error with a reason."""
    if processor in stopping and str(output.finish_reason) == "abort":
        return ABORTED
    return parse(output.stop_reason)


def wrap_process_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """OutputProcessor.process_outputs that hands the reason to whoever waits for the request."""

    @functools.wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        ended = []
        pooled: dict[str, tuple[HTTPStatus, str]] = {}
        for output in engine_core_outputs:
            if output.finish_reason is not None and (error := _error(self, output)) is not None:
                state = self.request_states.get(output.request_id)
                if state is not None and state.queue is not None:
                    ended.append((state.queue, *error))
                elif state is not None and state.detokenizer is None:
                    pooled[state.external_req_id] = error
        result = original(self, engine_core_outputs, *args, **kwargs)
        for queue, status, reason in ended:
            from vllm.exceptions import GracefulHTTPError

            # In place of the output that says no more than "error", and before anybody could have taken it.
            queue.output = GracefulHTTPError(reason, status)
            queue.ready.set()
        for output in result.request_outputs if pooled else ():
            if output.request_id in pooled:
                from vllm.outputs import RequestError

                status, reason = pooled[output.request_id]
                output.error = RequestError(code=PREFIX, message=reason, retryable=status >= 500 or status == 429)
        return result

    return process_outputs
