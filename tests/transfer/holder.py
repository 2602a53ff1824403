"""A process that serves one adapter until its standard input ends: holder.py MIB NAME [VERBS [HOST [PORT]]]."""

from __future__ import annotations

import sys

import numpy as np

from vllm_loraserve.transfer.server import TransferServer
from vllm_loraserve.transfer.slab_store import SlabStore

KEY = b"the cluster key of the tests"
LAYOUT = "SmolLM2-135M/bfloat16/tp0of1/rows8"


def adapter_pages(mib: int) -> list[np.ndarray]:
    """The pages that every holder of this size serves, so that readers can compare."""
    rng = np.random.default_rng(mib)
    return [rng.integers(0, 256, 1 << 18, np.uint8) for _ in range(4 * mib)]


def main() -> None:
    mib, name = int(sys.argv[1]), sys.argv[2]
    verbs = sys.argv[3] if len(sys.argv) > 3 else "off"
    host = sys.argv[4] if len(sys.argv) > 4 else "127.0.0.1"
    port = int(sys.argv[5]) if len(sys.argv) > 5 else 0
    with SlabStore((mib + 1) << 20, max_range=3 << 20) as store:
        store.put("a", adapter_pages(mib), layout=LAYOUT, digest="sha-a")
        with TransferServer([store], KEY, name, verbs=verbs, host=host, port=port) as server:
            print(server.endpoint, flush=True)
            for line in sys.stdin:
                if line.strip() == "revoke":
                    print(server.revoke("a"), flush=True)
                elif line.strip() == "replace":
                    store.put("a", adapter_pages(mib)[::-1], layout=LAYOUT, digest="sha-a")
                    print(server.revoke("a"), flush=True)
                elif line.strip() == "state":
                    print(server.lease_count, server.session_count, flush=True)


if __name__ == "__main__":
    main()
