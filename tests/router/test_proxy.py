"""One request through the router: bytes, headers, streams, retries, and the client that leaves."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import ClientError

from vllm_loraserve.router.errors import ApiError
from vllm_loraserve.router.proxy import LARGEST_EVENT, complete_events, request_head

from .conftest import PATIENCE_S, Serve, routes, settled

BODY = b'{"stream": false,  "model": "base", "prompt": "h\\u00e9llo", "unknown": [1, {"model": "not this"}]}'


async def test_body_and_answer_pass_unchanged(serve: Serve) -> None:
    served = await serve(1)
    async with served.client.post("/v1/completions?x=1", data=BODY, headers={"Content-Type": "application/json"}) as r:
        assert r.status == 200
        assert await r.json() == {"served_by": "a"}
        assert r.headers["X-Request-Id"]
    assert served.stubs[0].bodies == [BODY]
    assert served.stubs[0].headers[0]["Content-Type"] == "application/json"
    assert served.idle()


async def test_request_id_is_echoed_and_forwarded(serve: Serve) -> None:
    served = await serve(1)
    for given, kept in (("my-id-1", True), ("bad id", False), ("x" * 129, False)):
        async with served.client.post("/v1/completions", data=BODY, headers={"X-Request-Id": given}) as r:
            assert (r.headers["X-Request-Id"] == given) is kept
            assert served.stubs[0].headers[-1]["X-Request-Id"] == r.headers["X-Request-Id"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"model": 3}', b"\xff\xfe", b"[" * 100_000, b'{"model": "base"} trailing']
)
async def test_a_body_that_is_no_request_is_a_400(serve: Serve, body: bytes) -> None:
    served = await serve(1)
    async with served.client.post("/v1/chat/completions", data=body) as r:
        assert r.status == 400
        error = (await r.json())["error"]
        assert error["type"] == "BadRequestError"
        assert error["code"] == 400
    assert served.stubs[0].bodies == []
    assert served.idle()


async def test_unknown_model_is_vllms_404(serve: Serve) -> None:
    served = await serve(1)
    async with served.client.post("/v1/completions", json={"model": "nobody"}) as r:
        assert r.status == 404
        assert await r.json() == {
            "error": {
                "message": "The model `nobody` does not exist. Valid aliases: base.",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }
        }


async def test_adapter_goes_where_its_routes_point(serve: Serve) -> None:
    served = await serve(3)
    served.publish([routes("one", b=1.0), routes("orphan"), routes("away", gone=1.0)])
    for _ in range(4):
        async with served.client.post("/v1/completions", json={"model": "one"}) as r:
            assert await r.json() == {"served_by": "b"}
    for name in ("orphan", "away"):  # no live route: any instance resolves it
        async with served.client.post("/v1/completions", json={"model": name}) as r:
            assert r.status == 200


async def test_body_over_the_limit_is_a_413(serve: Serve) -> None:
    served = await serve(1, max_body_bytes=1000)
    async with served.client.post("/v1/completions", data=b'{"model": "base", "prompt": "' + b"x" * 2000 + b'"}') as r:
        assert r.status == 413
        assert "1000 bytes" in (await r.json())["error"]["message"]
    assert served.idle()


async def test_errors_of_the_instance_pass_through(serve: Serve) -> None:
    served = await serve(2)
    for stub in served.stubs:
        stub.script = ["status:422"]
    async with served.client.post("/v1/completions", data=BODY) as r:
        assert r.status == 422
        assert (await r.json())["error"]["type"] == "Stub"
    assert len(served.stubs[0].bodies) + len(served.stubs[1].bodies) == 1


async def test_stream_is_forwarded_event_by_event(serve: Serve) -> None:
    served = await serve(1)
    stub = served.stubs[0]
    stub.script = ["headers", *["event", "hold"] * 12, "done"]
    async with served.client.post("/v1/completions", data=BODY) as r:
        assert r.headers["Content-Type"].startswith("text/event-stream")
        for number in range(12):
            stub.hold()
            # The next one is not made before this one is here.
            assert f"a-{number}".encode() in await r.content.readuntil(b"\n\n")
            stub.release()
        assert await r.content.read() == b"data: [DONE]\n\n"
    await settled(served)


@pytest.mark.parametrize("script", [["hold", "json"], ["headers", "event", "hold"]])
async def test_client_that_leaves_cancels_the_instance(serve: Serve, script: list[str]) -> None:
    served = await serve(2)
    stub = served.stubs[0]
    served.publish([routes("one", a=1.0)])
    stub.script = script
    answer = asyncio.ensure_future(served.client.post("/v1/completions", json={"model": "one"}))
    async with asyncio.timeout(PATIENCE_S):
        await stub.arrived.acquire()
        if "event" in script:
            r = await answer
            await r.content.readuntil(b"\n\n")
            r.close()
        else:
            answer.cancel()
        await stub.left.acquire()
    await settled(served)
    assert served.stubs[1].bodies == []  # not retried for nobody
    async with served.client.get("/metrics") as r:
        assert 'endpoint="/v1/completions",rank="8",status="499"} 1.0' in await r.text()


async def test_a_client_that_never_reads_loses_its_place(serve: Serve) -> None:
    served = await serve(1, client_timeout_s=0.2)
    served.stubs[0].script = ["headers", "flood:400", "done"]  # more than all buffers in between hold
    async with asyncio.timeout(PATIENCE_S):
        async with served.client.post("/v1/completions", json={"model": "base"}) as r:
            await r.content.readany()
            await served.stubs[0].left.acquire()  # the instance is let go, as after a client that hangs up
            with pytest.raises(ClientError):
                await r.content.read()
        await settled(served)
    async with served.client.get("/metrics") as r:
        text = await r.text()
    assert "loraserve:router_stalled_clients_total 1.0" in text
    assert 'status="499"} 1.0' in text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/responses", {"type": "error", "code": "BadGatewayError", "param": None, "sequence_number": 0}),
        ("/v1/messages", {"type": "error", "error": {"type": "BadGatewayError"}}),
    ],
)
async def test_typed_streams_end_in_a_typed_error(serve: Serve, path: str, expected: dict[str, object]) -> None:
    served = await serve(1)
    served.stubs[0].script = ["headers", "event", "die"]
    async with served.client.post(path, data=BODY) as r:
        text = await r.content.read()
    event, data = text.split(b"\n\n")[-2].split(b"\n")
    error = json.loads(data.removeprefix(b"data: "))
    assert event == b"event: error"
    message = error.get("error", error).pop("message")
    assert message == "The instance that served this stream failed; the answer is incomplete."
    assert error == expected


async def test_errors_on_anthropics_path_are_anthropics(serve: Serve) -> None:
    served = await serve(1)
    async with served.client.post("/v1/messages", json={"model": "nobody"}) as r:
        assert r.status == 404
        error = {"type": "NotFoundError", "message": "The model `nobody` does not exist. Valid aliases: base."}
        assert await r.json() == {"type": "error", "error": error}


async def test_nothing_known_yet_is_a_503_and_no_404(serve: Serve) -> None:
    """A client may give up for good on a model that does not exist; a router that has just started can't say so."""
    served = await serve(0)
    async with served.client.post("/v1/completions", data=BODY) as r:
        assert r.status == 503
        assert r.headers["Retry-After"] == "2"


