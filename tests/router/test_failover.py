"""A request whose instance fails: tried on another one, or answered so that the client knows."""

from __future__ import annotations

import asyncio
import json

import pytest

from vllm_loraserve.router.proxy import error_status, first_field

from .conftest import PATIENCE_S, Serve, events, routes, settled, unread

BODY = b'{"stream": false, "model": "base", "prompt": "hello"}'


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
