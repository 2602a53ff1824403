"""The extension missing: TCP, the same host's memory and the checkpoint still work, and one warning says so."""

from __future__ import annotations

import os
import subprocess
import sys

from transfer.helpers import PATIENCE_S

SCRIPT = """
import logging, sys
logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(levelname)s %(message)s")
import numpy as np
from vllm_loraserve.memory import extension
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.pages import Wanted
from vllm_loraserve.transfer.peers import PeerTable
from vllm_loraserve.transfer.pool import AdapterPool, Location
from vllm_loraserve.transfer.server import TransferServer
from vllm_loraserve.transfer.slab_store import SlabStore

key = b"the cluster key of the tests"
pages = [np.full(50_001, i, np.uint8) for i in range(40)]
source, target = SlabStore(4 << 20, max_range=300_000), SlabStore(4 << 20)
source.put("a", pages, layout="L", digest="d")
assert extension.load() is None
with TransferServer([source], key, "one") as server:
    for order in (("tcp",), ("memfd",)):
        with AdapterPool(target, PeerTable(key, "two", order=order)) as pool:
            brought = pool.bring(Wanted(name="a", layout="L"), [Location("one", server.endpoint)])
            print("via", brought.via)
            assert target.bytes_of("a") == source.bytes_of("a")
            target.drop("a")

def load(wanted, landing, flight):
    return target.put(wanted.name, pages, layout=wanted.layout)

with AdapterPool(target, PeerTable(key, "two"), load=load) as pool:
    print("source", pool.bring(Wanted(name="a", layout="L")).source)
# One flipped byte is found by numpy just as well.
source.slab.view(source.find(Wanted(name="a", layout="L")).ranges[0].offset, 1)[0] ^= 1
with TransferServer([source], key, "one") as server:
    from vllm_loraserve.transfer.peer import Peer
    with Peer(server.endpoint, key, "two", order=("tcp",)) as peer:
        try:
            peer.fetch(Wanted(name="a", layout="L"), target, Flight(100))
        except Exception as error:
            print("refused", type(error).__name__)
"""


def test_without_the_extension_adapters_still_move(tmp_path):
    environment = {
        **os.environ,
        "LORASERVE_POOL_LIBRARY": str(tmp_path / "absent.so"),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    warnings = [line for line in run.stdout.splitlines() if line.startswith("WARNING")]
    (warning,) = [line for line in warnings if "extension" in line]
    assert f"The pool extension is not available: {tmp_path}/absent.so" in warning, "what is missing"
    assert "no device slabs, no page-locked memory and no GPUDirect" in warning, "what that costs"
    assert "RDMA on host memory, by mapping on one host and by TCP" in warning, "what still works"
    assert warning.endswith("docs/development.md says how to build it."), "and what to do"
    assert "via tcp one" in run.stdout
    assert "via memfd one" in run.stdout
    assert "source checkpoint" in run.stdout
    assert "refused CorruptPageError" in run.stdout
