"""Fetching from a peer by each way that needs no hardware, and what goes wrong on it."""

from __future__ import annotations

import contextlib
import errno
import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from transfer.helpers import KEY, LAYOUT, PATIENCE_S, make_pages, until, wanted
from vllm_loraserve.memory import extension
from vllm_loraserve.transfer import server as server_module
from vllm_loraserve.transfer import wire
from vllm_loraserve.transfer.auth import prove_as_client
from vllm_loraserve.transfer.errors import (
    CancelledError,
    CorruptPageError,
    DeadlineError,
    DigestMismatchError,
    GenerationChangedError,
    LayoutMismatchError,
    NotHeldError,
    PeerLostError,
    RungFailedError,
)
from vllm_loraserve.transfer.flight import Flight, RateLimiter
from vllm_loraserve.transfer.peer import ATTEMPTS, Peer
from vllm_loraserve.transfer.rungs import samehost, tcp
from vllm_loraserve.transfer.server import TransferServer
from vllm_loraserve.transfer.slab_store import SlabStore

RUNGS = ("memfd", "tcp")


@pytest.mark.parametrize("rung", RUNGS)
def test_fetch_brings_the_same_bytes_and_releases_everything(rung, server, source, target, connect):
    peer = connect(rung)
    for name in ("a", "b", "a"):
        flight = Flight(PATIENCE_S)
        pages, used = peer.fetch(wanted(name), target, flight)
        assert used == rung
        assert target.bytes_of(name) == source.bytes_of(name)
        assert flight.moved == pages.size
    assert target.find(wanted("a", digest="sha-a")).meta == b"rank 64"
    assert server.lease_count == 0
    assert source._pins == {}
    until(lambda: len(source.landings) == 3)  # nobody waits for these
    assert [(name, peer_name) for name, _, peer_name in source.landings] == [("a", "two"), ("b", "two"), ("a", "two")]
    held = sum(p.size for p in target.catalogue())
    assert target.free_bytes == target.slab.size - held  # the second "a" replaced the first


def side_by_side(streams: int) -> Flight:
    """A flight in which no stream receives before all have begun, however the threads are run."""
    flight, meeting, begun = Flight(PATIENCE_S), threading.Barrier(streams), threading.local()
    original = flight.advance

    def advance(size: int) -> None:
        if not hasattr(begun, "here"):
            begun.here = True
            meeting.wait(PATIENCE_S)
        original(size)

    flight.advance = advance  # type: ignore[method-assign]
    return flight


def test_tcp_uses_several_streams_for_much_and_one_for_little(source, target, monkeypatch):
    opened = []
    original = tcp.open_data
    monkeypatch.setattr(tcp, "open_data", lambda *a: opened.append(1) or original(*a))
    source.put("large", make_pages(5, count=60, size=200_000), layout=LAYOUT)
    with (
        TransferServer([source], KEY, "one", verbs="off") as server,
        Peer(server.endpoint, KEY, "two", order=("tcp",), streams=3) as peer,
    ):
        peer.fetch(wanted("a"), target, Flight(PATIENCE_S))
        assert len(opened) == 1
        peer.fetch(wanted("large"), target, side_by_side(3))
        assert len(opened) == 3
        assert target.bytes_of("large") == source.bytes_of("large")
        peer.fetch(wanted("large"), target, side_by_side(3))
        assert len(opened) == 3  # they are kept


@pytest.mark.parametrize("threads", [1, 2])
def test_a_large_adapter_is_copied_by_so_many_threads(library, threads, target, connect, source, monkeypatch):
    asked: list[int] = []
    copy = library.copy_checksums
    monkeypatch.setattr(library, "copy_checksums", lambda segments, n: asked.append(n) or copy(segments, n))
    monkeypatch.setattr(samehost, "copy_threads", lambda: threads)
    source.put("large", make_pages(6, count=60, size=200_000), layout=LAYOUT)
    connect("memfd").fetch(wanted("large"), target, Flight(PATIENCE_S))
    assert set(asked) == {threads}
    assert target.bytes_of("large") == source.bytes_of("large")


