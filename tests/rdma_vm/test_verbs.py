"""RDMA READ on a device: right bytes, refused keys, dead peers, a link that goes down, nothing left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
import time

import pytest
from transfer.helpers import KEY, LAYOUT, Holder, make_pages, until, wanted
from transfer.holder import adapter_pages

from vllm_loraserve.memory import extension
from vllm_loraserve.transfer.errors import (
    CorruptPageError,
    PeerLostError,
    RungFailedError,
    TransferError,
)
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.peer import Peer
from vllm_loraserve.transfer.rungs.verbs import LocalDevice
from vllm_loraserve.transfer.server import TransferServer
from vllm_loraserve.transfer.slab_store import SlabStore
from vllm_loraserve.transfer.wire import Leased, RemoteRange

pytestmark = pytest.mark.rdma


@pytest.fixture
def source():
    with SlabStore(24 << 20, max_range=1_500_000) as store:
        store.put("a", make_pages(1, count=24, size=150_001), layout=LAYOUT, digest="sha-a")
        yield store


@pytest.fixture
def target():
    with SlabStore(24 << 20, max_range=1_100_000) as store:
        yield store


@pytest.fixture(scope="module", autouse=True)
def holders():
    """Processes to kill, of 2, 12 and 2 MiB; they start while other tests run, for that takes long in emulation."""
    started = [Holder(mib, "holder", "auto") for mib in (2, 12, 2)]
    yield started
    for holder in started:
        holder.close()


@pytest.fixture
def server(device, source):
    with TransferServer([source], KEY, "one") as running:
        yield running


@pytest.fixture
def peer(server):
    with Peer(server.endpoint, KEY, "two", order=("verbs",)) as connected:
        yield connected


def rung_of(peer: Peer):
    (rung,) = peer.rungs()
    assert rung.name == "verbs"
    return rung


def read_status(peer: Peer, lease: Leased, target: SlabStore) -> BaseException | None:
    """What a raw READ of the lease's memory raises, without checks or retries."""
    destination = target.reserve(lease.pages)
    try:
        rung_of(peer).read(peer, lease, destination, Flight(20))
    except TransferError as error:
        return error
    finally:
        target.abandon(destination)
    return None


def leased(peer: Peer) -> Leased:
    rung_of(peer).prepare(peer)
    return peer.lease(wanted("a"), rdma=True)


def test_the_extension_sees_the_device_and_says_that_it_has_no_dma_buf(device):
    report = extension.load().probe()
    print("RDMA device:", report.verbs.devices)
    mine = next(d for d in report.verbs.devices if d.name == device.name)
    assert mine.dma_buf == "supported" or mine.dma_buf.startswith("unsupported: ")


def test_the_gid_is_one_that_routes(device):
    assert device.gid.startswith(("0000:0000:0000:0000:0000:ffff:", "::ffff:"))
    assert device.mtu >= 1


def test_reading_by_rdma_brings_the_same_bytes(server, source, target, peer):
    for _ in range(2):
        flight = Flight(300)
        begun = time.monotonic()
        pages, rung = peer.fetch(wanted("a"), target, flight)
        seconds = time.monotonic() - begun
        assert rung == "verbs"
        assert flight.moved == pages.size
        assert target.bytes_of("a") == source.bytes_of("a")
        print(f"{pages.size / 2**20:.1f} MiB in {seconds:.2f} s")
    assert server.lease_count == 0
    until(lambda: len(source.landings) == 2)
    assert source.landings[-1][2] == "two"


def test_gpudirect_says_why_not(server):
    with Peer(server.endpoint, KEY, "two", order=("verbs_gpudirect", "verbs", "tcp")) as peer:
        assert [rung.name for rung in peer.rungs()] == ["verbs", "tcp"]
        assert peer.reasons()["verbs_gpudirect"] == "neither end is device memory"


