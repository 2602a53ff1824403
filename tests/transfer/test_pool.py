"""The pool: the order of sources, one fetch for many, a second source for a slow first, and every way to fail."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from transfer.helpers import KEY, LAYOUT, PATIENCE_S, make_pages, until, wanted
from transfer.holder import adapter_pages
from vllm_loraserve.launcher.processes import free_ports
from vllm_loraserve.transfer import pool
from vllm_loraserve.transfer.errors import AdapterUnavailableError, CancelledError, RungFailedError, TransferError
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.metrics import PoolMetrics
from vllm_loraserve.transfer.pages import AdapterPages, Landing, Wanted, page_offsets
from vllm_loraserve.transfer.peers import PeerTable
from vllm_loraserve.transfer.pool import AdapterPool, Location, PoolOptions
from vllm_loraserve.transfer.server import TransferServer
from vllm_loraserve.transfer.slab_store import SlabStore


class Checkpoint:
    """A checkpoint source: makes the pages of adapter "a" anew, unless it is gone."""

    def __init__(self) -> None:
        self.readable, self.loads, self.gate = True, 0, threading.Event()
        self.gate.set()

    def __call__(self, asked: Wanted, landing: Landing, flight: Flight) -> AdapterPages:
        self.loads += 1
        if not self.readable:
            raise FileNotFoundError(f"/adapters/{asked.name} is gone")
        assert self.gate.wait(PATIENCE_S)
        pages = make_pages(1)
        entry = _entry(asked, [len(p) for p in pages])
        destination = landing.reserve(entry)
        try:
            for offset, page in zip(page_offsets(entry.page_lengths, destination.ranges), pages, strict=True):
                destination.slab.view(offset, len(page))[:] = page.data  # type: ignore[attr-defined]
            flight.check()
            landing.commit(entry, destination)
        except BaseException:
            landing.abandon(destination)
            raise
        return entry


def _entry(asked: Wanted, lengths: list[int]) -> AdapterPages:
    return AdapterPages(
        name=asked.name,
        generation=0,
        digest="sha-a",
        layout=asked.layout,
        page_lengths=tuple(lengths),
        checksums=(0,) * len(lengths),
        ranges=(),
    )


class World:
    """A pool with its metrics, and whatever it reads from."""

    def __init__(self, target: SlabStore, **options: object) -> None:
        self.registry = CollectorRegistry()
        self.now = 1000.0
        self.peers = PeerTable(KEY, "me", order=("memfd", "tcp"), rest_s=30.0, clock=lambda: self.now)
        self.target, self.checkpoint = target, Checkpoint()
        self.pool = AdapterPool(
            target,
            self.peers,
            tiers=[("host", target.find)],
            load=self.checkpoint,
            options=PoolOptions(**{"deadline_s": PATIENCE_S, "hedge_s": PATIENCE_S, **options}),  # type: ignore[arg-type]
            metrics=PoolMetrics(self.registry),
        )

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def world(target: SlabStore) -> Iterator[World]:
    made = World(target)
    yield made
    made.pool.close()


@pytest.fixture
def at(server: TransferServer) -> Location:
    return Location("one", server.endpoint)


DEAD = Location("dead", "127.0.0.1:1")


def test_sources_in_their_order(world, source, at):
    brought = world.pool.bring(wanted(), [at])
    assert (brought.source, brought.via) == ("peer", "memfd one")
    assert world.target.bytes_of("a") == source.bytes_of("a")
    assert world.pool.bring(wanted(), [at]).source == "host"
    world.target.drop("a")
    brought = world.pool.bring(wanted(), [])
    assert brought.source == "checkpoint"
    assert world.checkpoint.loads == 1
    assert world.count("loraserve:fetches_total", source="peer", result="ok") == 1
    assert world.count("loraserve:fetches_total", source="host", result="ok") == 1
    assert world.count("loraserve:fetches_total", source="checkpoint", result="ok") == 1
    assert world.count("loraserve:transfer_arrived_bytes_total", rung="memfd") == brought.pages.size
    assert world.count("loraserve:transfer_bytes_total") == brought.pages.size
    assert world.count("loraserve:fetch_seconds_count", source="peer") == 1
    assert world.count("loraserve:fetches_in_flight") == 0


def test_the_arena_goes_before_the_host_tier(target, source):
    source.put("a", make_pages(1), layout=LAYOUT)
    with AdapterPool(target, PeerTable(KEY, "me"), tiers=[("arena", source.find), ("host", target.find)]) as pool:
        assert pool.bring(wanted()).source == "arena"


def test_dead_peers_are_passed_over(world, source, at, caplog):
    brought = world.pool.bring(wanted(), [DEAD, at])
    assert brought.via == "memfd one"
    assert "from peer dead failed: 127.0.0.1:1 cannot be reached" in caplog.text
    assert world.peers.rested_first([DEAD.endpoint, at.endpoint]) == [at.endpoint, DEAD.endpoint]
    world.now += 31.0
    assert world.peers.rested_first([DEAD.endpoint, at.endpoint]) == [DEAD.endpoint, at.endpoint]


def test_checkpoint_gone_while_a_peer_has_it(world, source, at):
    world.checkpoint.readable = False
    assert world.pool.bring(wanted(), [at]).source == "peer"


def test_peers_gone_while_the_checkpoint_is_there(world, source):
    assert world.pool.bring(wanted(), [DEAD]).source == "checkpoint"
    assert world.target.bytes_of("a") == source.bytes_of("a")


def test_all_sources_gone_is_one_clear_503_and_the_pool_goes_on(world, source, at):
    world.checkpoint.readable = False
    source.drop("a")
    with pytest.raises(AdapterUnavailableError) as caught:
        world.pool.bring(wanted(), [DEAD, at])
    assert caught.value.http_status == 503
    assert [label for label, _ in caught.value.failures] == ["peer dead", "peer one", "checkpoint"]
    assert "adapter 'a' cannot be brought in now (peer dead: " in str(caught.value)
    assert "FileNotFoundError: /adapters/a is gone" in str(caught.value)
    assert world.target.free_bytes == world.target.slab.size
    assert world.pool.bring(wanted("b"), [at]).source == "peer"
    world.checkpoint.readable = True
    assert world.pool.bring(wanted(), [at]).source == "checkpoint"


def test_no_source_at_all_says_so(target):
    with AdapterPool(target, PeerTable(KEY, "me")) as pool, pytest.raises(AdapterUnavailableError, match="no source"):
        pool.bring(wanted())


def test_a_layout_of_another_tp_size_falls_to_the_checkpoint(world, at):
    other = "SmolLM2-135M/bfloat16/tp1of2/rows8"
    brought = world.pool.bring(wanted(layout=other), [at])
    assert brought.source == "checkpoint"
    assert brought.pages.layout == other


def test_many_requests_for_one_adapter_fetch_it_once(world, server, source, at, monkeypatch):
    gate, entered = threading.Event(), []
    acquire = source.acquire

    def slow(name: str) -> AdapterPages | None:
        entered.append(name)
        assert gate.wait(PATIENCE_S)
        return acquire(name)

    monkeypatch.setattr(source, "acquire", slow)
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(world.pool.bring(wanted(), [at]))) for _ in range(12)]
    for thread in threads:
        thread.start()
    until(lambda: world.count("loraserve:fetches_shared_total") == 11)
    assert [p.name for p in world.pool.progress()] == ["a"]
    gate.set()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert entered == ["a"]
    assert world.pool.progress() == []


def test_all_who_wait_hear_of_a_failure_and_the_next_one_tries_anew(world):
    world.checkpoint.readable = False
    with pytest.raises(AdapterUnavailableError):
        world.pool.bring(wanted())
    world.checkpoint.readable = True
    assert world.pool.bring(wanted()).source == "checkpoint"


def test_a_slow_first_source_gets_company_and_loses(target, source, server, at, monkeypatch):
    made = World(target, hedge_s=0.1)
    gate = threading.Event()
    acquire = source.acquire
    monkeypatch.setattr(source, "acquire", lambda name: gate.wait(PATIENCE_S) and acquire(name))
    try:
        begun = time.monotonic()
        brought = made.pool.bring(wanted(), [at])
        assert brought.source == "checkpoint"
        assert time.monotonic() - begun >= 0.1
        assert made.count("loraserve:fetch_hedges_total") == 1
        held = target.find(wanted())
    finally:
        gate.set()
        made.pool.close()
    # The loser came too late: nothing of it is left, the winner's pages are untouched.
    assert target.find(wanted()) == held
    assert target.free_bytes == target.slab.size - held.size
    assert made.count("loraserve:fetches_total", source="peer", result="cancelled") == 1
    assert source.landings == []


def test_a_slow_first_source_may_still_win(target, source, server, at):
    made = World(target, hedge_s=0.05)
    made.checkpoint.gate.clear()
    try:
        peer = made.peers.get(at.endpoint)
        rung = peer.rungs()[0]
        read = rung.read

        def slow(*arguments: object) -> object:
            until(lambda: made.checkpoint.loads)
            return read(*arguments)

        rung.read = slow  # type: ignore[method-assign]
        assert made.pool.bring(wanted(), [at]).source == "peer"
        assert made.checkpoint.loads == 1
    finally:
        made.checkpoint.gate.set()
        made.pool.close()
    assert target.free_bytes == target.slab.size - target.find(wanted()).size


def test_a_hanging_peer_is_left_at_the_deadline(target, source, server, at, monkeypatch):
    made = World(target, deadline_s=0.5)
    made.checkpoint.readable = False
    gate = threading.Event()
    acquire = source.acquire
    monkeypatch.setattr(source, "acquire", lambda name: gate.wait(PATIENCE_S) and acquire(name))
    try:
        with pytest.raises(AdapterUnavailableError, match="not done in time"):
            made.pool.bring(wanted(), [at])  # comes back while the peer hangs
    finally:
        gate.set()
        made.pool.close()
    assert target.catalogue() == []
    assert target.free_bytes == target.slab.size


def test_checkpoints_that_hang_keep_no_place_of_the_peers(target, source, server, at):
    made = World(target)
    made.checkpoint.gate.clear()
    try:
        patient, made.pool.options = made.pool.options, PoolOptions(deadline_s=0.01)
        for count in range(20):
            with pytest.raises(AdapterUnavailableError, match="not done in time"):
                made.pool.bring(wanted(f"hangs{count}"))
        made.pool.options = patient
        assert made.pool.bring(wanted("b"), [Location("one", at.endpoint)]).source == "peer"
    finally:
        made.checkpoint.gate.set()
        made.pool.close()
    assert [pages.name for pages in target.catalogue()] == ["b"], "close has waited for them"


def test_so_many_checkpoints_and_no_more_are_read_at_a_time(target, monkeypatch):
    monkeypatch.setattr(pool, "MOST_READERS", 1)
    made = World(target)
    made.checkpoint.gate.clear()
    try:
        patient, made.pool.options = made.pool.options, PoolOptions(deadline_s=0.01)
        with pytest.raises(AdapterUnavailableError, match="not done in time"):
            made.pool.bring(wanted("hangs"))
        made.pool.options = patient
        with pytest.raises(AdapterUnavailableError, match="1 checkpoints are being read"):
            made.pool.bring(wanted())
        made.checkpoint.gate.set()
        until(lambda: not made.pool._readers)
        assert made.pool.bring(wanted()).source == "checkpoint"
    finally:
        made.checkpoint.gate.set()
        made.pool.close()


def test_closing_cancels_what_is_under_way(target, source, server, at):
    made = World(target)
    peer = made.peers.get(at.endpoint)
    rung = peer.rungs()[0]
    begun, failed = threading.Event(), []

    def endless(link: object, lease: object, destination: object, flight: Flight) -> None:
        begun.set()
        while True:
            flight.check()
            time.sleep(0.01)

    rung.read = endless  # type: ignore[assignment,method-assign]
    made.pool._load = None

    def bring() -> None:
        try:
            made.pool.bring(wanted(), [at])
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=bring)
    thread.start()
    assert begun.wait(PATIENCE_S)
    made.pool.close()
    thread.join(PATIENCE_S)
    assert isinstance(failed[0], AdapterUnavailableError)
    assert target.free_bytes == target.slab.size
    with pytest.raises(CancelledError):
        made.pool.bring(wanted(), [at])


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("rung", ["memfd", "tcp"])
def test_a_killed_peer_costs_no_request(target, holder, when, rung):
    """SIGKILL of the holder around a read: the fetch comes from the next holder, whole."""
    first, second = holder(4, "first"), holder(4, "second")
    locations = [Location("first", first.endpoint), Location("second", second.endpoint)]
    peers = PeerTable(KEY, "me", order=(rung,))
    with AdapterPool(target, peers, options=PoolOptions(deadline_s=PATIENCE_S, hedge_s=PATIENCE_S)) as pool:
        peer = peers.get(first.endpoint)
        if when == "before":
            first.kill()
        elif when == "during":
            reader = peer.rungs()[0]
            read = reader.read

            def kill_then_read(*arguments: object) -> object:
                result = read(*arguments)  # the bytes are here, the verdict on them is not
                first.kill()
                return result

            reader.read = kill_then_read  # type: ignore[method-assign]
        brought = pool.bring(wanted(), locations)
        assert brought.via == f"{rung} {'first' if when == 'after' else 'second'}"
        if when == "after":
            first.kill()
        assert target.bytes_of("a") == b"".join(bytes(p) for p in adapter_pages(4))
        assert target.free_bytes == target.slab.size - brought.pages.size


def test_a_peer_that_hangs_costs_the_hedge_and_no_more(target, holder):
    """SIGSTOP: connections stay up and nothing answers."""
    first, second = holder(4, "first"), holder(4, "second")
    locations = [Location("first", first.endpoint), Location("second", second.endpoint)]
    peers = PeerTable(KEY, "me", order=("tcp",))
    pool = AdapterPool(target, peers, options=PoolOptions(deadline_s=PATIENCE_S, hedge_s=0.2))
    peers.get(first.endpoint)
    peers.get(second.endpoint).rungs()
    first.process.send_signal(signal.SIGSTOP)
    try:
        brought = pool.bring(wanted(), locations)  # comes back while the first one hangs
        assert brought.via == "tcp second"
        assert target.bytes_of("a") == b"".join(bytes(p) for p in adapter_pages(4))
    finally:
        first.process.send_signal(signal.SIGCONT)
        pool.close()
    assert target.free_bytes == target.slab.size - brought.pages.size


def test_a_peer_killed_between_two_pieces(target, holder):
    first = holder(8, "first")
    peers = PeerTable(KEY, "me", order=("tcp",))
    pieces: list[int] = []

    def on_bytes(size: int) -> None:
        pieces.append(size)
        if len(pieces) == 2:
            first.kill()

    with contextlib.closing(peers):
        peer = peers.get(first.endpoint)
        with pytest.raises(TransferError):
            peer.fetch(wanted(), target, Flight(PATIENCE_S, on_bytes=on_bytes))
    assert target.catalogue() == []
    assert target.free_bytes == target.slab.size


def test_a_bandwidth_cap_is_shared_by_all_fetches(target, source, at):
    made = World(target, rate=20e6)
    try:
        begun = time.monotonic()
        moved = 0
        for _ in range(16):
            target.drop("a")
            moved += made.pool.bring(wanted(), [at]).pages.size
        seconds = time.monotonic() - begun
    finally:
        made.pool.close()
    assert (moved - (8 << 20)) / seconds < 20e6 * 1.1  # one burst is free


def test_a_peer_that_restarts_is_connected_anew(world, source):
    (port,) = free_ports(1, random.randrange(10000, 30000))
    first = TransferServer([source], KEY, "one", port=port, verbs="off")
    location = Location("one", first.endpoint)
    assert world.pool.bring(wanted(), [location]).source == "peer"
    first.close()
    world.target.drop("a")
    world.checkpoint.readable = False
    with pytest.raises(AdapterUnavailableError):
        world.pool.bring(wanted(), [location])
    with TransferServer([source], KEY, "one", port=port, verbs="off"):
        assert world.pool.bring(wanted(), [location]).source == "peer"


def test_a_rung_failing_everywhere_is_the_peer_s_failure(world, source, at, monkeypatch):
    peer = world.peers.get(at.endpoint)
    for rung in peer.rungs():

        def broken(*_: object) -> None:
            raise RungFailedError("made to fail")

        monkeypatch.setattr(rung, "read", broken)
    assert world.pool.bring(wanted(), [at]).source == "checkpoint"
