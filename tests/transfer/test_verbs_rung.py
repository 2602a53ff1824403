"""The RDMA rung over a made-up device: what a failed READ means, and which registrations outlive what."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from transfer.helpers import KEY, PATIENCE_S, wanted
from vllm_loraserve.transfer import wire
from vllm_loraserve.transfer.errors import (
    CancelledError,
    DeadlineError,
    GenerationChangedError,
    PeerLostError,
    RungFailedError,
)
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.peer import Peer
from vllm_loraserve.transfer.rungs import verbs

ACCESS, RETRIES = 10, 12


class PyverbsError(Exception):
    pass


class Device:
    """What the rung uses of `VerbsDevice`; every READ completes with the next of `statuses`, or never."""

    name, gid, lid, mtu, max_reads = "made-up", "::1", 0, 3, 4

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.on_read: Callable[[], object] = lambda: None
        enums = SimpleNamespace(
            IBV_WC_SUCCESS=0,
            IBV_WC_REM_ACCESS_ERR=ACCESS,
            IBV_WC_RETRY_EXC_ERR=RETRIES,
            IBV_WR_RDMA_READ=4,
            IBV_SEND_SIGNALED=2,
        )
        wr = SimpleNamespace(SGE=lambda *_: None, SendWR=lambda **r: SimpleNamespace(set_wr_rdma=lambda *_: None, **r))
        self.pv = SimpleNamespace(enums=enums, wr=wr, pyverbs_error=SimpleNamespace(PyverbsError=PyverbsError))


class Connection:
    """A queue pair whose completions are the device's statuses."""

    number, psn = 1, 2

    def __init__(self, device: Device, pd: object, depth: int) -> None:
        self.device, self.depth = device, depth
        self._ours, self._theirs = socket.socketpair()
        self.fd = self._ours.fileno()
        self.posted: list[SimpleNamespace] = []
        self.qp = SimpleNamespace(post_send=self._post)
        self.cq = SimpleNamespace(poll=self._poll, req_notify=lambda: None)

    def connect(self, *_: object) -> None:
        pass

    def _post(self, request: SimpleNamespace) -> None:
        self.posted.append(request)
        self.device.on_read()

    def _poll(self, most: int) -> tuple[int, list[SimpleNamespace]]:
        if not self.device.statuses:
            return 0, []
        return 1, [SimpleNamespace(status=self.device.statuses.pop(0))]

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


class Session:
    """The serving side's queue pair; `registered` counts what a peer may read now."""

    answer = wire.QueuePair(number=3, gid="::1", psn=4)

    def __init__(self) -> None:
        self.registered = 0
        self.on_register: Callable[[], object] = lambda: None

    def register(self, slab: object, ranges: tuple[object, ...]) -> tuple[tuple[wire.RemoteRange, ...], object]:
        self.on_register()
        self.registered += 1
        remote = tuple(wire.RemoteRange(r.offset, r.length, 7) for r in ranges)  # type: ignore[attr-defined]
        return remote, self._deregister

    def _deregister(self) -> None:
        self.registered -= 1

    def close(self) -> None:
        pass


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def connect(server, device, session, monkeypatch) -> Iterator[Callable[..., Peer]]:
    """connect("verbs", "tcp") -> a Peer whose RDMA is the made-up device."""
    made: list[Peer] = []
    server._verbs = SimpleNamespace(
        reason="", connect=lambda _: session, close=lambda: None, gpudirect_reason=lambda _: "no device memory"
    )
    monkeypatch.setattr(verbs, "Connection", Connection)
    local = SimpleNamespace(device=device, pd=None, open=lambda: "", register=lambda _: (0, 0), close=lambda: None)

    def start(*order: str) -> Peer:
        made.append(Peer(server.endpoint, KEY, "two", local, order=order))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for peer in made:
        peer.close()


@pytest.mark.parametrize("status", [RETRIES, ACCESS, 5])
def test_a_data_path_that_is_dead_leaves_tcp_and_rests(status, server, source, target, connect, device):
    peer = connect("verbs", "tcp")
    device.statuses = [status]
    assert peer.fetch(wanted("a"), target, Flight(PATIENCE_S))[1] == "tcp"
    assert target.bytes_of("a") == source.bytes_of("a")
    assert [rung.name for rung in peer.rungs()] == ["tcp"]
    assert server.lease_count == 0


