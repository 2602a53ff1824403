"""Registration of real checkpoints over real sockets: what is taken, refused, replaced, removed."""

import asyncio
import os
import shutil
import threading

import msgspec
import pytest
from coordinator_bench import PATIENCE_S, FakeInstance, beat, join, write_adapter

from vllm_loraserve.adapters.source import resolve_source
from vllm_loraserve.coordinator.client import (
    CoordinatorError,
    TableSubscriber,
)
from vllm_loraserve.coordinator.messages import (
    AdapterReply,
    AddAdapter,
    Explain,
    Explanation,
    GetAdapter,
    GetStatus,
    Ok,
    Registered,
    RemoveAdapter,
    Residency,
    Status,
)


async def test_an_adapter_from_registration_to_removal(running, tmp_path):
    server, client = running
    path = write_adapter(tmp_path / "adapters" / "a", rank=16)
    instance = await join(client)
    reply = await client.ask(AddAdapter(name="a", source=str(path)), AdapterReply)
    assert reply.created
    assert (reply.adapter.rank, reply.adapter.target_modules) == (16, ("q_proj", "v_proj"))
    assert reply.adapter.source == str(path)
    assert reply.adapter.adapter_id > 0
    again = await client.ask(AddAdapter(name="a", source="a"), AdapterReply)
    assert not again.created
    assert again.adapter == reply.adapter
    await beat(client, instance)
    await beat(client, instance)
    subscriber = TableSubscriber(server.options.bind)
    subscriber.start()
    table = await subscriber.first_table(PATIENCE_S)
    assert [(r.adapter.name, r.routes[0].instance) for r in table.adapters] == [("a", "one")]
    assert table.instances[0].resident[0].sha256 == reply.adapter.sha256
    removal = asyncio.create_task(client.request(RemoveAdapter(name="a", drain_s=20)))
    while not removal.done():
        await asyncio.sleep(0.1)
        await beat(client, instance)
    assert await removal == Ok()
    assert instance.done == [("prefetch", "a"), ("release", "a")]
    with pytest.raises(CoordinatorError) as raised:
        await client.request(GetAdapter(name="a"))
    assert raised.value.code == "not_found"
    await subscriber.stop()


async def test_other_content_under_a_taken_name_is_a_conflict(running, tmp_path):
    _, client = running
    write_adapter(tmp_path / "adapters" / "a")
    write_adapter(tmp_path / "adapters" / "b", seed=1)
    await client.request(AddAdapter(name="x", source="a"))
    with pytest.raises(CoordinatorError) as raised:
        await client.request(AddAdapter(name="x", source="b"))
    assert raised.value.code == "conflict"
    # Two at once: one content wins, and it is the one that later reads see.
    results = await asyncio.gather(
        *(client.request(AddAdapter(name="y", source=s)) for s in "ab"), return_exceptions=True
    )
    winners = [r for r in results if isinstance(r, AdapterReply)]
    assert len(winners) == 1
    assert (await client.ask(GetAdapter(name="y"), AdapterReply)).adapter == winners[0].adapter


async def test_a_replacement_is_answered_when_nobody_serves_the_old_content(running, tmp_path):
    server, client = running
    write_adapter(tmp_path / "adapters" / "a")
    write_adapter(tmp_path / "adapters" / "b", seed=1)
    instance = FakeInstance("one")
    await client.request(instance.hello())
    old = await client.ask(AddAdapter(name="x", source="a"), AdapterReply)
    while "x" not in instance.resident:
        await beat(client, instance)
    replacing = asyncio.create_task(client.ask(AddAdapter(name="x", source="b", replace=True), AdapterReply))
    while server.controller.registry.get("x") == old.adapter:
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)
    assert not replacing.done(), "the instance has not said that it has the new content"
    while not replacing.done():
        await beat(client, instance)
        await asyncio.sleep(0.05)
    new = await replacing
    assert new.created
    assert instance.resident["x"].sha256 == new.adapter.sha256 != old.adapter.sha256


async def test_a_replacement_that_an_instance_does_not_take_says_so(running, tmp_path, monkeypatch):
    _, client = running
    write_adapter(tmp_path / "adapters" / "a")
    write_adapter(tmp_path / "adapters" / "b", seed=1)
    instance = FakeInstance("one")
    await client.request(instance.hello())
    await client.request(AddAdapter(name="x", source="a"))
    while "x" not in instance.resident:
        await beat(client, instance)
    monkeypatch.setattr("vllm_loraserve.coordinator.server.REPLACE_S", 0.3)
    with pytest.raises(CoordinatorError, match="'x' is replaced, but one did not take the new content"):
        await client.request(AddAdapter(name="x", source="b", replace=True))


