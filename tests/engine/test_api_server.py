"""The server's start and stop: metrics while it runs, nothing without the flag."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def app_of(additional: dict[str, Any], rank: int = 0) -> Any:
    parallel = SimpleNamespace(nnodes=1, data_parallel_index=0, _api_process_rank=rank)
    config = SimpleNamespace(additional_config=additional, parallel_config=parallel, instance_id="test1")
    return SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config)))


def names() -> set[Any]:
    from prometheus_client import REGISTRY

    return set(REGISTRY._collector_to_names)


async def serve(additional: dict[str, Any], rank: int = 0) -> tuple[str, set[Any]]:
    from vllm_loraserve.engine.api_server import wrap_serve_http

    before = names()
    during: set[Any] = set()

    async def original(app: Any, sock: Any) -> str:
        await asyncio.sleep(0.01)
        during.update(names() - before)
        return "done"

    result = await wrap_serve_http(original)(app_of(additional, rank), None)
    assert names() == before
    return result, during


async def test_metrics_live_as_long_as_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_loraserve.engine import channel
    from vllm_loraserve.engine.metrics import Collector

    monkeypatch.setattr(channel, "address_of", lambda _, purpose: f"ipc://{tmp_path}/{purpose}")
    result, during = await serve({"loraserve": {}})
    assert result == "done"
    assert [type(collector) for collector in during] == [Collector]
    assert (await serve({}))[1] == set()
    assert (await serve({"loraserve": {}}, rank=1))[1] == set()


def test_addresses_are_private_to_the_user_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_loraserve.engine import channel

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = app_of({}).state.engine_client.vllm_config
    loads, stats = channel.address_of(config), channel.address_of(config, "stats")
    assert loads != stats
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(PermissionError):
        channel.address_of(config)
    config.parallel_config.nnodes = 2
    assert channel.address_of(config) is None