def test_a_wrong_key_reads_nothing(peer, target):
    lease = leased(peer)
    forged = [RemoteRange(r.address, r.length, (r.rkey + 0x100) & 0xFFFFFFFF) for r in lease.remote]
    error = read_status(peer, Leased(lease=lease.lease, pages=lease.pages, slab=0, remote=tuple(forged)), target)
    assert isinstance(error, RungFailedError)
    assert "remote access error" in str(error)


def test_reading_past_the_registered_pages_is_refused_by_the_device(peer, target):
    lease = leased(peer)
    beyond = [RemoteRange(r.address + 4096, r.length, r.rkey) for r in lease.remote]
    error = read_status(peer, Leased(lease=lease.lease, pages=lease.pages, slab=0, remote=tuple(beyond)), target)
    assert isinstance(error, RungFailedError)


def test_a_key_of_another_peer_s_lease_opens_nothing(server, peer, target):
    with Peer(server.endpoint, KEY, "three", order=("verbs",)) as other:
        theirs = leased(other)
        leased(peer)
        error = read_status(peer, theirs, target)
        assert isinstance(error, RungFailedError)
        assert read_status(other, theirs, target) is None  # its owner may


def test_after_release_the_key_is_dead(peer, target):
    lease = leased(peer)
    assert read_status(peer, lease, target) is None
    peer.release(lease)
    assert isinstance(read_status(peer, lease, target), RungFailedError)


def test_revocation_ends_reading_at_once(server, peer, target):
    lease = leased(peer)
    assert server.revoke("a") == 1
    assert isinstance(read_status(peer, lease, target), RungFailedError)


def test_memory_is_never_registered_for_writing(device, server, peer, target):
    lease = leased(peer)
    rung = rung_of(peer)
    connection = rung._connection
    pv = device.pv
    base, lkey = rung._local.register(target.slab)
    request = pv.wr.SendWR(wr_id=1, num_sge=1, sg=[pv.wr.SGE(base, 64, lkey)], opcode=pv.enums.IBV_WR_RDMA_WRITE)
    request.set_wr_rdma(lease.remote[0].rkey, lease.remote[0].address)
    connection.qp.post_send(request)
    end = time.monotonic() + 120
    status = None
    while status is None and time.monotonic() < end:
        count, completions = connection.cq.poll(1)
        if count:
            status = completions[0].status
    assert status in (pv.enums.IBV_WC_REM_ACCESS_ERR, pv.enums.IBV_WC_REM_INV_REQ_ERR, pv.enums.IBV_WC_REM_OP_ERR)


def test_an_adapter_replaced_during_the_read_is_read_again_never_mixed(server, source, target, peer):
    flight = Flight(300)
    original, replaced = flight.advance, []

    def advance(size: int) -> None:
        original(size)
        if not replaced:
            replaced.append(1)
            source.put("a", make_pages(77, count=24, size=150_001), layout=LAYOUT, digest="sha-new")
            server.revoke("a")

    flight.advance = advance  # type: ignore[method-assign]
    pages, _ = peer.fetch(wanted("a"), target, flight)
    assert pages.digest == "sha-new"
    assert target.bytes_of("a") == source.bytes_of("a")


def test_one_flipped_byte_is_found(source, target, peer):
    entry = source.find(wanted("a"))
    source.slab.view(entry.ranges[-1].offset + 5, 1)[0] ^= 1
    with pytest.raises(CorruptPageError):
        peer.fetch(wanted("a"), target, Flight(300))
    assert target.catalogue() == []


def test_a_peer_killed_before_the_read_is_lost(device, target, holders):
    with Peer(holders[0].endpoint, KEY, "two", order=("verbs",)) as peer:
        assert [rung.name for rung in peer.rungs()] == ["verbs"]
        holders[0].kill()
        with pytest.raises(PeerLostError):  # and not the end of the time given
            peer.fetch(wanted("a"), target, Flight(300))


