"""What the application does around every handler: paths, health, and the waiting room as clients see it."""

from __future__ import annotations

import asyncio

import pytest

from vllm_loraserve.router.paths import FORWARDED_PATHS

from .conftest import PATIENCE_S, Serve


@pytest.mark.parametrize("path", FORWARDED_PATHS)
async def test_every_forwarded_path_reaches_an_instance(serve: Serve, path: str) -> None:
    served = await serve(1)
    async with served.client.post(path, json={"model": "base"}) as r:
        assert await r.json() == {"served_by": "a"}


@pytest.mark.parametrize("path", ["/v1/%63ompletions?a=%41", "http://elsewhere.test/v1/completions?a=%41"])
async def test_what_is_forwarded_is_the_path_that_was_matched(serve: Serve, path: str) -> None:
    served = await serve(1)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.client._base_url.port)  # type: ignore[union-attr]
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200")
    assert served.stubs[0].paths == ["/v1/completions?a=%41"]


async def test_header_bytes_beyond_ascii_are_left_out(serve: Serve) -> None:
    served = await serve(2)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.client._base_url.port)  # type: ignore[union-attr]
    headers = "".join(f"{name}: \xff\r\n" for name in ("X-Session-Id", "Content-Type", "Authorization", "X-Request-Id"))
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: 2\r\n".encode("latin-1"))
    writer.write(b"Connection: close\r\n\r\n{}")
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200")
    assert served.idle()
    assert all(upstream.failures == 0 for upstream in served.router.directory.live())


async def test_unknown_paths_and_methods_have_openais_error_body(serve: Serve) -> None:
    served = await serve(1)
    for method, path, status in (
        ("GET", "/v1/responses/resp_1", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/sleep", 404),  # vLLM's administration is not for clients
        ("POST", "/collective_rpc", 404),
    ):
        async with served.client.request(method, path) as r:
            assert r.status == status, path
            assert (await r.json())["error"]["code"] == status
    assert served.stubs[0].bodies == []


async def test_health_tells_what_could_serve(serve: Serve) -> None:
    served = await serve(2)
    async with served.client.get("/health") as r:
        assert r.status == 200
        assert await r.json() == {
            "status": "ok",
            "instances": 2,
            "available": 2,
            "adapters": 0,
            "coordinator": "none",
        }
    for upstream in served.router.directory.live():
        upstream.failed(served.router.directory.clock())
    async with served.client.get("/health") as r:
        assert (r.status, (await r.json())["available"]) == (503, 0)


async def test_a_full_waiting_room_is_a_429_and_drains(serve: Serve) -> None:
    served = await serve(2, max_concurrency=1, max_queue=1)
    for stub in served.stubs:
        stub.script = ["hold", "json"]

    async def ask() -> int:
        async with served.client.post("/v1/completions", json={"model": "base"}) as r:
            if r.status == 429:
                assert int(r.headers["Retry-After"]) >= 1
                assert (await r.json())["error"]["type"] == "RateLimitError"
            return r.status

    async with asyncio.timeout(PATIENCE_S):
        running = [asyncio.ensure_future(ask()) for _ in range(2)]
        for stub in served.stubs:
            await stub.arrived.acquire()
        waiting = asyncio.ensure_future(ask())
        while served.router.admission.waiting == 0:
            await asyncio.sleep(0.005)
        assert await ask() == 429
        for stub in served.stubs:
            stub.release()
        assert await asyncio.gather(*running, waiting) == [200, 200, 200]
    assert served.idle()


async def test_a_client_that_leaves_the_queue_frees_its_seat(serve: Serve) -> None:
    served = await serve(1, max_concurrency=1, max_queue=1)
    stub = served.stubs[0]
    stub.script = ["hold", "json"]
    first = asyncio.ensure_future(served.client.post("/v1/completions", json={"model": "base"}))
    async with asyncio.timeout(PATIENCE_S):
        await stub.arrived.acquire()
        waiting = asyncio.ensure_future(served.client.post("/v1/completions", json={"model": "base"}))
        while served.router.admission.waiting == 0:
            await asyncio.sleep(0.005)
        waiting.cancel()
        while served.router.admission.waiting:
            await asyncio.sleep(0.005)
        stub.release()
        (await first).release()
        while not served.idle():
            await asyncio.sleep(0.005)
    assert len(stub.bodies) == 1