@pytest.mark.parametrize(("reads", "count"), [(1, 9), (2, 9), (4, 8), (16, 33), (4, 1)])
def test_few_reads_say_that_they_are_done_and_none_is_waited_for_in_vain(reads, count, device, monkeypatch):
    monkeypatch.setattr(verbs, "READ_S", 0.2)
    connection = Connection(device, None, 2 * reads)
    rung = verbs.VerbsRung(SimpleNamespace(device=device), "host")  # type: ignore[arg-type]
    rung._reads = reads
    polls: list[int] = []

    def poll(most: int) -> tuple[int, list[SimpleNamespace]]:
        """The oldest signalled READ in flight, as a device has them complete in order."""
        numbers = [r.wr_id for r in connection.posted if r.send_flags and r.wr_id > max(polls, default=0)]
        polls.extend(numbers[:1])
        return len(numbers[:1]), [SimpleNamespace(status=0, wr_id=number) for number in numbers[:1]]

    connection.cq = SimpleNamespace(poll=poll, req_notify=lambda: None)
    link = SimpleNamespace(control_fileno=lambda: connection._theirs.fileno())
    flight, most = Flight(PATIENCE_S), 0

    def advance(size: int) -> None:
        nonlocal most
        most = max(most, len(connection.posted) + 1 - max(polls, default=0))

    flight.advance = advance  # type: ignore[method-assign]
    rung._read(link, connection, [(0, 0, 0, 0, 1)] * count, flight)  # type: ignore[arg-type]
    assert [r.wr_id for r in connection.posted] == list(range(1, count + 1))
    assert most <= 2 * reads, "no more in flight than the queue pair takes"
    assert polls[-1] == count
    assert len(polls) == -(-count // min(verbs.SIGNALLED, reads))
    connection.close()


def test_a_device_that_says_nothing_leaves_tcp_too(target, connect, monkeypatch):
    monkeypatch.setattr(verbs, "READ_S", 0.05)
    peer = connect("verbs", "tcp")
    assert peer.fetch(wanted("a"), target, Flight(PATIENCE_S))[1] == "tcp"
    assert [rung.name for rung in peer.rungs()] == ["tcp"]


def test_the_flight_s_own_deadline_is_no_failure_of_the_way(target, connect):
    peer = connect("verbs", "tcp")
    peer.rungs()
    with pytest.raises(DeadlineError):
        peer.fetch(wanted("a"), target, Flight(0.1))
    assert [rung.name for rung in peer.rungs()] == ["verbs", "tcp"]


@pytest.mark.parametrize("end", ["deadline", "cancel"])
def test_a_read_that_waits_for_another_one_ends_in_time_all_the_same(end, target, connect):
    peer = connect("verbs")
    (rung,) = peer.rungs()
    flight = Flight(0.05 if end == "deadline" else PATIENCE_S)
    if end == "cancel":
        flight.cancel()
    with rung._lock, pytest.raises(DeadlineError if end == "deadline" else CancelledError):
        peer.fetch(wanted("a"), target, flight)
    assert target.free_bytes == target.slab.size


def test_a_dead_peer_is_the_peer_s_failure_and_says_how_it_showed(server, target, connect, device):
    peer = connect("verbs", "tcp")
    device.statuses = [RETRIES]
    device.on_read = server.close
    with pytest.raises(PeerLostError, match="retries exceeded"):
        peer.fetch(wanted("a"), target, Flight(PATIENCE_S))
    assert target.free_bytes == target.slab.size


def test_memory_that_was_taken_back_is_leased_again(server, source, target, connect, device):
    peer = connect("verbs", "tcp")
    device.statuses = [ACCESS] * 3
    device.on_read = lambda: server.revoke("a")
    with pytest.raises(GenerationChangedError):
        peer.fetch(wanted("a"), target, Flight(PATIENCE_S))
    assert [rung.name for rung in peer.rungs()] == ["verbs", "tcp"]


def test_a_lease_that_is_revoked_while_it_is_registered_opens_nothing(server, source, connect, session):
    peer = connect("verbs")
    (rung,) = peer.rungs()
    rung.prepare(peer)
    session.on_register = lambda: server.revoke("a")
    with pytest.raises(GenerationChangedError, match="taken back"):
        peer.lease(wanted("a"), rdma=True)
    assert session.registered == 0
    assert source._pins == {}


def test_registrations_go_with_their_queue_pair_and_the_leases_know(server, connect, session):
    peer = connect("verbs")
    (rung,) = peer.rungs()
    rung.prepare(peer)
    registered, plain = peer.lease(wanted("a"), rdma=True), peer.lease(wanted("b"))
    rung._connection.close()
    rung._connection = None
    rung.prepare(peer)
    assert session.registered == 0
    with pytest.raises(GenerationChangedError):
        peer.check(registered, "")
    peer.check(plain, "")


def test_a_key_that_is_refused_while_the_lease_is_valid_is_the_way_s_failure(connect, device, target):
    peer = connect("verbs")
    device.statuses = [ACCESS]
    with pytest.raises(RungFailedError, match="remote access error"):
        peer.fetch(wanted("a"), target, Flight(PATIENCE_S))
