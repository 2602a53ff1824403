"""Prefetch, release and replacement, as an instance carries them out."""

import asyncio
import time

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from fake_engine import record  # noqa: E402
from one_instance import begun, finish, until  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402


async def test_release_waits_for_running_requests(joined):
    coordinator, agent, engine, models = joined
    coordinator.add(record("a"))
    await until(lambda: "a" in models.lora_requests)
    stream = await begun(engine, models.lora_requests["a"])
    release = asyncio.create_task(agent.orders.release(coordinator.registry.get("a")))
    await asyncio.sleep(0.4)
    assert "a" not in models.lora_requests, "no new request gets it"
    assert engine.held, "but the running one keeps it"
    await finish(engine, stream)
    await release
    assert not engine.held


async def test_a_superseded_release_is_answered_while_requests_run(joined):
    coordinator, agent, engine, models = joined
    coordinator.add(record("a"))
    await until(lambda: "a" in models.lora_requests)
    stream = await begun(engine, models.lora_requests["a"])
    await agent.orders.release(coordinator.registry.get("a"), superseded=True)
    assert "a" not in models.lora_requests
    assert engine.held
    await finish(engine, stream)
    await until(lambda: not engine.held)


async def test_new_content_under_a_name_gets_a_new_id_and_another_path_spelling(joined):
    _, agent, engine, models = joined
    await agent.orders.prefetch(record("a", "one"))
    first = models.lora_requests["a"]
    await agent.orders.prefetch(record("a", "one"))
    assert models.lora_requests["a"] is first
    await agent.orders.prefetch(record("a", "two"))
    second = models.lora_requests["a"]
    assert second.lora_int_id != first.lora_int_id
    assert second.lora_path == "/adapters/a/.", "vLLM's prefix cache is keyed by name and path"
    await until(lambda: list(engine.held) == [second.lora_int_id])
    await agent.orders.prefetch(record("a", "one"))
    assert models.lora_requests["a"].lora_path == first.lora_path, "its old blocks are right again"


async def registered(joined, content="one"):
    """Registers content as 'a', in place of other; returns the LoRARequest that has the name once it is this one's."""
    coordinator, agent, _, models = joined
    coordinator.controller.add(record("a", content), time.monotonic(), replace=True)
    await until(lambda: "a" in models.lora_requests and agent.resolver.digest_of(models.lora_requests["a"]) == content)
    return models.lora_requests["a"]


async def test_content_that_takes_a_name_over_is_loaded_while_the_old_one_serves(joined):
    coordinator, _, engine, models = joined
    old = await registered(joined)
    stream = await begun(engine, old)
    engine.load_s = 0.5
    taking_over = asyncio.create_task(registered(joined, "two"))
    while not taking_over.done():
        assert "a" in models.lora_requests
        await asyncio.sleep(0.01)
    new = await taking_over
    assert new.lora_int_id in engine.held, "not before it was there"
    assert old.lora_int_id in engine.held, "a request runs with the old weights"
    await until(lambda: coordinator.controller.outdated(coordinator.registry.get("a")) == [])
    await finish(engine, stream)
    await until(lambda: set(engine.held) == {new.lora_int_id})


async def test_a_request_that_took_the_old_content_a_moment_ago_finds_it(joined, monkeypatch):
    """It is counted only when the engine client begins with it, after its prompt was read."""
    monkeypatch.setattr("vllm_loraserve.engine.orders.LINGER_S", 4.0)
    _, _, engine, _ = joined
    old = await registered(joined)
    await registered(joined, "two")
    await asyncio.sleep(0.2)
    stream = await begun(engine, old)
    await asyncio.sleep(4.5)
    assert old.lora_int_id in engine.held
    await finish(engine, stream)
    await until(lambda: old.lora_int_id not in engine.held)