def test_a_peer_killed_during_a_read_is_noticed_by_the_control_connection(device, target, holders):
    with Peer(holders[1].endpoint, KEY, "two", order=("verbs",)) as peer:
        flight = Flight(300)
        original, posted = flight.advance, []

        def advance(size: int) -> None:
            original(size)
            posted.append(size)
            if len(posted) == 4:
                holders[1].kill()

        flight.advance = advance  # type: ignore[method-assign]
        with pytest.raises(PeerLostError):  # and not the end of the time given
            peer.fetch(wanted("a"), target, flight)
        assert target.free_bytes == target.slab.size


def test_a_peer_killed_after_the_read_leaves_a_good_copy(device, target, holders):
    with Peer(holders[2].endpoint, KEY, "two", order=("verbs",)) as peer:
        peer.fetch(wanted("a"), target, Flight(300))
        holders[2].kill()
        assert target.bytes_of("a") == b"".join(bytes(p) for p in adapter_pages(2))


def test_concurrent_fetches_share_one_connection(server, source, target, peer):
    errors: list[BaseException] = []

    def fetch() -> None:
        try:
            peer.fetch(wanted("a"), target, Flight(300))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert target.bytes_of("a") == source.bytes_of("a")


def state() -> dict[str, int]:
    gc.collect()
    shown = subprocess.run(["rdma", "resource"], capture_output=True, text=True, check=False).stdout
    counts = {}
    for kind in ("pd", "cq", "qp", "mr"):
        words = shown.split()
        counts[kind] = int(words[words.index(kind) + 1]) if kind in words else -1
    counts["fd"] = len(os.listdir("/proc/self/fd"))
    return counts


def resident() -> int:
    """Bytes of this process's own memory, without the shared slabs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon:"))


def test_a_thousand_fetches_leave_nothing_behind(server, source, device):
    source.put("small", make_pages(3, count=2, size=3000), layout=LAYOUT)
    with SlabStore(1 << 20) as target, Peer(server.endpoint, KEY, "two", order=("verbs",)) as peer:
        for _ in range(20):
            peer.fetch(wanted("small"), target, Flight(300))
        before, memory = state(), resident()
        for _ in range(1000):
            peer.fetch(wanted("small"), target, Flight(300))
        assert state() == before
        assert resident() - memory < 4 << 20
    assert before["mr"] >= 1
    assert server.lease_count == 0


def test_sessions_leave_nothing_behind(server, source, device):
    def once() -> None:
        with SlabStore(8 << 20) as target, Peer(server.endpoint, KEY, "two", order=("verbs",)) as peer:
            peer.fetch(wanted("a"), target, Flight(300))

    once()
    until(lambda: not server.session_count)
    time.sleep(0.1)
    before = state()
    for _ in range(5):
        once()
    # The server's threads end a moment after their sessions.
    until(lambda: all(now <= before[kind] for kind, now in state().items()))


def test_a_slab_can_be_forgotten(device):
    local = LocalDevice()
    assert local.open() == ""
    with SlabStore(1 << 20) as store:
        first = local.register(store.slab)
        assert local.register(store.slab) == first
        local.forget(store.slab)
        assert local.register(store.slab) is not None
        local.forget(store.slab)
    local.close()


def test_a_link_that_goes_down_during_a_read_leaves_tcp(device, server, source, target):
    """The device's interface goes; the control connection and TCP run over another one. Last: it stays down."""
    interface = os.environ.get("RDMA_INTERFACE", "")
    if not interface:
        pytest.skip("RDMA_INTERFACE names no interface that may be switched off")
    with Peer(server.endpoint, KEY, "two", order=("verbs", "tcp")) as peer:
        assert peer.fetch(wanted("a"), target, Flight(300))[1] == "verbs"
        flight = Flight(300)
        original, posted = flight.advance, []

        def advance(size: int) -> None:
            original(size)
            posted.append(size)
            if len(posted) == 2:
                subprocess.run(["ip", "link", "set", interface, "down"], check=True)

        flight.advance = advance  # type: ignore[method-assign]
        begun = time.monotonic()
        assert peer.fetch(wanted("a"), target, flight)[1] == "tcp"
        print(f"by TCP {time.monotonic() - begun:.1f} s after the link went down")
        assert target.bytes_of("a") == source.bytes_of("a")
