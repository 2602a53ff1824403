"""One request through the router: bytes, headers, streams, retries, and the client that leaves."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
from aiohttp import ClientError

from vllm_loraserve.router.errors import ApiError
from vllm_loraserve.router.proxy import LARGEST_EVENT, complete_events, error_status, first_field, request_head

from .conftest import PATIENCE_S, Serve, Served, routes

BODY = b'{"stream": false,  "model": "base", "prompt": "h\\u00e9llo", "unknown": [1, {"model": "not this"}]}'


async def settled(served: Served) -> None:
    """Waits until all counters are zero; fails when they do not get there."""
    async with asyncio.timeout(PATIENCE_S):
        while not served.idle():
            await asyncio.sleep(0.005)


async def unread(served: Served) -> None:
    """Waits until all buffers are full: the router has waited for the client at 50 looks in a row."""
    looks = 0
    async with asyncio.timeout(PATIENCE_S):
        while looks < 50:
            await asyncio.sleep(0.005)
            attempts = [attempt for upstream in served.router.directory.live() for attempt in upstream.attempts]
            looks = looks + 1 if attempts and all(a.last_byte == math.inf for a in attempts) else 0


async def events(answer: object) -> list[bytes]:
    return [line async for line in answer.content if line.strip()]  # type: ignore[attr-defined]


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


@pytest.mark.parametrize("script", [["die"], ["headers", "die"], ["headers", "half", "die"]])
async def test_death_before_the_first_event_is_invisible(serve: Serve, script: list[str]) -> None:
    served = await serve(2)
    served.publish([routes("one", a=1.0)])
    served.stubs[0].script = script
    served.stubs[1].script = ["headers", "event", "done"]
    async with served.client.post("/v1/completions", json={"model": "one", "stream": True}) as r:
        assert r.status == 200
        assert await events(r) == [b'data: {"choices": [{"text": "b-0"}]}\n', b"data: [DONE]\n"]
    assert len(served.stubs[0].bodies) == 1
    assert served.stubs[0].bodies == served.stubs[1].bodies
    await settled(served)


async def test_half_an_answer_is_not_seen_but_retried(serve: Serve) -> None:
    """A non-streamed answer counts only when it is complete."""
    served = await serve(2)

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"served_by": ')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    broken = served.stubs[0]
    await broken.stop()
    broken.port = server.sockets[0].getsockname()[1]
    served.publish([routes("one", a=1.0)])
    async with served.client.post("/v1/completions", json={"model": "one"}) as r:
        assert await r.json() == {"served_by": "b"}
    server.close()
    await settled(served)


async def test_death_after_the_first_event_ends_in_an_error_event(serve: Serve) -> None:
    served = await serve(2)
    for stub in served.stubs:
        stub.script = ["headers", "event", "half", "hold", "die"]
    async with served.client.post("/v1/completions", data=BODY) as r:
        first = await r.content.readuntil(b"\n\n")
        for stub in served.stubs:
            stub.release()
        rest = await r.content.read()
    assert first.startswith(b"data: ")
    error, done, nothing = rest.split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 502  # well formed: no half event before it
    assert (done, nothing) == (b"data: [DONE]", b"")
    assert len(served.stubs[0].bodies) + len(served.stubs[1].bodies) == 1
    await settled(served)


def pause_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance out of use stays so for the whole test."""
    monkeypatch.setattr("vllm_loraserve.router.upstream.FIRST_PAUSE_S", PATIENCE_S)
    monkeypatch.setattr("vllm_loraserve.router.upstream.LONGEST_PAUSE_S", PATIENCE_S)


