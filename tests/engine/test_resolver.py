"""The resolver, when its coordinator is in trouble."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


from fake_engine import record  # noqa: E402
from vllm.exceptions import RetryableRequestError  # noqa: E402
from vllm.lora.resolver import LoRAResolverRegistry  # noqa: E402

from vllm_loraserve.config import LoRAServeConfig  # noqa: E402
from vllm_loraserve.coordinator.client import CoordinatorError, CoordinatorUnavailable  # noqa: E402
from vllm_loraserve.engine.resolver import LoRAServeResolver, respelled  # noqa: E402


async def test_a_coordinator_in_trouble_does_not_unregister_what_is_known(monkeypatch):
    resolver = LoRAServeResolver(LoRAServeConfig(coordinator="tcp://127.0.0.1:1"))
    resolver.learn(record("a"))
    code = "internal"

    async def ask(name):
        raise CoordinatorError(code, f"no answer for {name}")

    monkeypatch.setattr(resolver, "_ask", ask)
    assert await resolver.lookup("a") == record("a")
    code = "not_found"
    assert await resolver.lookup("a") is None
    code = "internal"
    assert await resolver.lookup("a") is None


async def test_while_the_registry_can_not_be_asked_a_name_is_not_unknown_but_a_503(monkeypatch):
    monkeypatch.setattr("vllm_loraserve.engine.resolver.AWAY_S", 1000.0)
    resolver = LoRAServeResolver(LoRAServeConfig(coordinator="tcp://127.0.0.1:1"))

    async def away(*_, **__):
        raise CoordinatorUnavailable("no answer")

    monkeypatch.setattr(resolver._connection(), "ask", away)
    resolver.learn(record("a"))
    for _ in range(2):  # asked in vain, then not asked at all
        with pytest.raises(RetryableRequestError) as refused:
            await resolver.resolve_lora("toy", "b")
        assert refused.value.status_code == 503
    assert (await resolver.resolve_lora("toy", "a")).lora_name == "a"
    monkeypatch.setitem(LoRAResolverRegistry.resolvers, "another", object())
    assert await resolver.resolve_lora("toy", "b") is None, "another may know it"


def test_spellings_of_a_directory_are_many_short_and_one_directory(tmp_path):
    from vllm_loraserve.engine.lora_manager import LoRAServeWorkerManager

    manager = SimpleNamespace(options=LoRAServeConfig(adapter_roots=(str(tmp_path),)))
    (tmp_path / "a").mkdir()
    spellings = [f"{tmp_path}/a{respelled(number)}" for number in range(2000)]
    assert spellings[0] == f"{tmp_path}/a"
    assert len(set(spellings)) == 2000
    assert max(map(len, spellings)) < len(spellings[0]) + 40
    for spelling in spellings[:50]:
        assert LoRAServeWorkerManager._resolve(manager, spelling) == spellings[0]
        assert Path(spelling).samefile(spellings[0])


def test_resolver_needs_a_coordinator():
    with pytest.raises(ValueError, match="set coordinator"):
        LoRAServeResolver(LoRAServeConfig())
