"""Two workers' host tiers over real connections: an adapter of one is brought to the other, or left to its file."""

import os
import threading
import time

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import torch  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

from vllm_loraserve.adapters.checkpoint import AdapterError  # noqa: E402
from vllm_loraserve.adapters.layout import ModuleShape, build_layout  # noqa: E402
from vllm_loraserve.config import ConfigError, LoRAServeConfig  # noqa: E402
from vllm_loraserve.engine import peer_sources  # noqa: E402
from vllm_loraserve.engine.adapter_loader import ServedAdapter  # noqa: E402
from vllm_loraserve.engine.peer_sources import PeerSources  # noqa: E402
from vllm_loraserve.engine.side_loading import _status_of, is_transient  # noqa: E402
from vllm_loraserve.memory.host_tier import HostEntry, HostTier, HostTierFullError  # noqa: E402
from vllm_loraserve.transfer import pool  # noqa: E402
from vllm_loraserve.transfer.auth import generate_key  # noqa: E402
from vllm_loraserve.transfer.errors import AdapterUnavailableError  # noqa: E402


def tier(dtype: str = "float32", budget: int = 1 << 20) -> HostTier:
    modules = [ModuleShape("q", "attention", 64, (64,)), ModuleShape("up", "mlp", 64, (96,))]
    return HostTier(build_layout(modules, model="tiny", dtype=dtype, page_rows=8, tp_rank=0, tp_size=1), budget)


def fill(t: HostTier, key: int, digest: str, seed: int) -> bytes:
    entry = t.create(key, digest, (16, 8))
    random_weights(t, entry, seed)
    t.commit(entry)
    return content(t, key)