async def test_session_keeps_its_instance(serve: Serve) -> None:
    served = await serve(4)
    seen = set()
    for _ in range(12):
        async with served.client.post("/v1/completions", data=BODY, headers={"X-Session-Id": "s"}) as r:
            seen.add((await r.json())["served_by"])
    assert len(seen) == 1


def test_complete_events() -> None:
    assert complete_events(b"data: 1\n\n") == (b"data: 1\n\n", b"")
    assert complete_events(b"data: 1\n\ndata: 2") == (b"data: 1\n\n", b"data: 2")
    assert complete_events(b"data: 1") == (b"", b"data: 1")
    assert complete_events(b"data: 1\r\n\r\ndata") == (b"data: 1\r\n\r\n", b"data")
    assert complete_events(b"") == (b"", b"")
    assert complete_events(b"x" * (LARGEST_EVENT + 1)) == (b"x" * (LARGEST_EVENT + 1), b"")


def test_request_head_takes_none_and_the_last_of_duplicates() -> None:
    assert request_head(b"{}").model is None
    assert request_head(b'{"model": null}').model is None
    assert request_head(b'{"model": "a", "model": "b"}').model == "b"  # as Python's json, and so vLLM, reads it
    with pytest.raises(ApiError):
        request_head(b'{"model": {}}')
    assert request_head(b'{"max_tokens": 7, "max_completion_tokens": 5}').most_tokens() == 5
    assert request_head(b'{"max_tokens": "seven", "stream": [1]}').most_tokens() is None