async def test_refused_connection_goes_elsewhere_and_is_avoided_for_a_while(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause_long(monkeypatch)
    served = await serve(2)
    served.publish([routes("one", a=1.0)])
    await served.stubs[0].stop()
    for _ in range(5):
        async with served.client.post("/v1/completions", json={"model": "one"}) as r:
            assert await r.json() == {"served_by": "b"}
    async with served.client.get("/metrics") as r:
        text = await r.text()
    assert 'loraserve:router_retries_total{reason="ClientConnectorError"} 1.0' in text  # four did not even try it
    assert 'loraserve:router_breaker_open{instance="a"} 1.0' in text


async def test_all_instances_dead_is_a_503_with_retry_after(serve: Serve) -> None:
    served = await serve(2)
    for stub in served.stubs:
        stub.script = ["die"]
    async with served.client.post("/v1/completions", data=BODY) as r:
        assert r.status == 503
        assert int(r.headers["Retry-After"]) >= 1
    assert sum(len(stub.bodies) for stub in served.stubs) == 3
    await settled(served)


@pytest.mark.parametrize("status", [500, 503])
async def test_server_error_is_tried_on_one_other_instance(serve: Serve, status: int) -> None:
    served = await serve(3)
    served.publish([routes("one", a=1.0)])
    served.stubs[0].script = [f"status:{status}"]
    async with served.client.post("/v1/completions", json={"model": "one"}) as r:
        assert r.status == 200
    for stub in served.stubs:
        stub.script = [f"status:{status}"]
        stub.bodies.clear()
    async with served.client.post("/v1/completions", json={"model": "one"}) as r:
        assert r.status == status
    assert sum(len(stub.bodies) for stub in served.stubs) == 2  # a poisonous request does not visit all three


@pytest.mark.parametrize("before", [[], ["comment", "comment"]])
@pytest.mark.parametrize("status", [500, 503, 404])
async def test_an_error_as_the_first_event_is_tried_on_one_other_instance(
    serve: Serve, status: int, before: list[str]
) -> None:
    """vLLM has begun its answer before it learns that its engine is dead, or that the adapter can't be loaded."""
    served = await serve(3)
    served.publish([routes("one", a=1.0)])
    served.stubs[0].script = ["headers", *before, f"error:{status}", "done"]
    for stub in served.stubs[1:]:
        stub.script = ["headers", *before, "event", "done"]
    async with served.client.post("/v1/completions", json={"model": "one", "stream": True}) as r:
        assert r.status == 200
        assert [line for line in await events(r) if b"choices" in line] != []
    for stub in served.stubs:
        stub.script = served.stubs[0].script
        stub.bodies.clear()
    async with served.client.post("/v1/completions", json={"model": "one", "stream": True}) as r:
        assert (r.status, r.content_type) == (status, "application/json")  # nothing was sent yet that would forbid it
        assert (await r.json())["error"]["code"] == status
    assert sum(len(stub.bodies) for stub in served.stubs) == 2
    await settled(served)


async def test_death_after_comments_only_is_invisible(serve: Serve) -> None:
    """A server that keeps its clients waiting has not yet said anything."""
    served = await serve(2)
    served.publish([routes("one", a=1.0)])
    served.stubs[0].script = ["headers", "comment", "hold", "die"]
    served.stubs[1].script = ["headers", "event", "done"]
    answer = asyncio.ensure_future(served.client.post("/v1/completions", json={"model": "one", "stream": True}))
    await served.stubs[0].arrived.acquire()
    served.stubs[0].release()
    async with await answer as r:
        assert await events(r) == [b'data: {"choices": [{"text": "b-0"}]}\n', b"data: [DONE]\n"]
    await settled(served)


@pytest.mark.parametrize("script", [["error:400"], ["event", "error:500"]])
async def test_an_error_event_that_no_other_instance_would_better_is_passed_on(serve: Serve, script: list[str]) -> None:
    served = await serve(2)
    for stub in served.stubs:
        stub.script = ["headers", *script, "done"]
    async with served.client.post("/v1/completions", data=BODY) as r:
        assert r.status == 200
        assert b'"error"' in (await events(r))[len(script) - 1]
    assert sum(len(stub.bodies) for stub in served.stubs) == 1


@pytest.mark.parametrize(
    ("events", "status"),
    [
        (b'data: {"error": {"message": "x", "type": "InternalServerError", "param": null, "code": 500}}\n\n', 500),
        (b": x\r\n\r\n" + b'event: error\r\ndata: {"error": {"code": 503}}\r\n\r\n', 503),
        (b'event: error\ndata: {"type": "error", "error": {"type": "internal_error", "message": "x"}}\n\n', 500),
        (b'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error"}}\n\n', 0),
        (b'data: {"choices": [{"text": "\\"error\\""}]}\n\n', 0),
        (b'data: {"error": null, "id": 3}\n\n', 0),
        (b'data: {"error": {"code": "500"}}\n\n', 0),
        (b'data: {"error"\n\n', 0),
        (b'data: "error" \xff\n\n', 0),
        (b"event: response.created\n\n", 0),
        (b": keep-alive\n\n", 0),
    ],
)
def test_error_events_are_told_from_others(events: bytes, status: int) -> None:
    assert error_status(first_field(events)) == status


async def test_an_instance_that_answers_errors_only_is_avoided_for_a_while(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its API server outlives its engine, and would draw all requests, being idle."""
    pause_long(monkeypatch)
    served = await serve(2)
    served.publish([routes("one", a=1.0)])
    for script, count, expected in (
        (["status:503"], 5, 5),  # busy, but there
        (["status:500"], 2, 2),
        (["json"], 1, 1),
        (["status:500"], 2, 2),
        (["headers", "error:500", "done"], 5, 1),  # the third in a row
    ):
        served.stubs[0].script = script
        served.stubs[0].bodies.clear()
        for _ in range(count):
            async with served.client.post("/v1/completions", json={"model": "one"}) as r:
                assert r.status == 200
        assert len(served.stubs[0].bodies) == expected, script


async def test_an_adapter_that_one_instance_cannot_find_is_asked_for_elsewhere(serve: Serve) -> None:
    served = await serve(2)
    served.publish([routes("one", a=1.0)])
    served.stubs[0].script = ["status:404"]
    async with served.client.post("/v1/completions", json={"model": "one"}) as r:
        assert await r.json() == {"served_by": "b"}
    served.stubs[1].script = ["status:404"]
    async with served.client.post("/v1/completions", json={"model": "one"}) as r:
        assert r.status == 404
    for stub in served.stubs:
        stub.bodies.clear()
    async with served.client.post("/v1/completions", json={"model": "base"}) as r:  # of the base model it is an answer
        assert r.status == 404
    assert sum(len(stub.bodies) for stub in served.stubs) == 1


async def test_no_instance_is_a_503(serve: Serve) -> None:
    served = await serve(1)
    served.publish(stubs=[])
    async with served.client.post("/v1/completions", data=BODY) as r:
        assert r.status == 503
        assert r.headers["Retry-After"] == "2"
    async with served.client.get("/health") as r:
        assert r.status == 503


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


async def test_silent_instance_is_a_504_before_and_an_error_event_in_a_stream(serve: Serve) -> None:
    served = await serve(1, idle_timeout_s=0.2)
    stub = served.stubs[0]
    stub.script = ["hold"]
    async with served.client.post("/v1/completions", data=BODY) as r:
        assert r.status == 504
    stub.script = ["headers", "event", "hold"]
    async with served.client.post("/v1/completions", data=BODY) as r:
        assert b'"error"' in (await r.content.read())
    await settled(served)


async def test_request_on_an_instance_that_left_the_table_is_taken_back(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreachable host sends no reset: its requests hang until the table says that it is gone."""
    served = await serve(2)
    served.publish([routes("one", a=1.0)])
    stub = served.stubs[0]
    stub.script = ["hold"]
    monkeypatch.setattr("vllm_loraserve.router.directory.ORPHAN_S", 0.0)
    answer = asyncio.ensure_future(served.client.post("/v1/completions", json={"model": "one"}))
    async with asyncio.timeout(PATIENCE_S):
        await stub.arrived.acquire()
        served.publish([routes("one", b=1.0)], stubs=served.stubs[1:])
        async with await answer as r:
            assert await r.json() == {"served_by": "b"}
    await settled(served)


async def test_stream_on_an_instance_that_left_the_table_ends_in_an_error_event(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(1)
    served.stubs[0].script = ["headers", "event", "hold"]
    async with served.client.post("/v1/completions", data=BODY) as r:
        await r.content.readuntil(b"\n\n")
        monkeypatch.setattr("vllm_loraserve.router.directory.ORPHAN_S", 0.0)
        served.publish(stubs=[])
        assert b'"error"' in await r.content.read()


async def test_a_client_that_reads_slowly_keeps_the_stream_of_an_instance_that_left(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The instance is not silent while the client is what everything waits for; sent again, its bytes would mix."""
    served = await serve(2)
    served.publish([routes("one", a=1.0)])
    served.stubs[0].script = ["headers", "flood:400", "done"]  # more than all buffers in between hold
    async with served.client.post("/v1/completions", json={"model": "one"}) as r:
        size = len(await r.content.readany())
        await unread(served)
        monkeypatch.setattr("vllm_loraserve.router.directory.ORPHAN_S", 0.0)
        served.publish([routes("one", b=1.0)], stubs=served.stubs[1:])
        rest = await r.content.read()
    assert size + len(rest) == (400 << 16) + len(b"data: [DONE]\n\n")
    assert rest.endswith(b"data: [DONE]\n\n")
    assert served.stubs[1].bodies == []


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


@pytest.mark.parametrize("script", [["status:503"], ["die"]])
async def test_what_went_wrong_is_told_when_no_other_instance_comes_free(serve: Serve, script: list[str]) -> None:
    served = await serve(2, max_concurrency=1, queue_timeout_s=0.1)
    served.publish([routes("one", a=1.0), routes("two", b=1.0)])
    served.stubs[0].script, served.stubs[1].script = script, ["hold", "json"]
    busy = asyncio.ensure_future(served.client.post("/v1/completions", json={"model": "two"}))
    await served.stubs[1].arrived.acquire()
    async with served.client.post("/v1/completions", json={"model": "one"}) as r:
        assert r.status == 503
        error = (await r.json())["error"]
    if script == ["die"]:
        assert "failed once, last with ServerDisconnectedError on a" in error["message"]
    else:
        assert error == {"message": "stub a", "type": "Stub", "param": None, "code": 503}
    served.stubs[1].release()
    (await busy).release()
    await settled(served)


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
