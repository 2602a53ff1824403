"""NIXL behind the same interface: its traps, and, where the extra is installed, a fetch in processes of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transfer.helpers import KEY
from vllm_loraserve.transfer.errors import RungFailedError
from vllm_loraserve.transfer.peer import DEFAULT_ORDER, Peer
from vllm_loraserve.transfer.rungs import nixl
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
