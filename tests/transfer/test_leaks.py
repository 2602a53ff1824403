"""A thousand fetches on each way, and many sessions: no descriptor, mapping, thread, lease or pin is left; memory is
flat."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest

from transfer.helpers import KEY, LAYOUT, PATIENCE_S, make_pages, until, wanted
from transfer.host_tiers import NAMES, fill, store
from transfer.host_tiers import wanted as host_wanted
from vllm_loraserve.transfer import wire
from vllm_loraserve.transfer.errors import PeerLostError, TransferError
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.peer import Peer
from vllm_loraserve.transfer.peers import PeerTable
from vllm_loraserve.transfer.pool import AdapterPool, Location
from vllm_loraserve.transfer.server import TransferServer
from vllm_loraserve.transfer.slab_store import SlabStore


def counts() -> tuple[int, int, int]:
    """Open descriptors, mappings of slabs, threads."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("loraserve-pool")
    return len(os.listdir("/proc/self/fd")), maps, threading.active_count()


def resident() -> int:
    """Bytes of this process's own memory, without the shared slabs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def none_left(server, before: tuple[int, int, int]) -> None:
    """Waits until there are no more than before: the server's threads end a moment after their connections, as may
    those of the test before."""
    until(lambda: not server.session_count and all(now <= had for now, had in zip(counts(), before, strict=True)))


@pytest.mark.parametrize("rung", ["memfd", "tcp"])
def test_a_thousand_fetches_leave_nothing(rung, server, source, target):
    source.put("small", make_pages(3, count=6, size=4000), layout=LAYOUT)
    idle = counts()
    with Peer(server.endpoint, KEY, "two", order=(rung,)) as peer:
        for _ in range(50):
            peer.fetch(wanted("small"), target, Flight(PATIENCE_S))
        before, memory = counts(), resident()
        for _ in range(1000):
            peer.fetch(wanted("small"), target, Flight(PATIENCE_S))
        assert all(now <= had for now, had in zip(counts(), before, strict=True))
        assert resident() - memory < 4 << 20
        assert server.lease_count == 0
        assert source._pins == {}
    none_left(server, idle)
    assert target.free_bytes == target.slab.size - target.find(wanted("small")).size


@pytest.mark.parametrize("rung", ["memfd", "tcp"])
def test_a_thousand_adapters_through_pool_and_host_tier_leave_nothing(rung):
    """As an engine has it: each is brought in, evicted for the next one, and brought in again."""
    theirs, ours = store(), store()
    for key in NAMES:
        fill(theirs, key, (16 * key, 8), seed=key)
    free, idle = ours.tier.free_bytes, counts()
    with (
        TransferServer([theirs], KEY, "one", verbs="off") as server,
        AdapterPool(ours, PeerTable(KEY, "two", order=(rung,)), tiers=[("host", ours.find)]) as pool,
    ):
        location, memory, before = Location("one", server.endpoint), 0, counts()
        for number in range(1050):
            key = 1 + number % len(NAMES)
            assert pool.bring(host_wanted(ours, NAMES[key]), [location]).source == "peer"
            ours.tier.remove(key)
            if number == 49:
                before, memory = counts(), resident()
        # The pool's threads come one by one, up to a number of their own.
        until(lambda: all(now <= had for now, had in zip(counts()[:2], before[:2], strict=True)))
        assert resident() - memory < 4 << 20
        assert (server.lease_count, server.session_count) == (0, 1)
        assert pool.progress() == []
        assert ours._reserved == theirs._pins == {}
        assert all(entry.users == 0 for entry in theirs.tier.entries())
        assert ours.tier.free_bytes == free
        ours.tier.check_integrity()
    until(lambda: all(now <= had for now, had in zip(counts(), idle, strict=True)))


@pytest.mark.parametrize("rung", ["memfd", "tcp"])
def test_failed_fetches_leave_nothing_either(rung, server, source, target):
    idle = counts()
    with Peer(server.endpoint, KEY, "two", order=(rung,)) as peer:
        peer.fetch(wanted("a"), target, Flight(PATIENCE_S))
        target.drop("a")
        entry = source.find(wanted("a"))
        source.slab.view(entry.ranges[0].offset, 1)[0] ^= 1
        for i in range(30):
            flight = Flight(PATIENCE_S)
            if i % 3 == 0:
                flight.cancel()
            with pytest.raises(TransferError):
                peer.fetch(wanted("a" if i % 3 < 2 else "missing"), target, flight)
        assert server.lease_count == 0
    none_left(server, idle)
    assert target.free_bytes == target.slab.size
    assert source._pins == {}


def test_sessions_leave_nothing(server, source):
    def once() -> None:
        with SlabStore(4 << 20) as target, Peer(server.endpoint, KEY, "two", order=("memfd", "tcp")) as peer:
            peer.keep_alive()
            peer.fetch(wanted("a"), target, Flight(PATIENCE_S))

    once()
    until(lambda: not server.session_count)
    before = counts()
    for _ in range(40):
        once()
    none_left(server, before)


def test_peers_that_die_leave_nothing(target, holder):
    """Each comes again, if at all, at another endpoint: nobody asks for the old one any more."""
    table = PeerTable(KEY, "me", order=("memfd", "tcp"))
    before = counts()
    for number in range(3):
        dead = holder(1, f"dead-{number}")
        peer = table.get(dead.endpoint)
        peer.fetch(wanted(), target, Flight(PATIENCE_S))
        dead.kill()
        with pytest.raises(PeerLostError):
            peer.ask(wire.Ping())
        dead.close()
    until(lambda: all(now <= had for now, had in zip(counts(), before, strict=True)))
    assert (table._peers, table._connecting) == ({}, {})
    table.close()


def test_a_ping_notices_a_peer_that_died(source):
    table = PeerTable(KEY, "me", order=("memfd",))
    with TransferServer([source], KEY, "one", verbs="off", lease_s=0.3) as server:
        table.get(server.endpoint).rungs()
    until(lambda: not table._peers)
    table.close()
