"""A coordinator's routing table of thousands of adapters, published every second to whoever subscribes.

`router_overhead.py` runs it beside the router. It stands in for a busy cluster's coordinator: many instances (the URLs
of all lead to the given stubs), each adapter on one or two, other loads each time, so that every table is news.
Prints the coordinator's endpoint, as JSON.

    python benchmarks/published_table.py --instances http://127.0.0.1:9000 --adapters 5000
"""

from __future__ import annotations

import argparse
import json
import random
import time

import msgspec
import zmq

from vllm_loraserve.coordinator.client import publish_endpoint
from vllm_loraserve.coordinator.messages import (
    HEADER,
    TABLE_TOPIC,
    AdapterRecord,
    AdapterRoutes,
    Capacity,
    InstanceEntry,
    Load,
    Residency,
    Route,
    RoutingTable,
)
from vllm_loraserve.launcher.processes import free_ports

RANKS = (8, 16, 32, 64, 128)
EVERY_S = 1.0


def make_table(urls: list[str], instances: int, adapters: int) -> RoutingTable:
    """Version 0 of it; every adapter is resident where it is routed to."""
    rng = random.Random(0)
    names = [f"instance-{i:02}" for i in range(instances)]
    resident: dict[str, list[Residency]] = {name: [] for name in names}
    routes = []
    for i in range(adapters):
        record = AdapterRecord(
            name=f"adapter-{i}", source=f"/adapters/team-{i % 97}/adapter-{i}", rank=rng.choice(RANKS),
            target_modules=("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
            size_bytes=10_000_000, sha256=f"{i:064x}", base_model="base", added_at=1.0, adapter_id=i + 1,
        )  # fmt: skip
        chosen = rng.sample(names, rng.choice((1, 2)))
        routes.append(AdapterRoutes(record, tuple(Route(name, 1 / len(chosen)) for name in chosen)))
        for name in chosen:
            resident[name].append(Residency(record.name, record.sha256, rng.choice(("arena", "host"))))
    entries = tuple(
        InstanceEntry(name, name, urls[i % len(urls)], Load(), Capacity(64, 4096), tuple(resident[name]), last_seen=1.0)
        for i, name in enumerate(names)
    )
    return RoutingTable(epoch=1, version=0, base_model="base", instances=entries, adapters=tuple(routes))


def next_table(table: RoutingTable, rng: random.Random) -> RoutingTable:
    """The same cluster a moment later."""
    entries = tuple(
        msgspec.structs.replace(entry, load=Load(running=rng.randrange(40), kv_usage=rng.random()))
        for entry in table.instances
    )
    return msgspec.structs.replace(table, version=table.version + 1, instances=entries, made_at=time.time())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", nargs="+", required=True, metavar="URL", help="what the instances' URLs lead to")
    parser.add_argument("--count", type=int, default=64, help="instances in the table")
    parser.add_argument("--adapters", type=int, default=5000, help="adapters in the table")
    options = parser.parse_args()
    endpoint = f"tcp://127.0.0.1:{free_ports(2, 21000, consecutive=True)[0]}"
    socket = zmq.Context.instance().socket(zmq.PUB)
    socket.bind(publish_endpoint(endpoint))
    table = make_table(options.instances, options.count, options.adapters)
    rng, encoder = random.Random(1), msgspec.msgpack.Encoder()
    about = {"endpoint": endpoint, "instances": len(table.instances), "adapters": len(table.adapters)}
    print(json.dumps(about | {"bytes": len(encoder.encode(table))}), flush=True)
    while True:
        table = next_table(table, rng)
        socket.send_multipart([TABLE_TOPIC, HEADER, encoder.encode(table)])
        time.sleep(EVERY_S)


if __name__ == "__main__":
    main()
