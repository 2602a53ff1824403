"""Metric labels stay bounded and gauges follow the state."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from vllm_loraserve.router.metrics import rank_class

from .conftest import PATIENCE_S, Serve, routes


def test_rank_classes_are_few() -> None:
    assert [rank_class(r) for r in (-1, 0, 1, 8, 9, 16, 100, 256, 512, 9999)] == [
        *("none", "base", "8", "8", "16", "16", "128", "256", "512", "512")
    ]
    assert len({rank_class(r) for r in range(-1, 5000)}) == 9


async def test_names_from_requests_never_become_labels(serve: Serve) -> None:
    served = await serve(1)
    served.publish([routes(f"adapter-{n}", rank=n + 1, a=1.0) for n in range(50)])
    for n in range(50):
        async with served.client.post("/v1/completions", json={"model": f"adapter-{n}"}) as r:
            assert r.status == 200
        async with served.client.post("/v1/completions", json={"model": f"made-up-{n}"}) as r:
            assert r.status == 404
        async with served.client.get(f"/path/{n}") as r:
            assert r.status == 404
    async with served.client.get("/metrics") as r:
        text = await r.text()
    assert "adapter-" not in text
    assert "made-up" not in text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    requests = [s for s in samples if s.name == "loraserve:router_requests_total"]
    assert sum(s.value for s in requests) == 150
    assert {(s.labels["endpoint"], s.labels["rank"], s.labels["status"]) for s in requests} == {
        *(("/v1/completions", rank, "200") for rank in ("8", "16", "32", "64")),
        ("/v1/completions", "none", "404"),
        ("other", "none", "404"),
    }
    first = [s for s in samples if s.name == "loraserve:router_first_byte_seconds_count"]
    assert sum(s.value for s in first) == 50
    assert next(s.value for s in samples if s.name == "loraserve:router_adapters") == 50


async def test_gauges_show_what_is_under_way(serve: Serve) -> None:
    served = await serve(1, max_concurrency=1)
    stub = served.stubs[0]
    stub.script = ["hold", "json"]
    requests = [asyncio.ensure_future(served.client.post("/v1/completions", json={"model": "base"})) for _ in range(3)]

    async def gauges() -> dict[str, float]:
        async with served.client.get("/metrics") as r:
            families = text_string_to_metric_families(await r.text())
        return {s.name: s.value for family in families for s in family.samples}

    async with asyncio.timeout(PATIENCE_S):
        await stub.arrived.acquire()
        while served.router.admission.waiting < 2:
            await asyncio.sleep(0.005)
        shown = await gauges()
        assert shown["loraserve:router_in_flight"] == 1
        assert shown["loraserve:router_queue_depth"] == 2
        stub.release()
        for answer in await asyncio.gather(*requests):
            answer.release()
    shown = await gauges()
    assert shown["loraserve:router_in_flight"] == 0
    assert shown["loraserve:router_queue_depth"] == 0
    assert shown["loraserve:router_queue_wait_seconds_count"] == 3
