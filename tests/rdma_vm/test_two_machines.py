"""Two machines and a wire: the same fetch between kernels, and a machine that loses its power in the middle of it."""

from __future__ import annotations

import os
import time

import pytest
from transfer.helpers import KEY, wanted
from transfer.holder import adapter_pages

from vllm_loraserve.transfer.errors import PeerLostError
from vllm_loraserve.transfer.flight import Flight, RateLimiter
from vllm_loraserve.transfer.peer import Peer
from vllm_loraserve.transfer.slab_store import SlabStore

pytestmark = pytest.mark.rdma
MIB = 8


@pytest.fixture(scope="module")
def endpoint() -> str:
    found = os.environ.get("HOLDER", "")
    if not found:
        pytest.skip("HOLDER names no other machine")
    return found


def connect(endpoint: str, *order: str) -> Peer:
    end = time.monotonic() + 300
    while True:
        try:
            return Peer(endpoint, KEY, "node-1", order=order)
        except PeerLostError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def test_an_adapter_crosses_by_rdma(device, endpoint):
    with connect(endpoint, "cuda_ipc", "memfd", "verbs_gpudirect", "verbs", "tcp") as peer:
        assert peer.reasons()["memfd"] == "the peer is on another host, or offers no mapping"
        with SlabStore((MIB + 1) << 20) as target:
            begun = time.monotonic()
            pages, rung = peer.fetch(wanted("a"), target, Flight(300))
            print(f"{pages.size / 2**20 / (time.monotonic() - begun):.1f} MiB/s by {rung}")
            assert rung == "verbs"
            assert target.bytes_of("a") == b"".join(bytes(p) for p in adapter_pages(MIB))


def test_and_by_tcp(device, endpoint):
    with connect(endpoint, "tcp") as peer, SlabStore((MIB + 1) << 20) as target:
        assert peer.fetch(wanted("a"), target, Flight(300))[1] == "tcp"
        assert target.bytes_of("a") == b"".join(bytes(p) for p in adapter_pages(MIB))


def test_a_machine_that_is_switched_off_during_a_read_is_given_up(device, endpoint):
    """Nothing says goodbye here: neither a reset nor an end of file, only silence."""
    with connect(endpoint, "verbs") as peer, SlabStore((MIB + 1) << 20) as target:
        assert [rung.name for rung in peer.rungs()] == ["verbs"]
        flight = Flight(300, RateLimiter(1e6, burst=1 << 20))  # slow, so that the switch is quicker
        original, posted = flight.advance, []

        def advance(size: int) -> None:
            original(size)
            posted.append(size)
            if len(posted) == 2:
                print("SWITCH-OFF-NODE-0", flush=True)

        flight.advance = advance  # type: ignore[method-assign]
        begun = time.monotonic()
        with pytest.raises(PeerLostError) as caught:  # neither the way alone, nor the end of the time given
            peer.fetch(wanted("a"), target, flight)
        print(f"given up after {time.monotonic() - begun:.1f} s: {caught.value}")
        assert "retries exceeded" in str(caught.value) or "no READ completed" in str(caught.value)
        assert target.catalogue() == []
        assert target.free_bytes == target.slab.size
