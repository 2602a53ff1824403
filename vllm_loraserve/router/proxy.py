"""Forwarding one request: resolve its model, get a place, send the bytes on, try again while the client has seen none.

The body goes through unchanged; of it only `model` is decoded. Nothing reaches the client before the instance has
shown that it answers: an ordinary answer is complete, a stream has produced its first event that is neither a comment
nor an error. Up to then a lost connection or a dying instance means another instance, `max_attempts` in all; after it a
stream is ended by an error event. Complete events only are passed on, each as soon as it is there, so that the error
event is always well formed.

A client that leaves cancels the handler; leaving the `async with` around the instance's answer closes that connection,
which makes vLLM abort the request. One that stays and does not read is treated so after `client_timeout_s`. Places are
released in `finally`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, SocketTimeoutError, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from vllm_loraserve.router.adapters import Adapters
from vllm_loraserve.router.directory import Directory, Target
from vllm_loraserve.router.errors import ApiError, invalid, stream_error, unavailable
from vllm_loraserve.router.ledger import Work
from vllm_loraserve.router.metrics import RouterMetrics
from vllm_loraserve.router.queue import Admission
from vllm_loraserve.router.upstream import Attempt, Upstream

logger = logging.getLogger(__name__)

FORWARDED = ("Content-Type", "traceparent", "tracestate", "baggage", "X-Session-Id", "anthropic-version")
"""Request headers that instances get; the rest concerns the connection to the router."""
HOP_BY_HOP = frozenset(
    (
        "connection",
        "content-length",
        "date",
        "keep-alive",
        "proxy-authenticate",
        "proxy-connection",
        "server",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-request-id",
    )
)
EVENT_STREAM = "text/event-stream"
SESSION_HEADER = "X-Session-Id"
"""A conversation's id: requests that carry the same one go to the same instance while loads allow."""
RETRIED_STATUSES = frozenset((500, 502, 503, 504))
"""An instance whose engine has died answers 500 before its server goes; one that is starting or full answers 503."""
LARGEST_EVENT: Final = 1 << 20
SMALL_WRITE = 16 << 10
_NO_WAIT = contextlib.nullcontext()
"""In place of a timer that would cost more than the write."""
PAUSE_S = 0.05
"""Before an instance that just failed a request is asked again because there is no other."""


class Call:
    """One client request. `rank` is set once the model is known (-1: not yet), `work` where times are predicted."""

    __slots__ = ("came", "endpoint", "id", "rank", "work")

    def __init__(self, endpoint: str, request_id: str, came: float) -> None:
        self.endpoint = endpoint
        self.id = request_id
        self.came = came
        self.rank = -1
        self.work: Work | None = None


class Head(msgspec.Struct):
    """The part of a request body that routing needs."""

    model: str | None = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    stream: Any = None

    def most_tokens(self) -> int | None:
        """The longest answer that was asked for. Whether the values are right is the instance's business."""
        for value in (self.max_completion_tokens, self.max_tokens):
            if isinstance(value, int) and value > 0:
                return value
        return None


_head = msgspec.json.Decoder(Head)


class _ErrorInfo(msgspec.Struct):
    code: int | str | None = None
    type: str | None = None


class _ErrorEvent(msgspec.Struct):
    error: _ErrorInfo


_error_event = msgspec.json.Decoder(_ErrorEvent)


class ClientLeft(Exception):
    """The client's connection is gone."""


