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


@pytest.mark.parametrize("pooling", [False, True])
async def test_registered_adapters_are_resolved_without_vllms_runtime_loading(
    pooling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolverRegistry

    from vllm_loraserve.engine.api_server import RESOLVER_NAME, wrap_check_model, wrap_check_pooling_model

    def failed(code: int) -> Any:
        return SimpleNamespace(error=SimpleNamespace(code=code, message="found but could not be loaded"))

    answers = {"new": LoRARequest("new", 1, "/new"), "broken": failed(400), "nobody": failed(404)}
    asked: list[str] = []

    async def resolve_lora(name: str) -> Any:
        asked.append(name)
        return answers[name]

    async def original(self: Any, request: Any) -> str:
        return "vLLM's own answer"

    models = SimpleNamespace(resolve_lora=resolve_lora, lora_requests={"loaded": None})
    serving = SimpleNamespace(models=models, _is_model_supported=lambda name: name == "base")
    check = (wrap_check_pooling_model if pooling else wrap_check_model)(original)

    async def answer(name: str | None) -> Any:
        return await check(serving, SimpleNamespace(model=name))

    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {RESOLVER_NAME: object()})
    assert await answer("new") is None
    if pooling:
        with pytest.raises(ValueError, match="could not be loaded"):
            await answer("broken")
    else:
        assert await answer("broken") is answers["broken"]
    for name in ("nobody", "base", "loaded", None):
        assert await answer(name) == "vLLM's own answer"
    assert asked == ["new", "broken", "nobody"]
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    assert await answer("new") == "vLLM's own answer"


def test_what_was_let_go_while_a_request_was_read_is_unavailable_and_what_is_unknown_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.exceptions import RetryableRequestError, VLLMNotFoundError
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolverRegistry

    from vllm_loraserve.engine.api_server import RESOLVER_NAME, wrap_get_adapters

    original = getattr(BaseServing._maybe_get_adapters, "__wrapped__", BaseServing._maybe_get_adapters)
    get = wrap_get_adapters(original)
    loaded = LoRARequest("loaded", 1, "/loaded")
    models = SimpleNamespace(lora_requests={"loaded": loaded})
    serving = SimpleNamespace(models=models, _is_model_supported=lambda name: name == "base")

    def adapter(name: str) -> Any:
        return get(serving, SimpleNamespace(model=name))

    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {RESOLVER_NAME: SimpleNamespace(names=lambda: ["a"])})
    assert adapter("loaded") is loaded
    assert adapter("base") is None
    with pytest.raises(RetryableRequestError, match="'a' cannot be brought in now") as caught:
        adapter("a")
    assert caught.value.status_code == 503
    with pytest.raises(VLLMNotFoundError):
        adapter("nobody")
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    with pytest.raises(VLLMNotFoundError):
        adapter("a")


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