async def test_the_last_of_several_replacements_wins(joined):
    coordinator, agent, engine, models = joined
    await registered(joined)
    engine.load_s = 0.4
    coordinator.controller.add(record("a", "two"), time.monotonic(), replace=True)
    await until(lambda: agent.orders._turns["a"].locked())
    last = await registered(joined, "three")
    await until(lambda: list(engine.held) == [last.lora_int_id])
    assert models.lora_requests["a"] is last
    assert coordinator.controller.problems() == []


async def test_a_removal_in_the_middle_of_a_replacement_ends_both(joined):
    coordinator, agent, engine, models = joined
    old = await registered(joined)
    engine.load_s = 1000.0
    coordinator.controller.add(record("a", "two"), time.monotonic(), replace=True)
    await until(lambda: agent.orders._turns["a"].locked())
    removed = coordinator.controller.remove("a", 0.0, time.monotonic())
    while not removed.is_set():
        assert models.lora_requests.get("a") in (None, old)
        await asyncio.sleep(0.01)
    assert "a" not in models.lora_requests
    await until(lambda: not agent.orders._turns["a"].locked() and not engine.held)
    assert "a" not in models.lora_requests


@pytest.mark.parametrize("when", ["at once", "aside"])
async def test_a_replacement_that_can_not_be_loaded_is_not_hidden_by_the_old_content(joined, when):
    coordinator, agent, engine, models = joined
    await registered(joined)
    if when == "at once":
        engine.broken.add("a")
    else:
        engine.load_s = 1000.0
        agent.orders._patience_s = 0.2
    fresh, _ = coordinator.controller.add(record("a", "two"), time.monotonic(), replace=True)
    await until(lambda: coordinator.controller.outdated(fresh) == [])
    assert "'one' can't load it: " in coordinator.controller.replaced(fresh)
    assert "a" not in models.lora_requests
    await until(lambda: not engine.held)


async def test_a_prefetch_whose_adapter_was_removed_holds_up_no_other(joined):
    _, agent, engine, models = joined
    engine.load_s = 1000.0
    first = asyncio.create_task(agent.orders.prefetch(record("a")))
    await until(lambda: "a" in models.lora_requests)
    await agent.orders.release(record("a"))
    engine.load_s = 0.0
    async with asyncio.timeout(agent.orders._patience_s / 2):
        await agent.orders.prefetch(record("a"))
        await first


async def test_a_prefetch_into_an_engine_that_loads_aside_ends_when_it_is_there(joined, monkeypatch):
    _, agent, engine, _ = joined
    engine.load_s = 0.3
    started = time.monotonic()
    await agent.orders.prefetch(record("a"))
    assert time.monotonic() - started >= 0.3
    assert engine.held
    assert agent.orders._patience_s > agent.config.load_timeout_s, "the engine's own verdict comes first"
    monkeypatch.setattr(agent.orders, "_patience_s", 0.2)
    engine.load_s = 1000.0
    with pytest.raises(TimeoutError, match="has not loaded 'b'"):
        await agent.orders.prefetch(record("b"))


async def test_residency_and_failures_are_asked_from_every_worker(joined):
    _, agent, engine, _ = joined
    agent.holdings.extended = True
    await agent.orders.prefetch(record("a"))
    await agent.orders.prefetch(record("b", source="/adapters/b"))
    held = {(r.name, r.tier) for r in await agent.holdings.residency()}
    assert held == {("a", "host"), ("b", "host")}, "in slots of all?"
    engine.load_s, engine.errors = 30.0, {3: "rank 512 is too large"}
    with pytest.raises(RuntimeError, match="rank 512 is too large"):
        await agent.orders.prefetch(record("c", source="/adapters/c"))


async def test_what_the_operator_loaded_is_left_alone(joined):
    coordinator, agent, engine, models = joined
    own = LoRARequest("mine", models.lora_id_counter.inc(1), "/own")
    await engine.add_lora(own)
    models.lora_requests["mine"] = own
    await agent.orders.release(record("mine"))
    with pytest.raises(ValueError, match="outside the registry"):
        await agent.orders.prefetch(record("mine"))
    assert models.lora_requests == {"mine": own}
    await asyncio.sleep(0.3)
    assert not coordinator.controller.members.get("one").resident