class _Died(Exception):
    """The instance did not answer, or stopped in the middle, before the client saw anything."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Refused(Exception):
    """The instance answered with a status that another instance may not; kept to be passed on if all do."""

    def __init__(self, response: web.Response) -> None:
        super().__init__(str(response.status))
        self.response = response


def request_head(body: bytes) -> Head:
    """What routing needs of a request body; ApiError 400 for what is no JSON object with a string `model`."""
    try:
        return _head.decode(body)
    except msgspec.ValidationError as error:
        raise invalid(f"The request body does not fit: {error}.", "model") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(f"The request body is not JSON: {error}.") from None


class Proxy:
    """Forwards requests to instances."""

    def __init__(
        self,
        directory: Directory,
        admission: Admission,
        adapters: Adapters,
        metrics: RouterMetrics,
        session: ClientSession,
        *,
        max_attempts: int = 3,
        upstream_key: str = "",
        forward_authorization: bool = True,
        idle_timeout_s: float = 600.0,
        client_timeout_s: float = 60.0,
        connect_timeout_s: float = 2.0,
    ) -> None:
        self._directory = directory
        self._admission = admission
        self._predictor = admission.predictor
        self._adapters = adapters
        self._metrics = metrics
        self._session = session
        self._max_attempts = max_attempts
        self._authorization = f"Bearer {upstream_key}" if upstream_key else ""
        self._forward_authorization = forward_authorization
        self._timeout = ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=idle_timeout_s)
        self._idle_timeout_s = idle_timeout_s
        self._client_timeout_s = client_timeout_s

    async def forward(self, request: web.Request, call: Call) -> web.StreamResponse:
        """Answers `request` from an instance. Raises ApiError."""
        body = await request.read()
        head = request_head(body)
        target = await self._resolve(head.model)
        call.rank = target.rank
        headers = self._headers(request.headers, call.id)
        affinity = headers.get(SESSION_HEADER)
        call.work = self._predictor.work(target, len(body), head.most_tokens(), bool(head.stream))
        tried: list[str] = []
        reason = ""
        refusal: web.Response | None = None
        while len(tried) < self._max_attempts:
            waiting_since = time.monotonic()
            try:
                upstream = await self._admission.acquire(target, tried, affinity, again=bool(tried), work=call.work)
            except ApiError:
                if refusal is not None:
                    return refusal
                if tried:  # what went wrong is not that no other instance came free
                    break
                raise
            self._metrics.queued(time.monotonic() - waiting_since)
            try:
                return await self._attempt(request, upstream, body, headers, call)
            except _Refused as refused:
                refusal, reason = refused.response, "status"
                logger.warning("Instance %s answered %s to %s", upstream.name, refused, call.id)
            except _Died as died:
                reason = died.reason
                upstream.failed(time.monotonic())
                logger.warning("Instance %s failed request %s: %s (%s)", upstream.name, call.id, died, reason)
            finally:
                self._admission.release(upstream, call.work)
            known = self._directory.upstreams
            only = known.keys() <= {upstream.name, *tried}
            if refusal is not None and (tried or only):
                return refusal  # a request that breaks engines must not get to break them all
            tried.append(upstream.name)
            if len(tried) < self._max_attempts:
                self._metrics.retries.labels(reason).inc()
                if only:
                    await asyncio.sleep(PAUSE_S * len(tried))
        times = "once" if len(tried) == 1 else f"{len(tried)} times"
        raise unavailable(f"The request failed {times}, last with {reason} on {tried[-1]}; try again shortly.", 1.0)

    async def _resolve(self, model: str | None) -> Target:
        try:
            return self._directory.resolve(model)
        except ApiError as error:
            # Without a base model there is no table yet, or none that an instance is in.
            unknown = error.status == 404 or not self._directory.base_model
            if not unknown or not await self._adapters.discover():
                if error.status == 404 and self._adapters.unreachable:
                    # It may have been registered since; a client may give up on a 404 for good.
                    raise unavailable(f"{error} The coordinator can't be asked now; try again shortly.", 2.0) from None
                raise
            return self._directory.resolve(model)

    def _headers(self, given: CIMultiDictProxy[str], request_id: str) -> dict[str, str]:
        # Bytes beyond ASCII have no agreed meaning in a header; such a header concerns nobody.
        headers = {name: value for name in FORWARDED if (value := given.get(name)) is not None and value.isascii()}
        headers["X-Request-Id"] = request_id
        if self._authorization:
            headers["Authorization"] = self._authorization
        elif self._forward_authorization and (value := given.get("Authorization")) is not None and value.isascii():
            headers["Authorization"] = value
        return headers

    async def _attempt(
        self, request: web.Request, upstream: Upstream, body: bytes, headers: dict[str, str], call: Call
    ) -> web.StreamResponse:
        """One try. Raises _Died or _Refused when another instance may be tried, ApiError when not."""
        task = asyncio.current_task()
        assert task is not None
        attempt = Attempt(task, time.monotonic())
        upstream.attempts.add(attempt)
        try:
            # From our own constant, not from what the client wrote, which may be percent-encoded or name another host.
            query = request.rel_url.raw_query_string
            url = URL(f"{upstream.url}{call.endpoint}?{query}" if query else upstream.url + call.endpoint, encoded=True)
            async with self._session.post(
                url, data=body, headers=headers, timeout=self._timeout, allow_redirects=False
            ) as answer:
                attempt.last_byte = time.monotonic()
                if answer.content_type == EVENT_STREAM:
                    return await self._stream(request, upstream, answer, attempt, call)
                whole = await answer.read()
        except (ClientError, OSError) as error:
            raise self._fault(error) from None
        except asyncio.CancelledError:
            raise _taken_back(attempt) from None
        finally:
            upstream.attempts.discard(attempt)
        upstream.answered(answer.status, time.monotonic())
        response = web.Response(status=answer.status, body=whole, headers=_kept_headers(answer.headers))
        if _may_differ_elsewhere(answer.status, call):
            raise _Refused(response)
        self._metrics.first_byte(call.rank, time.monotonic() - call.came)
        return response

    async def _stream(
        self, request: web.Request, upstream: Upstream, answer: ClientResponse, attempt: Attempt, call: Call
    ) -> web.StreamResponse:
        """Passes server-sent events on. Raises only before the client has seen a byte, or because it left.

        vLLM begins its answer before it knows that it can serve it: what it would have said with a status comes as the
        first event then, and is treated, and at last passed on, like a plain answer of that status.
        """
        stream = web.StreamResponse(status=answer.status, headers=_kept_headers(answer.headers))
        stream.headers["X-Request-Id"] = call.id
        read = answer.content.readany
        begun = False
        events = 0
        tail = b""
        while True:
            try:
                data = await read()
            except (ClientError, OSError) as error:
                fault: BaseException = self._fault(error)
                if not begun:
                    raise fault from None
                break
            except asyncio.CancelledError:
                fault = _taken_back(attempt)
                if not begun or isinstance(fault, asyncio.CancelledError):
                    raise fault from None
                break
            came = time.monotonic()
            # While the client is slow to read, the instance is not silent: the attempt must not be called back.
            attempt.last_byte = math.inf
            ended = not data
            # An unfinished event at the end, or an empty stream, is the instance's own doing: passed on as it came.
            data, tail = (tail, b"") if ended else complete_events(tail + data)
            if not begun and not ended:
                if not (line := first_field(data)):
                    data = b""  # comments say that the instance's server lives, not that its engine answers
                elif (status := error_status(line)) and _may_differ_elsewhere(status, call):
                    upstream.answered(status, came)
                    raise _Refused(_as_plain_answer(status, line))
            if data or ended:
                at_once = begun and not ended and _goes_at_once(request.transport, data)
                writing: contextlib.AbstractAsyncContextManager[None]
                writing = _NO_WAIT if at_once else self._to_client(request)
                try:
                    async with writing:
                        if not begun:
                            begun = True
                            upstream.answered(answer.status, came)
                            if call.work is not None:
                                call.work.first_token()
                            self._metrics.first_byte(call.rank, came - call.came)
                            await stream.prepare(request)
                        if data:
                            events += data.count(b"\n\n")
                            await stream.write(data)
                        if ended:
                            self._predictor.saw_output(events)
                            await stream.write_eof()
                            return stream
                except OSError as error:
                    raise ClientLeft from error
            attempt.last_byte = time.monotonic()
        if isinstance(fault, _Died):
            upstream.failed(time.monotonic())
        self._metrics.broken_streams.inc()
        logger.warning("Instance %s broke off stream %s: %s", upstream.name, call.id, fault)
        message = "The instance that served this stream failed; the answer is incomplete."
        async with self._to_client(request):
            await stream.write(stream_error(call.endpoint, 502, "BadGatewayError", message))
            await stream.write_eof()
        return stream

    @contextlib.asynccontextmanager
    async def _to_client(self, request: web.Request) -> AsyncIterator[None]:
        """Around writes to the client; raises ClientLeft when it has gone, or takes nothing for `client_timeout_s`.

        Meanwhile its request holds a place on the instance, which others could use.
        """
        try:
            async with asyncio.timeout(self._client_timeout_s) as patience:
                yield
        except OSError as error:  # TimeoutError is one
            if patience.expired():
                self._metrics.stalled_clients.inc()
                logger.warning("A client read nothing for %g s and was cut off", self._client_timeout_s)
                if request.transport is not None:
                    request.transport.abort()  # what is buffered for it would be held for as long as it stays
            raise ClientLeft from error

    def _fault(self, error: BaseException) -> _Died | ApiError:
        """What an exception of the HTTP client means: _Died can be tried elsewhere, ApiError can't."""
        if isinstance(error, SocketTimeoutError):
            return ApiError(504, "GatewayTimeoutError", f"The instance was silent for {self._idle_timeout_s:g} s.")
        return _Died(type(error).__name__, str(error) or type(error).__name__)