def _truncate(path):
    data = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])


def _pickle(path):
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(b"\x80\x04")


def _config(path, old, new):
    config = path / "adapter_config.json"
    config.write_text(config.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        (lambda p: shutil.rmtree(p), "not_found", "no adapter"),
        (lambda p: (p / "adapter_config.json").unlink(), "invalid", "adapter_config.json"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "invalid", "adapter_config.json"),
        (_pickle, "invalid", "pickle"),
        (_truncate, "invalid", "adapter_model.safetensors"),
        (lambda p: write_adapter(p, rank=512), "invalid", "limit of 256"),
        (lambda p: write_adapter(p, hidden=32), "invalid", "base model"),
        (lambda p: _config(p, '"bias": "none"', '"bias": "all"'), "invalid", "bias"),
        (lambda p: _config(p, '"bias"', '"use_dora": true, "bias"'), "invalid", "DoRA"),
    ],
    ids=["missing", "no-config", "broken-config", "pickle", "truncated", "rank", "shapes", "bias", "dora"],
)
async def test_bad_adapters_are_refused_and_nothing_is_registered(running, tmp_path, spoil, code, says):
    server, client = running
    path = write_adapter(tmp_path / "adapters" / "bad")
    spoil(path)
    await join(client)
    with pytest.raises(CoordinatorError, match=says) as raised:
        await client.request(AddAdapter(name="bad", source=str(path)))
    assert raised.value.code == code
    assert "\n" not in str(raised.value)
    assert not server.controller.registry.all()
    assert not server._name_locks  # names that clients make up are not kept


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.02)


async def test_what_was_registered_before_any_instance_is_compared_when_one_joins(running, tmp_path):
    """One that does not fit is `failed`, with the reason; told otherwise, it is served after all."""
    server, client = running
    controller, adapters = server.controller, tmp_path / "adapters"
    write_adapter(adapters / "good")
    write_adapter(adapters / "other", hidden=32)
    write_adapter(adapters / "away")
    for name in ("good", "other", "away"):
        assert (await client.ask(AddAdapter(name=name, source=name), AdapterReply)).created, "nothing to compare with"
    shutil.rmtree(adapters / "away")
    instance = await join(client)
    await until(lambda: controller.registry.get_meta("modules"))
    assert {r.name: r.state for r in controller.registry.all()} == {
        "good": "active",
        "other": "failed",
        "away": "active",  # whoever loads it says what is the matter
    }
    record = controller.registry.get("other")
    assert "(in, out) (32, 32), but the base model's is (16, 16)" in record.reason
    status = await client.ask(GetStatus(), Status)
    assert f"'other' can't be served: {record.reason}" in status.problems
    routes = {r.adapter.name: len(r.routes) for r in status.table.adapters}
    assert routes["other"] == 0
    await beat(client, instance)
    assert ("prefetch", "other") not in instance.done
    for refused in (GetAdapter(name="other"), AddAdapter(name="other", source="other")):
        with pytest.raises(CoordinatorError, match="base model") as raised:
            await client.request(refused)
    assert raised.value.code == "invalid"
    assert "(32, 32)" in "".join((await client.ask(Explain(name="other"), Explanation)).lines)

    wider = FakeInstance("two")
    hello = msgspec.structs.replace(wider.hello(), modules=dict.fromkeys(("q_proj", "v_proj"), ((32, 32),)))
    await client.ask(hello, Registered)
    await until(lambda: controller.registry.get("other").state == "active")
    assert controller.registry.get("other").reason == ""


async def test_what_an_instance_holds_is_not_failed_for_what_lies_at_its_source(running, tmp_path):
    server, client = running
    write_adapter(tmp_path / "adapters" / "a")
    added = await client.ask(AddAdapter(name="a", source="a"), AdapterReply)
    write_adapter(tmp_path / "adapters" / "a", hidden=32)
    instance = FakeInstance("one")
    instance.resident["a"] = Residency(name="a", sha256=added.adapter.sha256)
    await client.ask(instance.hello(), Registered)
    await until(lambda: server.controller.registry.get_meta("modules"))
    assert server.controller.registry.get("a").state == "active"


