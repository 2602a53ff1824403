"""One real cluster for the whole session: two vLLM instances, coordinator, router, six word adapters.

A test may break it; `cluster` repairs what the test before left broken, and only then.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from world import World

from vllm_loraserve.launcher import assets, traffic
from vllm_loraserve.launcher.cluster import Cluster
from vllm_loraserve.launcher.demo import plan_for

E2E = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is `e2e` and `vllm`, and the first test pays for the start of the cluster.

    It comes after the other rooms, so that the cluster takes nothing from their tests; and faults come last, so that
    what they break need not be started again.
    """
    for item in items:
        if E2E in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(1800))
    items.sort(key=lambda item: (E2E in item.path.parents, item.path == E2E / "test_faults.py"))


@pytest.fixture(scope="session")
def _world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    model = assets.model_path()
    words = assets.adapters(model)
    root = tmp_path_factory.mktemp("adapters")
    plan = plan_for(model, words, tmp_path_factory.mktemp("state"), instances=2, port=None)
    plan = dataclasses.replace(
        plan,
        adapter_roots=(*plan.adapter_roots, str(root)),
        # The expiry of an instance's membership is what bounds the time until its adapters are placed elsewhere.
        router_options=("--unload-drain-s", "60"),
    )
    cluster = Cluster(plan)
    cluster.start()
    try:

        async def reference() -> dict[str, str]:
            async with traffic.client_for(cluster.url) as client:
                return await traffic.base_reference(client, plan.model_name)

        base = asyncio.run(reference())
        for word in words:
            cluster.add_adapter(word.name, word.path)
        yield World(cluster, {w.name: w.word for w in words}, tuple(words), base, root)
    finally:
        pids = [pid for server in cluster.servers for pid in server.pids()]
        cluster.stop()
    left = [pid for pid in pids if _runs(pid)]
    assert left == [], "processes of the cluster outlived it"


@pytest.fixture
def world(_world: World) -> World:
    """The cluster with every part running."""
    cluster = _world.cluster
    for server in cluster.servers:
        if server.status is not None:
            server.start()
    cluster.wait_for_instances(2, 600.0)
    return _world


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z" and pid != os.getpid()
    return False