def _taken_back(attempt: Attempt) -> _Died | asyncio.CancelledError:
    """What a cancellation means: _Died when the directory called the attempt back, else the client has left."""
    if attempt.called_back and attempt.task.uncancel() == 0:
        return _Died("gone", "left the routing table without an answer")
    return asyncio.CancelledError()


def _goes_at_once(transport: asyncio.Transport | None, data: bytes) -> bool:
    """Whether a write can't wait: nothing is before it, and it is far below what makes a transport ask for a pause."""
    return transport is not None and len(data) <= SMALL_WRITE and transport.get_write_buffer_size() == 0


def complete_events(data: bytes) -> tuple[bytes, bytes]:
    """Splits server-sent events into those that are complete and the unfinished rest.

    A rest longer than `LARGEST_EVENT` bytes counts as complete: memory is bounded, whatever an instance sends.
    """
    if data.endswith(b"\n\n"):
        return data, b""
    end = data.rfind(b"\n\n") + 2
    with_returns = data.rfind(b"\r\n\r\n") + 4
    end = max(end if end > 1 else 0, with_returns if with_returns > 3 else 0)
    if len(data) - end > LARGEST_EVENT:
        end = len(data)
    return data[:end], data[end:]


def first_field(events: bytes) -> bytes:
    """The first `data:` line of server-sent events, else their first line that is no comment; empty: only comments."""
    fields = [line for line in events.splitlines() if line and not line.startswith(b":")]
    return next((line for line in fields if line.startswith(b"data:")), fields[0] if fields else b"")


def error_status(line: bytes) -> int:
    """The HTTP status that an error event (its `data:` line) stands for; 0 when it is none."""
    if b'"error"' not in line:
        return 0
    try:
        error = _error_event.decode(line.removeprefix(b"data:")).error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0
    if isinstance(error.code, int):
        return error.code
    return 500 if error.type == "internal_error" else 0  # on Anthropic's paths, where errors have no code


def _may_differ_elsewhere(status: int, call: Call) -> bool:
    """A 404 for an adapter of the table: that instance could not find it, having lost touch with the registry."""
    return status in RETRIED_STATUSES or (status == 404 and call.rank > 0)


def _as_plain_answer(status: int, line: bytes) -> web.Response:
    return web.Response(status=status, body=line.removeprefix(b"data:").strip(), content_type="application/json")


def _kept_headers(given: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, value in given.items() if name.lower() not in HOP_BY_HOP)