@pytest.mark.parametrize(("loadavg", "threads"), [("1/300", 2), ("2/300", 1), ("9/300", 1), ("", 1)])
def test_a_copy_takes_no_processor_that_a_step_has(loadavg, threads, monkeypatch):
    monkeypatch.setattr(samehost.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(samehost, "open", lambda _: io.StringIO(f"0.5 0.5 0.5 {loadavg} 77\n"), raising=False)
    assert samehost.copy_threads() == threads


def test_tcp_that_stalls_or_breaks_says_which(library, connect, target, monkeypatch):
    for code, kind in ((errno.ETIMEDOUT, DeadlineError), (errno.EPIPE, RungFailedError)):

        def fails(*_: object, code: int = code) -> None:
            raise extension.ExtensionError(code, "as the extension says")

        monkeypatch.setattr(library, "receive_checksums", fails)
        with pytest.raises(kind):
            connect("tcp").fetch(wanted("a"), target, Flight(PATIENCE_S))
    assert target.free_bytes == target.slab.size


def test_another_host_is_sent_to_without_a_copy(server, source, target, connect, monkeypatch):
    sent: list[int] = []
    sendfile = tcp.os.sendfile

    def counted(*arguments: int) -> int:
        sent.append(sendfile(*arguments))
        return sent[-1]

    monkeypatch.setattr(tcp.os, "sendfile", counted)
    connect("tcp").fetch(wanted("a"), target, Flight(PATIENCE_S))
    assert sent == []  # both ends have the same address
    monkeypatch.setattr(tcp, "_same_host", lambda sock: False)
    pages, _ = connect("tcp").fetch(wanted("b"), target, Flight(PATIENCE_S))
    assert sum(sent) == pages.size
    assert target.bytes_of("b") == source.bytes_of("b")


def test_the_catalogue_names_every_adapter(connect):
    assert {(p.name, p.digest, p.layout) for p in connect().catalogue()} == {
        ("a", "sha-a", LAYOUT),
        ("b", "sha-b", LAYOUT),
    }


def test_what_is_not_there_or_not_ours_is_refused_before_a_byte_moves(server, target, connect):
    peer = connect()
    flight = Flight(PATIENCE_S)
    with pytest.raises(NotHeldError, match="unknown is not held"):
        peer.fetch(wanted("unknown"), target, flight)
    for other in ("SmolLM2-135M/float32/tp0of1/rows8", "SmolLM2-135M/bfloat16/tp1of2/rows8"):
        with pytest.raises(LayoutMismatchError, match="another layout"):
            peer.fetch(wanted(layout=other), target, flight)
    with pytest.raises(DigestMismatchError, match="sha-a"):
        peer.fetch(wanted(digest="sha-of-something-else"), target, flight)
    assert flight.moved == 0
    assert target.catalogue() == []
    assert target.free_bytes == target.slab.size
    assert server.lease_count == 0


@pytest.mark.parametrize("rung", RUNGS)
def test_one_flipped_byte_is_found_and_nothing_is_committed(rung, server, source, target, connect):
    peer = connect(rung)
    entry = source.find(wanted("a"))
    at = entry.ranges[1].offset + 777
    source.slab.view(at, 1)[0] ^= 0x10
    with pytest.raises(CorruptPageError, match=r"page 3 arrived damaged \(1 of 12\)"):
        peer.fetch(wanted("a"), target, Flight(PATIENCE_S))
    assert target.catalogue() == []
    assert target.free_bytes == target.slab.size
    assert server.lease_count == 0
    source.slab.view(at, 1)[0] ^= 0x10
    peer.fetch(wanted("a"), target, Flight(PATIENCE_S))
    assert target.bytes_of("a") == source.bytes_of("a")


class OnFirstPiece:
    """A flight that does something when the first piece is about to move."""

    def __init__(self, action, times: int = 1) -> None:
        self.flight = Flight(PATIENCE_S)
        original = self.flight.advance
        self.left = times

        def advance(size: int) -> None:
            original(size)
            if self.left:
                self.left -= 1
                action()

        self.flight.advance = advance  # type: ignore[method-assign]


@pytest.mark.parametrize("rung", RUNGS)
def test_an_adapter_replaced_during_the_read_is_read_again_never_mixed(rung, server, source, target, connect):
    old = source.bytes_of("a")

    def replace() -> None:
        source.put("a", make_pages(99), layout=LAYOUT, digest="sha-a2")
        server.revoke("a")

    peer = connect(rung)
    pages, _ = peer.fetch(wanted("a"), target, OnFirstPiece(replace).flight)
    assert pages.digest == "sha-a2"
    assert target.bytes_of("a") == source.bytes_of("a") != old
    assert server.lease_count == 0


@pytest.mark.parametrize("rung", RUNGS)
def test_an_adapter_evicted_during_the_read_is_not_held_any_more(rung, server, source, target, connect):
    def evict() -> None:
        source.drop("a")
        server.revoke("a")

    with pytest.raises(NotHeldError, match="not held"):
        connect(rung).fetch(wanted("a"), target, OnFirstPiece(evict).flight)
    assert target.catalogue() == []
    assert target.free_bytes == target.slab.size
    assert source.free_bytes == source.slab.size - source.find(wanted("b")).size


@pytest.mark.parametrize("rung", RUNGS)
def test_an_adapter_that_keeps_changing_is_given_up(rung, server, source, target, connect, caplog):
    seeds = iter(range(1000, 2000))

    def replace() -> None:
        source.put("a", make_pages(next(seeds)), layout=LAYOUT)
        server.revoke("a")

    peer = connect(rung)
    with pytest.raises(GenerationChangedError):
        peer.fetch(wanted("a"), target, OnFirstPiece(replace, times=99).flight)
    assert f"try {ATTEMPTS} of {ATTEMPTS}" in caplog.text
    assert next(seeds) >= 1000 + ATTEMPTS  # how many pieces a try moves depends on the extension
    assert target.catalogue() == []


def test_a_lease_holds_the_pages_until_it_is_released(server, source, connect):
    peer = connect()
    lease = peer.lease(wanted("a"))
    before = source.bytes_of("a")
    free = source.free_bytes
    source.drop("a")
    assert source.free_bytes == free
    kept = b"".join(bytes(source.slab.view(r.offset, r.length)) for r in lease.pages.ranges)
    assert kept == before
    peer.release(lease)
    assert source.free_bytes == free + lease.pages.size


def test_a_copy_is_announced_once_and_only_by_who_had_the_lease(server, source, connect):
    first, second = connect("tcp"), connect("tcp")
    lease = first.lease(wanted("a"))
    first.landed(lease)  # not given back yet, so not known to be right
    first.finish(lease)
    second.landed(lease)
    second.ask(wire.Ping())
    assert source.landings == []
    first.landed(lease)
    first.landed(lease)
    first.ask(wire.Ping())  # answered after those
    assert [(name, peer) for name, _, peer in source.landings] == [("a", "two")]


def test_a_lease_that_was_taken_back_is_not_given_back_well(server, source, connect):
    peer = connect("tcp")
    lease = peer.lease(wanted("a"))
    server.revoke("a")
    with pytest.raises(GenerationChangedError, match="it was read"):
        peer.finish(lease)
    peer.landed(lease)
    peer.ask(wire.Ping())
    assert source.landings == []


def test_a_lease_of_another_session_opens_nothing(server, connect):
    first, second = connect("tcp"), connect("tcp")
    lease = first.lease(wanted("a"))
    state = second.ask(wire.CheckLease(lease=lease.lease))
    assert state == wire.LeaseState(valid=False, generation=-1)
    sock = tcp.open_data(second, (second.host, second.port), PATIENCE_S)
    wire.send(sock, wire.Pull(lease=lease.lease, start=0, length=16))
    reply = wire.receive_reply(sock)
    sock.close()
    assert isinstance(reply, wire.Refused)
    assert reply.code == "revoked"
    second.release(lease)
    assert server.lease_count == 1
    first.release(lease)
    assert server.lease_count == 0


@pytest.mark.parametrize(("start", "length"), [(0, 10**9), (-1, 5), (10**9, 1), (5, -1)])
def test_reading_past_the_leased_pages_is_refused(start, length, connect):
    peer = connect("tcp")
    lease = peer.lease(wanted("a"))
    sock = tcp.open_data(peer, (peer.host, peer.port), PATIENCE_S)
    wire.send(sock, wire.Pull(lease=lease.lease, start=start, length=length))
    reply = wire.receive_reply(sock)
    assert isinstance(reply, wire.Refused)
    assert reply.code == "invalid"
    wire.send(sock, wire.Pull(lease=lease.lease, start=0, length=16))  # the connection lives on
    assert wire.receive_reply(sock) == wire.Data(length=16)
    sock.close()


def test_revocation_does_not_wait_for_a_reader_that_reads_nothing(source):
    source.put("large", [bytes(1 << 20)] * 20, layout=LAYOUT)
    with (
        TransferServer([source], KEY, "one", verbs="off") as server,
        Peer(server.endpoint, KEY, "two", order=("tcp",)) as peer,
    ):
        lease = peer.lease(wanted("large"))
        sock = tcp.open_data(peer, (peer.host, peer.port), PATIENCE_S)
        wire.send(sock, wire.Pull(lease=lease.lease, start=0, length=20 << 20))
        assert wire.receive_reply(sock) == wire.Data(length=20 << 20)
        time.sleep(0.2)  # the sender now waits for room in the socket
        with ThreadPoolExecutor(1) as aside:
            revocation = aside.submit(server.revoke, "large")
            try:
                assert revocation.result(PATIENCE_S) == 1
            finally:
                sock.close()  # where it does wait, it ends now
        assert source._pins == {}


def test_connections_that_the_source_closed_while_idle_are_replaced(server, source, target, connect):
    peer = connect("tcp")
    for _ in range(3):
        peer.fetch(wanted("a"), target, Flight(PATIENCE_S))
        with server._lock:
            sockets = list(server._connections)
        for sock in sockets:
            if sock.getpeername() != peer._sock.getsockname():  # all but the control connection
                sock.shutdown(socket.SHUT_RDWR)
    assert target.bytes_of("a") == source.bytes_of("a")


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x93abc", b"{}", bytes(1000)])
def test_nonsense_from_an_authenticated_peer_ends_its_connection_only(server, source, target, connect, body):
    host, port = server.endpoint.split(":")
    for hello in (True, False):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
            prove_as_client(sock, KEY, wire.Deadline(PATIENCE_S))
            if hello:
                wire.send(sock, wire.Hello(version=wire.VERSION, instance="odd", boot_id=""))
                wire.receive_reply(sock)
            sock.sendall(len(body).to_bytes(4, "little") + body)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        prove_as_client(sock, KEY, wire.Deadline(PATIENCE_S))
        sock.sendall((wire.MAX_FRAME + 1).to_bytes(4, "little"))  # refused before any of it is read
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert connect("tcp").fetch(wanted("a"), target, Flight(PATIENCE_S))[1] == "tcp"


def test_the_mapped_memory_cannot_be_written(server, connect):
    import mmap
    import os

    peer = connect("memfd")
    assert peer.reasons() == {"memfd": ""}
    sock = tcp.open_data(peer, "\0" + peer.welcome.unix, PATIENCE_S)
    wire.send(sock, wire.GetMemory(slab=0))
    assert wire.receive_reply(sock) == wire.Done()
    _, fds, _, _ = socket.recv_fds(sock, 1, 1)
    sock.close()
    with pytest.raises(PermissionError):
        mmap.mmap(fds[0], 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fds[0])


def test_a_session_that_ends_takes_its_leases_with_it(server, source, connect):
    peer = connect()
    peer.lease(wanted("a"))
    peer.lease(wanted("b"))
    assert server.lease_count == 2
    peer.close()
    until(lambda: server.session_count == server.lease_count == 0 and not source._pins)


def test_a_silent_reader_loses_its_leases_and_a_pinging_one_does_not(source, monkeypatch):
    """On the server's clock, which moves only after the ping that it waits for."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=time.sleep))
    with (
        TransferServer([source], KEY, "one", verbs="off", lease_s=0.4) as server,
        Peer(server.endpoint, KEY, "silent") as silent,
        Peer(server.endpoint, KEY, "alive") as alive,
    ):
        lost, kept = silent.lease(wanted("a")), alive.lease(wanted("b"))
        alive.keep_alive()
        clock.now += 0.3
        until(lambda: server._leases._leases[kept.lease].expires == clock.now + 0.4)
        clock.now += 0.3
        until(lambda: server.lease_count == 1)
        assert alive.ask(wire.CheckLease(lease=kept.lease)).valid
        assert not silent.ask(wire.CheckLease(lease=lost.lease)).valid
        assert server.lease_count == 1


def test_deadline_and_cancellation_stop_a_transfer_between_pieces(server, target, connect):
    peer = connect("tcp")
    with pytest.raises(DeadlineError):
        peer.fetch(wanted("a"), target, Flight(0.0))
    flight = Flight(PATIENCE_S)
    flight.cancel()
    with pytest.raises(CancelledError):
        peer.fetch(wanted("a"), target, flight)
    assert target.free_bytes == target.slab.size
    assert server.lease_count == 0


def test_a_bandwidth_cap_is_kept(source, target, connect):
    limiter = RateLimiter(8e6, burst=1 << 16)
    begun = time.monotonic()
    pages, _ = connect("tcp").fetch(wanted("a"), target, Flight(PATIENCE_S, limiter))
    seconds = time.monotonic() - begun
    assert pages.size / seconds < 8e6 * 1.25
    assert target.bytes_of("a") == source.bytes_of("a")


def test_a_landing_without_room_fails_cleanly(server, connect):
    with SlabStore(1 << 16) as small:
        with pytest.raises(MemoryError):
            connect().fetch(wanted("a"), small, Flight(PATIENCE_S))
        assert small.free_bytes == small.slab.size
    assert server.lease_count == 0


def test_rungs_are_chosen_in_order_with_reasons(connect, caplog):
    with caplog.at_level("INFO"):
        peer = connect("cuda_ipc", "verbs_gpudirect", "verbs", "memfd", "tcp")
        assert [rung.name for rung in peer.rungs()] == ["memfd", "tcp"]
    reasons = peer.reasons()
    assert reasons["verbs"] == "the peer: RDMA is switched off"
    assert reasons["memfd"] == reasons["tcp"] == ""
    assert "is read by memfd; cuda_ipc: " in caplog.text
    assert "tcp: works" in caplog.text


def test_without_the_unix_socket_the_next_way_is_taken(source, target):
    with (
        TransferServer([source], KEY, "one", verbs="off", offer_unix=False) as server,
        Peer(server.endpoint, KEY, "two") as peer,
    ):
        assert peer.reasons()["memfd"] == "the peer is on another host, or offers no mapping"
        assert peer.fetch(wanted("a"), target, Flight(PATIENCE_S))[1] == "tcp"


def test_a_rung_that_fails_rests_and_the_next_one_reads(server, source, target, connect, monkeypatch, caplog):
    peer = connect("memfd", "tcp")
    memfd = peer.rungs()[0]

    def broken(*_: object) -> None:
        raise RungFailedError("made to fail")

    monkeypatch.setattr(memfd, "read", broken)
    assert peer.fetch(wanted("a"), target, Flight(PATIENCE_S))[1] == "tcp"
    assert "by memfd failed, next way for 30 s: made to fail" in caplog.text
    assert [rung.name for rung in peer.rungs()] == ["tcp"]
    assert server.lease_count == 0


def test_endpoints_that_are_none(connect):
    with pytest.raises(PeerLostError, match="host:port"):
        Peer("nonsense", KEY, "two")
    with pytest.raises(PeerLostError, match="cannot be reached"):
        Peer("127.0.0.1:1", KEY, "two")
    with pytest.raises(ValueError, match="no rung called 'pigeon'"):
        connect("pigeon")


def test_another_protocol_version_is_refused(server):
    host, port = server.endpoint.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        prove_as_client(sock, KEY, wire.Deadline(PATIENCE_S))
        wire.send(sock, wire.Hello(version=wire.VERSION + 1, instance="new", boot_id=""))
        reply = wire.receive_reply(sock)
    assert isinstance(reply, wire.Refused)
    assert reply.message == "this instance speaks version 1"


def test_an_address_of_the_sixth_version(source, target):
    with (
        TransferServer([source], KEY, "one", verbs="off", host="::1", offer_unix=False) as server,
        Peer(server.endpoint, KEY, "two") as peer,
    ):
        assert server.endpoint.startswith("[::1]:")
        assert peer.fetch(wanted("a"), target, Flight(PATIENCE_S))[1] == "tcp"
    with TransferServer([source], KEY, "one", verbs="off", advertise="fd00::7") as server:
        assert server.endpoint.startswith("[fd00::7]:")
