"""NIXL behind the same interface: its traps, and, where the extra is installed, a fetch in processes of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from transfer.helpers import KEY, PATIENCE_S, wanted
from vllm_loraserve.transfer.errors import CancelledError, DeadlineError, RungFailedError
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.peer import Peer
from vllm_loraserve.transfer.rungs import DEFAULT_ORDER, nixl
from vllm_loraserve.transfer.server import TransferServer

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "transfer.py"


def test_it_is_never_chosen_unasked():
    assert "nixl" not in DEFAULT_ORDER


@pytest.mark.parametrize(
    ("given", "used"),
    [("sm,self", "sm,self,tcp"), ("tcp,self", "tcp,self"), ("all", "all"), ("^rc", "^rc"), ("rc_v", "rc_v,tcp")],
)
def test_tcp_is_always_among_its_transports(given, used):
    assert nixl.with_tcp(given) == used


def test_without_an_rdma_device_it_refuses_and_says_why(monkeypatch, source, connect):
    monkeypatch.delenv("LORASERVE_NIXL_WITHOUT_RDMA", raising=False)
    monkeypatch.setattr(nixl, "_has_rdma", lambda: False)
    nixl.unusable.cache_clear()
    try:
        peer = connect("nixl", "tcp")
        assert peer.reasons()["nixl"] == "without an RDMA device NIXL's UCX crashes at interpreter exit"
        assert [rung.name for rung in peer.rungs()] == ["tcp"]
        with pytest.raises(RungFailedError, match="crashes at interpreter exit"):
            TransferServer([source], KEY, "one", verbs="off", offer_nixl=True)
    finally:
        nixl.unusable.cache_clear()


def test_a_peer_that_does_not_offer_it_is_read_otherwise(monkeypatch, server):
    monkeypatch.setattr(nixl, "unusable", lambda: "")
    with Peer(server.endpoint, KEY, "two", order=("nixl", "tcp")) as peer:
        assert peer.reasons()["nixl"] == "the peer does not offer NIXL"


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="the nixl extra is not installed")
def test_it_brings_the_same_bytes():
    """Through the benchmark's two processes, which leave by os._exit; each fetch there is verified."""
    script = f"import sys; sys.path.insert(0, {str(BENCHMARK.parent)!r}); import transfer, json; "
    script += "print('RATE', json.dumps(transfer.nixl_rate(8, 2)))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    line = next(line for line in run.stdout.splitlines() if line.startswith("RATE "))
    assert json.loads(line.removeprefix("RATE "))["nixl_gib_s"] > 0, run.stderr


class Agent:
    """What the rung uses of NIXL's agent; a transfer is in the state `state`."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.state, self.looks = log, "PROC", 0
        self.on_look = lambda: None
        self.release = lambda: None

    def add_remote_agent(self, metadata: bytes) -> str:
        self.log.append("connect")
        return "peer"

    def remove_remote_agent(self, peer: str) -> None:
        self.log.append("disconnect")

    def register_memory(self, regions: object, kind: str) -> str:
        return "registration"

    def deregister_memory(self, registration: str) -> None:
        self.log.append("deregister")

    def get_xfer_descs(self, regions: object, kind: str) -> object:
        return regions

    def initialize_xfer(self, *_: object) -> str:
        return "handle"

    def transfer(self, handle: str) -> str:
        self.log.append("transfer")
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: str) -> str:
        self.looks += 1
        self.on_look()
        return self.state

    def release_xfer_handle(self, handle: str) -> None:
        self.release()
        self.log.append(f"release in {self.state}")


@pytest.fixture
def made(monkeypatch, server, source, target):
    """(the rung, its agents so far, what they were asked, read(flight) of a lease)"""
    log: list[str] = []
    agents: list[Agent] = []

    def agent(_: str) -> Agent:
        agents.append(Agent(log))
        return agents[-1]

    monkeypatch.setattr(nixl, "_agent", agent)
    rung = nixl.NixlRung()
    with Peer(server.endpoint, KEY, "two", order=("tcp",)) as peer:
        peer.welcome = msgspec.structs.replace(peer.welcome, nixl=b"metadata", nixl_base=(source.slab.address,))
        lease = peer.lease(wanted())
        destination = target.reserve(lease.pages)
        yield rung, agents, log, lambda flight: rung.read(peer, lease, destination, flight)
        rung.close()


def test_a_transfer_that_is_given_up_is_waited_for(made):
    rung, agents, log, read = made
    rung._agent = first = Agent(log)
    flight = Flight(PATIENCE_S)

    def look() -> None:
        if first.looks == 3:
            flight.cancel()
        if first.looks == 20:
            first.state = "DONE"

    first.on_look = look
    with pytest.raises(CancelledError):
        read(flight)
    assert log == ["connect", "transfer", "release in DONE"], "not before it was over"
    assert agents == []
    first.on_look, first.looks = lambda: None, 0
    read(Flight(PATIENCE_S))
    assert log[3:] == ["transfer", "release in DONE"]


@pytest.mark.parametrize("why", ["never ends", "can't be released", "fails"])
def test_a_transfer_that_does_not_end_well_takes_its_agent_along(made, monkeypatch, why):
    monkeypatch.setattr(nixl, "ABORT_S", 0.01)
    rung, agents, log, read = made
    rung._agent = first = Agent(log)
    flight = Flight(PATIENCE_S)
    first.on_look = flight.cancel
    if why == "fails":
        first.state = "ERR"

    def refuse() -> None:
        raise RuntimeError("NIXL_ERR_REPOST_ACTIVE")

    if why == "can't be released":
        first.release = refuse
    with pytest.raises(RungFailedError if why == "fails" else CancelledError):
        read(flight)
    assert log[-2:] == ["disconnect", "deregister"], "so nothing writes into the memory after this"
    rung._connect(SimpleNamespace(welcome=SimpleNamespace(nixl=b"")))
    assert len(agents) == 1, "and the next read has an agent of its own"


def test_an_error_of_nixl_s_own_is_the_way_s_failure(made):
    rung, _, log, read = made
    rung._agent = Agent(log)

    def broken(*_: object) -> None:
        raise RuntimeError("NIXL_ERR_BACKEND")

    rung._agent.initialize_xfer = broken
    with pytest.raises(RungFailedError, match="NIXL_ERR_BACKEND"):
        read(Flight(PATIENCE_S))


def test_who_waits_for_another_transfer_has_a_deadline_all_the_same(made):
    rung, _, log, read = made
    with rung._lock, pytest.raises(DeadlineError):
        read(Flight(0.05))
    assert log == []
