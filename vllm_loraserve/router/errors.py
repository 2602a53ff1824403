"""Errors a client sees: OpenAI's error body, with vLLM's type names, and the headers that go with it."""

from __future__ import annotations

import math

import msgspec


class ApiError(Exception):
    """A request that is answered with an error; `message` is one sentence for a person.

    `kind` is the `type` of OpenAI's error body, `param` the field of the request that is at fault.
    """

    def __init__(
        self, status: int, kind: str, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param
        self.headers = headers or {}

    def body(self, endpoint: str = "") -> bytes:
        """The JSON body, as vLLM and OpenAI write it; on Anthropic's paths as vLLM and Anthropic do."""
        if endpoint.startswith("/v1/messages"):
            return anthropic_error_body(self.kind, self.message)
        return error_body(self.status, self.kind, self.message, self.param)


def error_body(status: int, kind: str, message: str, param: str | None = None) -> bytes:
    """`{"error": {message, type, param, code}}` as JSON."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


def stream_error(endpoint: str, status: int, kind: str, message: str) -> bytes:
    """The events that end a stream which can't go on, as vLLM ends it: clients raise on the error, none waits for more.

    Responses and Messages have typed events and no `[DONE]`.
    """
    if endpoint == "/v1/responses":
        event = {"type": "error", "code": kind, "message": message, "param": None, "sequence_number": 0}
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    if endpoint == "/v1/messages":
        return b"event: error\ndata: " + anthropic_error_body(kind, message) + b"\n\n"
    return b"data: " + error_body(status, kind, message) + b"\n\ndata: [DONE]\n\n"


def anthropic_error_body(kind: str, message: str) -> bytes:
    """`{"type": "error", "error": {type, message}}`: how vLLM answers on `/v1/messages`."""
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})


def invalid(message: str, param: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, "BadRequestError", message, param=param)


def unknown_model(name: str, base_model: str) -> ApiError:
    """404 with vLLM's sentences, which clients match on."""
    message = f"The model `{name}` does not exist. Valid aliases: {base_model}."
    return ApiError(404, "NotFoundError", message, param="model")


def overloaded(message: str, retry_after_s: float) -> ApiError:
    """429: more requests than the instances and the waiting room take."""
    return ApiError(429, "RateLimitError", message, headers=_retry_after(retry_after_s))


def unavailable(message: str, retry_after_s: float) -> ApiError:
    """503: nothing that could serve the request is alive."""
    return ApiError(503, "ServiceUnavailableError", message, headers=_retry_after(retry_after_s))


def _retry_after(seconds: float) -> dict[str, str]:
    """Whole seconds, at least one (RFC 9110)."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