def random_weights(t: HostTier, entry: HostEntry, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for target in t.targets(entry):
        if target is not None:
            target.copy_(torch.rand(target.shape, generator=generator))


def content(t: HostTier, key: int) -> bytes:
    entry = t.get(key)
    return bytes(t.slab.view(entry.offset, entry.size))


def until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@pytest.fixture
def worker(tmp_path):
    """make(instance, tier, **options) -> PeerSources with the cluster's key"""
    key = tmp_path / "key"
    key.write_bytes(generate_key())
    key.chmod(0o600)
    made = []

    def make(instance: str, t: HostTier, whole=lambda _: True, **options) -> PeerSources:
        loader = options.pop("loader", None)
        config = LoRAServeConfig(
            transfer_key_file=str(options.pop("key", key)), instance=instance, transfer_rdma="off", **options
        )
        made.append(PeerSources(config, t, whole, loader=loader))
        return made[-1]

    yield make
    for m in made:
        m.close()


def test_an_adapter_comes_from_a_peer_under_an_id_of_our_own(worker):
    theirs, ours = tier(), tier()
    holder, asker = worker("one", theirs), worker("two", ours)
    weights = fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/gone"))
    request = LoRARequest("a", 9, "/gone")
    assert asker.bring(request) is None, "nobody has said where it is"
    asker.locate("a", "/gone", "sha", [("one", holder.endpoint)])
    adapter = asker.bring(request)
    assert (adapter.id, adapter.rank, adapter.ranks) == (9, 16, (16, 8))
    assert content(ours, 9) == weights
    counted = {(name, *labels.values()): n for f in asker.metrics() for name, labels, n in f.samples}
    assert counted["loraserve:fetches_total", "peer", "ok"] == 1
    assert counted["loraserve:transfer_bytes_total",] == len(weights)
    again = asker.bring(request)
    assert (again.id, again.ranks) == (9, (16, 8)), "it is here already, and its checkpoint need not be"
    assert sum(n for f in asker.metrics() for name, labels, n in f.samples if name == "loraserve:fetches_total") == 1
    # From now on the asker is a source too.
    third_tier = tier()
    third = worker("three", third_tier)
    third.locate("a", "/gone", "sha", [("two", asker.endpoint)])
    assert third.bring(LoRARequest("a", 1, "/gone")) is not None
    assert content(third_tier, 1) == weights


def test_progress_is_told_while_an_adapter_is_on_its_way(worker, monkeypatch):
    monkeypatch.setattr(pool, "REPORT_S", 0.01)
    theirs = tier()
    holder, asker = worker("one", theirs), worker("two", tier())
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    asker.locate("a", "/a", "sha", [("one", holder.endpoint)])
    told, acquire = threading.Event(), holder._store.acquire
    monkeypatch.setattr(holder._store, "acquire", lambda name: told.wait(120) and acquire(name))
    seen = []

    def tell() -> None:
        seen.extend(labels for f in asker.metrics() for name, labels, _ in f.samples if "progress_bytes" in name)
        told.set()

    asker.on_progress = tell
    assert asker.bring(LoRARequest("a", 9, "/a")) is not None
    assert seen[0] == {"adapter": "a"}


@pytest.mark.parametrize("why", ["other content", "other layout", "removed", "not whole", "dead peer", "other rank"])
def test_what_can_not_come_from_a_peer_is_left_to_the_checkpoint(worker, why):
    theirs = tier()
    holder = worker("one", theirs, whole=lambda _: why != "not whole")
    asker = worker("two", tier("bfloat16" if why == "other layout" else "float32"), transfer_deadline_s=3.0)
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    endpoint = "127.0.0.1:1" if why == "dead peer" else holder.endpoint
    if why == "removed":
        holder.removed(5)
    if why == "other rank":
        asker._rank = 1
    asker.locate("a", "/a", "another sha" if why == "other content" else "sha", [("one", endpoint)])
    assert asker.bring(LoRARequest("a", 9, "/a")) is None


def test_new_content_of_a_name_replaces_the_old_for_peers(worker):
    theirs, ours = tier(), tier()
    holder, asker = worker("one", theirs), worker("two", ours)
    fill(theirs, 5, "old", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    new = fill(theirs, 6, "new", seed=2)
    holder.served(LoRARequest("a", 6, "/a/."))
    holder.removed(5)
    asker.locate("a", "/a/.", "new", [("one", holder.endpoint)])
    assert asker.bring(LoRARequest("a", 9, "/a/.")) is not None
    assert content(ours, 9) == new


def test_new_content_of_a_name_is_not_taken_for_the_old_that_comes_late(worker, monkeypatch):
    theirs, ours = tier(), tier()
    holder, asker = worker("one", theirs), worker("two", ours)
    fill(theirs, 5, "old", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    asker.locate("a", "/a", "old", [("one", holder.endpoint)])
    asked, gate, reserve = threading.Event(), threading.Event(), asker._store.reserve

    def late(pages):
        asked.set()
        assert gate.wait(60)
        return reserve(pages)

    monkeypatch.setattr(asker._store, "reserve", late)
    brought = []
    load = threading.Thread(target=lambda: brought.append(asker.bring(LoRARequest("a", 8, "/a"))))
    load.start()
    assert asked.wait(60)
    # Meanwhile the name stands for other content, under another id, as its checkpoint has it.
    new = fill(ours, 9, "new", seed=2)
    asker.served(LoRARequest("a", 9, "/a/."))
    gate.set()
    load.join(60)
    assert not load.is_alive()
    assert content(ours, 9) == new
    assert ours.get(9).digest == "new"
    assert brought[0].id == 8
    assert ours.get(8).digest == "old"


def test_a_file_system_that_does_not_answer_holds_up_no_other_adapter(worker, monkeypatch):
    theirs, ours = tier(), tier()
    holder, asker = worker("one", theirs), worker("two", ours)
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    fill(ours, 6, "sha-b", seed=2)
    asker.served(LoRARequest("b", 6, "/hangs"))
    gate, asked = threading.Event(), []

    def exists(path):
        asked.append(path)
        return gate.wait(60)

    monkeypatch.setattr(peer_sources.os.path, "exists", exists)
    monkeypatch.setattr(peer_sources, "LOOK_S", 0.01)
    asker.locate("a", "/a", "sha", [("one", holder.endpoint)])
    try:
        for adapter in (9, 10):
            asker._looked_at = -peer_sources.CHECKPOINTS_EVERY_S
            assert asker.bring(LoRARequest("a", adapter, "/a")).id == adapter
        assert not gate.is_set()
        assert len(asked) == 1, "one thread hangs there, not one for every load"
        assert ours.may_evict(6), "what was known"
    finally:
        gate.set()


def test_a_peer_that_no_table_names_any_more_is_let_go(worker):
    theirs = tier()
    holder, asker = worker("one", theirs), worker("two", tier())
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    for name in "ab":
        asker.locate(name, f"/{name}", "sha", [("one", holder.endpoint)])
    assert asker.bring(LoRARequest("a", 9, "/a")) is not None
    asker.locate("a", "/a", "sha", [])
    assert list(asker._peers._peers) == [holder.endpoint], "b is there still"
    asker.locate("b", "/b", "sha", [])
    until(lambda: not asker._peers._peers)


def test_adapters_and_instances_that_are_gone_are_forgotten(worker):
    theirs, ours = tier(), tier()
    holder, asker = worker("one", theirs), worker("two", ours)
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    for name in "abc":
        asker.locate(name, f"/{name}", "sha", [("one", holder.endpoint), ("dead", "127.0.0.1:1")])
    assert asker.bring(LoRARequest("a", 9, "/a")) is not None
    asker.retain({"a", "b"}, {"one"})
    assert asker._located.keys() == {("a", "/a"), ("b", "/b")}, "c is not registered any more"
    assert {x.instance for _, row in asker._located.values() for x in row} == {"one"}, "dead is no member"
    assert not asker.knows(LoRARequest("c", 1, "/c"))
    asker.removed(9)
    assert asker.knows(LoRARequest("a", 10, "/a")), "another load of it may have been asked for by now"
    assert list(asker._peers._peers) == [holder.endpoint], "b is there still"
    asker.retain({"b"}, {"two"})
    assert asker._located["b", "/b"] == ("sha", ())
    until(lambda: not asker._peers._peers)


def test_a_copy_at_an_instance_that_is_gone_is_no_copy(worker, tmp_path):
    theirs, ours = tier(), tier()
    holder, asker = worker("one", theirs), worker("two", ours)
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, str(tmp_path / "gone")))
    holder.locate("a", str(tmp_path / "gone"), "sha", [("two", asker.endpoint)])
    holder.look_at_checkpoints()
    asker.locate("a", "/a", "sha", [("one", holder.endpoint)])
    assert asker.bring(LoRARequest("a", 9, "/a")) is not None
    until(lambda: theirs.may_evict(5))  # two has confirmed its copy
    holder.retain({"a"}, {"one"})
    assert not theirs.may_evict(5)


def test_the_ways_are_those_that_were_named(worker):
    theirs, ours = tier(), tier()
    holder, asker = worker("one", theirs), worker("two", ours, transfer_ways=("verbs", "tcp"))
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    asker.locate("a", "/a", "sha", [("one", holder.endpoint)])
    assert asker.bring(LoRARequest("a", 9, "/a")) is not None
    counted = {(name, *labels.values()): n for f in asker.metrics() for name, labels, n in f.samples}
    assert counted["loraserve:transfer_arrived_bytes_total", "tcp"] == len(content(ours, 9))
    back = worker("three", tier())
    back.locate("a", "/a", "sha", [("two", asker.endpoint)])
    assert back.bring(LoRARequest("a", 1, "/a")) is not None
    (peer,) = back._peers._peers.values()
    assert peer.reasons()["memfd"] == "the peer is on another host, or offers no mapping"


def test_nixl_is_refused_in_one_line_where_it_can_not_be_used(worker, monkeypatch):
    monkeypatch.setattr(peer_sources.nixl, "unusable", lambda: "the nixl extra is not installed")
    with pytest.raises(ConfigError, match=r"transfer_ways=.*no nixl here: the nixl extra is not installed"):
        worker("one", tier(), transfer_ways=("nixl", "tcp"))


def test_a_stranger_gets_nothing(worker, tmp_path):
    theirs = tier()
    holder = worker("one", theirs)
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    other = tmp_path / "other"
    other.write_bytes(generate_key())
    other.chmod(0o600)
    stranger = worker("two", tier(), key=other, transfer_deadline_s=3.0)
    stranger.locate("a", "/a", "sha", [("one", holder.endpoint)])
    assert stranger.bring(LoRARequest("a", 9, "/a")) is None


class Loader:
    """Checkpoints of the test: name -> (digest, seed), or the error that reading one raises. `gate`: reading waits."""

    def __init__(self, t: HostTier, **checkpoints) -> None:
        self.tier, self.checkpoints, self.gate, self.reads = t, checkpoints, threading.Event(), []
        self.gate.set()

    def prepare(self, request: LoRARequest, commit=None) -> ServedAdapter:
        self.reads.append(request.lora_name)
        assert self.gate.wait(60)
        what = self.checkpoints.get(request.lora_name)
        if what is None:
            raise AdapterError("not_found", f"There is no adapter directory '{request.lora_path}'.")
        if isinstance(what, Exception):
            raise what
        digest, seed = what
        entry = self.tier.create(request.lora_int_id, digest, (16, 8))
        random_weights(self.tier, entry, seed)
        (commit or self.tier.commit)(entry)
        adapter = ServedAdapter(request.lora_int_id, 16, {})
        adapter.request, adapter.ranks, adapter.pages = request, entry.ranks, entry.pages
        return adapter


def test_a_slow_peer_gets_the_checkpoint_beside_it(worker, monkeypatch):
    theirs, ours = tier(), tier()
    weights = fill(theirs, 5, "sha", seed=1)
    holder = worker("one", theirs)
    loader = Loader(ours, a=("sha", 1))
    asker = worker("two", ours, loader=loader)
    holder.served(LoRARequest("a", 5, "/a"))
    asker.locate("a", "/a", "sha", [("one", holder.endpoint)])
    gate, acquire = threading.Event(), holder._store.acquire
    monkeypatch.setattr(holder._store, "acquire", lambda name: gate.wait(60) and acquire(name))
    try:
        adapter = asker.bring(LoRARequest("a", 9, "/a"))
    finally:
        gate.set()
    assert (adapter.id, adapter.ranks, loader.reads) == (9, (16, 8), ["a"])
    assert content(ours, 9) == weights
    asker.close()  # the peer's part is over too: what it reserved has been given back
    ours.check_integrity()
    assert len(ours) == 1
    assert ours.get(9).users == 0


def test_a_peer_goes_before_the_checkpoint_and_the_checkpoint_after_dead_peers(worker):
    theirs, ours = tier(), tier()
    weights = fill(theirs, 5, "sha", seed=1)
    holder = worker("one", theirs)
    loader = Loader(ours, a=("sha", 1), b=("sha-b", 2))
    asker = worker("two", ours, loader=loader)
    holder.served(LoRARequest("a", 5, "/a"))
    asker.locate("a", "/a", "sha", [("one", holder.endpoint)])
    asker.locate("b", "/b", "sha-b", [("dead", "127.0.0.1:1")])
    assert asker.bring(LoRARequest("a", 9, "/a")) is not None
    assert content(ours, 9) == weights
    assert "b" not in loader.reads
    adapter = asker.bring(LoRARequest("b", 8, "/b"))
    assert (adapter.id, ours.get(8).digest) == (8, "sha-b")
    ours.check_integrity()


@pytest.mark.parametrize("holders", [[], [("dead", "127.0.0.1:1")]])
def test_all_sources_gone_is_a_503_that_names_them_and_the_next_adapter_comes(worker, holders):
    ours = tier()
    loader = Loader(ours, b=("sha-b", 2))
    asker = worker("two", ours, loader=loader)
    request = LoRARequest("a", 9, "/gone")
    asker.locate("a", "/gone", "sha", holders)
    asker.locate("b", "/b", "sha-b", holders)
    assert asker.knows(request), "so that the request waits for the load's verdict"
    with pytest.raises(AdapterUnavailableError, match="There is no adapter directory '/gone'") as caught:
        asker.bring(request)
    assert _status_of(caught.value) == 503
    assert not is_transient(caught.value), "it is told at once"
    assert ("peer dead" if holders else "none holds it") in str(caught.value)
    assert asker.bring(LoRARequest("b", 8, "/b")).id == 8
    assert len(ours) == 1
    ours.check_integrity()


def test_a_checkpoint_that_is_wrong_says_so_itself(worker):
    loader = Loader(ours := tier(), a=AdapterError("mismatch", "'/a' targets 'x', which this model has not."))
    asker = worker("two", ours, loader=loader)
    asker.locate("a", "/a", "sha", [("dead", "127.0.0.1:1")])
    with pytest.raises(AdapterError, match="targets 'x'") as caught:
        asker.bring(LoRARequest("a", 9, "/a"))
    assert _status_of(caught.value) == 400


def test_the_last_copy_stays_until_a_move_is_confirmed(worker, tmp_path):
    probe = tier()
    before = probe.free_bytes
    fill(probe, 1, "x", seed=1)
    theirs, ours = tier(budget=2 * (before - probe.free_bytes)), tier()  # room for two adapters
    holder, asker = worker("one", theirs), worker("two", ours)
    for key, name in ((5, "a"), (6, "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        fill(theirs, key, f"sha-{name}", seed=key)
        holder.served(LoRARequest(name, key, str(tmp_path / name)))
    weights = content(theirs, 5)
    for name in "ab":
        (tmp_path / name / "adapter_config.json").unlink()
    holder.look_at_checkpoints()
    with pytest.raises(HostTierFullError) as caught:
        theirs.create(7, "sha-c", (16, 8))
    assert _status_of(caught.value) == 503
    # A table that names another holder is no confirmation: that one may rely on ours.
    holder.locate("a", str(tmp_path / "a"), "sha-a", [("two", asker.endpoint)])
    with pytest.raises(HostTierFullError):
        theirs.create(7, "sha-c", (16, 8))
    asker.locate("a", "/a", "sha-a", [("one", holder.endpoint)])
    assert asker.bring(LoRARequest("a", 9, "/a")) is not None
    until(lambda: theirs.may_evict(5))
    entry = theirs.create(7, "sha-c", (16, 8))
    assert (5 in theirs, 6 in theirs) == (False, True)
    theirs.discard(entry)
    assert content(ours, 9) == weights
    # And back: the copy that was confirmed last is now the one that stays.
    asker.look_at_checkpoints()
    assert not ours.may_evict(9)
    assert holder.bring(LoRARequest("a", 5, str(tmp_path / "a"))) is not None
    until(lambda: ours.may_evict(9))
    assert not theirs.may_evict(5)


def test_a_look_at_checkpoints_that_is_under_way_is_waited_for(worker, tmp_path, monkeypatch):
    ours = tier()
    holder = worker("one", ours)
    fill(ours, 5, "sha-a", seed=1)
    holder.served(LoRARequest("a", 5, str(tmp_path / "gone")))
    exists, asked = os.path.exists, threading.Event()

    def slow(path):
        asked.set()
        time.sleep(0.2)
        return exists(path)

    monkeypatch.setattr(os.path, "exists", slow)
    holder.look_at_checkpoints(patience_s=0)
    assert asked.wait(10)
    assert ours.may_evict(5), "nothing is known yet"
    holder.look_at_checkpoints(every_s=60, patience_s=60)
    assert not ours.may_evict(5)
    # And one that began before this call is not enough where only a look from now on is.
    holder.look_at_checkpoints(patience_s=0)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "adapter_config.json").write_text("{}")
    holder.look_at_checkpoints()
    assert ours.may_evict(5)


def test_who_has_to_evict_looks_at_the_checkpoints_first(worker, tmp_path):
    probe = tier()
    before = probe.free_bytes
    fill(probe, 1, "x", seed=1)
    theirs = tier(budget=2 * (before - probe.free_bytes))  # room for two adapters
    holder = worker("one", theirs)
    checkpoint = tmp_path / "adapter_config.json"
    checkpoint.write_text("{}")
    fill(theirs, 5, "sha-a", seed=1)
    holder.served(LoRARequest("a", 5, str(tmp_path)))
    holder.look_at_checkpoints()
    checkpoint.unlink()
    holder._looked_at = -peer_sources.CHECKPOINTS_EVERY_S
    fill(theirs, 6, "sha-b", seed=2)
    assert theirs.may_evict(5), "there was room, so nobody looked"
    entry = theirs.create(7, "sha-c", (16, 8))
    theirs.discard(entry)
    assert (5 in theirs, 6 in theirs) == (True, False), "5 is the last copy: its checkpoint is gone"


def test_a_copy_whose_checkpoint_can_be_read_may_go(worker, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    theirs = tier()
    holder = worker("one", theirs)
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, str(tmp_path)))
    holder.look_at_checkpoints()
    assert theirs.may_evict(5)
