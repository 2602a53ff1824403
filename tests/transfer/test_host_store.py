"""The real host tier behind a real server: pages of another rank mix, eviction under a lease, bad offers."""

from __future__ import annotations

import msgspec
import pytest

from transfer.helpers import KEY, PATIENCE_S
from transfer.host_tiers import content, fill, store, wanted
from vllm_loraserve.memory.host_tier import HostTierFullError
from vllm_loraserve.transfer.errors import LayoutMismatchError
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.host_store import HostMeta, HostTierStore
from vllm_loraserve.transfer.peer import Peer
from vllm_loraserve.transfer.server import TransferServer


@pytest.mark.parametrize("rung", ["memfd", "tcp"])
def test_adapters_move_between_host_tiers(rung):
    source, target = store(), store()
    fill(source, 1, (64, 64), 1)
    fill(source, 2, (12, 0), 2)  # one module group only
    with (
        TransferServer([source], KEY, "one", verbs="off") as server,
        Peer(server.endpoint, KEY, "two", order=(rung,)) as peer,
    ):
        assert [p.name for p in peer.catalogue()] == ["a", "b"]
        for key, name in ((1, "a"), (2, "b")):
            pages, _ = peer.fetch(wanted(target, name), target, Flight(PATIENCE_S))
            assert content(target, key) == content(source, key)
            got, had = target.tier.get(key), source.tier.get(key)
            assert (got.digest, got.ranks, got.pages, got.checksums) == (
                had.digest,
                had.ranks,
                had.pages,
                had.checksums,
            )
            assert got.users == had.users == 0
            assert target.find(wanted(target, name)).page_lengths == pages.page_lengths
    source.tier.check_integrity()
    target.tier.check_integrity()


def test_what_was_verified_on_the_way_is_not_hashed_again(monkeypatch):
    source, target = store(), store()
    fill(source, 1, (64, 64), 1)
    offered = source.acquire("a")
    assert offered is not None
    destination = target.reserve(offered)
    monkeypatch.setattr(target.tier, "current_checksums", lambda entry: pytest.fail("hashed again"))
    target.commit(offered, destination)
    source.release(offered)
    landed = target.find(wanted(target))
    assert landed is not None
    assert landed.checksums == offered.checksums


def test_news_of_a_copy_that_come_late_say_nothing_of_the_next_one():
    source, told = store(), []
    source._on_landed = lambda *what: told.append(what)
    fill(source, 1, (8, 8), 1)
    pages = source.acquire("a")
    source.release(pages)
    source.landed(pages, "two")
    assert told == [("a", "sha-1", "two")]
    fill(source, 1, (8, 8), 1)  # brought in again, from two maybe
    source.landed(pages, "two")
    source.tier.remove(1)
    source.landed(pages, "two")
    assert len(told) == 1


def test_a_leased_adapter_is_not_evicted_and_its_memory_comes_back_after():
    source = store()
    fill(source, 1, (64, 64), 1)
    free = source.tier.free_bytes
    pages = source.acquire("a")
    before = content(source, 1)
    source.tier.remove(1)
    assert source.tier.free_bytes == free
    assert bytes(source.slab.view(*pages.ranges[0])) == before
    source.release(pages)
    assert source.tier.free_bytes == source.tier._extents.size
    assert source.acquire("a") is None
    source.tier.check_integrity()


def test_another_shard_s_pages_are_refused():
    source, target = store(tp_rank=0), store(tp_rank=1)
    fill(source, 1, (8, 8), 1)
    with (
        TransferServer([source], KEY, "one", verbs="off") as server,
        Peer(server.endpoint, KEY, "two") as peer,
        pytest.raises(LayoutMismatchError),
    ):
        peer.fetch(wanted(target), target, Flight(PATIENCE_S))
    assert len(target.tier) == 0


def test_offers_that_do_not_fit_their_ranks_are_refused():
    source, target = store(), store()
    fill(source, 1, (64, 64), 1)
    pages = source.find(wanted(source))
    for meta in (b"", b"nonsense", msgspec.msgpack.encode(HostMeta((64,))), msgspec.msgpack.encode(HostMeta((64, 8)))):
        with pytest.raises(LayoutMismatchError):
            target.reserve(msgspec.structs.replace(pages, meta=meta))
    assert target.tier.free_bytes == target.tier._extents.size


def test_a_full_tier_says_so_and_stays_whole():
    source, target = store(), store(1 << 17)
    fill(source, 1, (64, 64), 1)
    fill(target, 2, (64, 64), 2)
    target.tier.pin(2)
    with TransferServer([source], KEY, "one", verbs="off") as server, Peer(server.endpoint, KEY, "two") as peer:
        with pytest.raises(HostTierFullError):
            peer.fetch(wanted(target), target, Flight(PATIENCE_S))
        assert server.lease_count == 0
    target.tier.check_integrity()


def test_an_adapter_that_pages_do_not_cover_is_not_offered():
    source = store()
    fill(source, 1, (8, 8), 1)
    hidden = HostTierStore(source.tier, name_of=lambda key: None, key_of=lambda name: 1)
    assert hidden.catalogue() == []
    assert hidden.acquire("a") is None
    assert source.tier.get(1).users == 0