def slow_inspection(monkeypatch):
    """Inspections wait: (set when one has begun, to be set so that it goes on)."""
    import vllm_loraserve.coordinator.server as module

    real = module.inspect_source
    begun, go_on = threading.Event(), threading.Event()

    def slow(*args, **kw):
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return real(*args, **kw)

    monkeypatch.setattr(module, "inspect_source", slow)
    return begun, go_on


async def test_an_adapter_that_is_being_inspected_while_the_first_instance_joins_is_compared_too(
    running, tmp_path, monkeypatch
):
    server, client = running
    write_adapter(tmp_path / "adapters" / "a", hidden=32)
    begun, go_on = slow_inspection(monkeypatch)
    adding = asyncio.create_task(client.request(AddAdapter(name="a", source="a")))
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    await join(client)
    go_on.set()
    with pytest.raises(CoordinatorError, match="base model"):
        await adding
    assert not server.controller.registry.all()


async def test_a_source_below_home_is_kept_as_the_path_that_was_inspected(running, tmp_path, monkeypatch):
    server, client = running
    path = write_adapter(tmp_path / "adapters" / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    await join(client)
    await client.request(AddAdapter(name="mine", source="~/adapters/mine"))
    assert server.controller.registry.get("mine").source == os.path.realpath(path)


@pytest.mark.parametrize("source", ["{tmp}/outside", "{tmp}/adapters/../outside", "../outside", "{tmp}/adapters/link"])
async def test_sources_outside_the_roots_are_forbidden(running, tmp_path, source):
    server, client = running
    write_adapter(tmp_path / "outside")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(CoordinatorError) as raised:
        await client.request(AddAdapter(name="x", source=source.format(tmp=tmp_path)))
    assert raised.value.code == "forbidden"
    assert not server.controller.registry.all()


async def test_a_hub_id_is_downloaded_only_where_that_is_allowed(running, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    server, client = running
    await join(client)
    snapshot = write_adapter(tmp_path / "hub" / "snapshot")
    cached = set()

    def download(repo, *, local_files_only, allow_patterns):
        if local_files_only and repo not in cached:
            raise OSError("not cached")
        cached.add(repo)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    add = AddAdapter(name="a", source="org/name")
    with pytest.raises(CoordinatorError, match="the local hub cache; download it first or allow downloads") as refused:
        await client.request(add)
    assert refused.value.code == "not_found"
    server.options = msgspec.structs.replace(server.options, allow_download=True)
    added = await client.request(add)
    assert (added.created, added.adapter.source) == (True, "org/name"), "each machine has a cache of its own"
    # An instance that may read only from its roots, on this machine.
    assert resolve_source("org/name", [tmp_path / "adapters"]) == snapshot


async def test_heartbeats_are_answered_while_an_adapter_is_inspected(running, tmp_path, monkeypatch):
    _, client = running
    write_adapter(tmp_path / "adapters" / "a")
    instance = await join(client)
    begun, go_on = slow_inspection(monkeypatch)
    adding = asyncio.create_task(client.request(AddAdapter(name="a", source="a")))
    assert await asyncio.to_thread(begun.wait, PATIENCE_S)
    for _ in range(5):
        await client.request(instance.beat())
    assert not adding.done()
    go_on.set()
    assert (await adding).created


async def test_sources_that_hang_are_answered_and_keep_no_other_waiting(running, tmp_path, monkeypatch):
    import vllm_loraserve.coordinator.server as module

    server, client = running
    write_adapter(tmp_path / "adapters" / "a")
    await join(client)
    real = module.inspect_source
    answer = threading.Event()

    def look(name, *args, **kw):
        if name.startswith("hung"):
            assert answer.wait(PATIENCE_S)
        return real(name, *args, **kw)

    monkeypatch.setattr(module, "inspect_source", look)
    monkeypatch.setattr(server._inspections, "timeout_s", 0.05)

    async def refusal(name, source):
        with pytest.raises(CoordinatorError) as refused:
            await client.request(AddAdapter(name=name, source=source))
        return refused.value.code, str(refused.value)

    for i in range(module.INSPECTIONS + 1):
        code, said = await refusal(f"hung-{i}", f"s{i}")
        assert code == "internal"
        assert f"'s{i}' could not be read within 0.05 s" in said
    monkeypatch.setattr(server._inspections, "timeout_s", PATIENCE_S)
    assert "'s0' hangs" in (await refusal("other", "s0"))[1]
    assert (await client.request(AddAdapter(name="a", source="a"))).created
    answer.set()
    async with asyncio.timeout(PATIENCE_S):
        while "hangs" in (await refusal("hung-0", "s0"))[1]:
            await asyncio.sleep(0.01)
