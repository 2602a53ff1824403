"""Tables decoded one after the other are those that were published, and share what did not change."""

import msgspec
import pytest
from coordinator_bench import record

from vllm_loraserve.coordinator.messages import (
    AdapterRoutes,
    Capacity,
    Error,
    InstanceEntry,
    Load,
    Residency,
    Route,
    RoutingTable,
)
from vllm_loraserve.coordinator.table_decoder import TableDecoder


def entry(name, *resident, running=0):
    return InstanceEntry(
        name=name, incarnation="i", url=f"http://{name}", load=Load(running=running), transfer="t:1", last_seen=2.0,
        capacity=Capacity(slots=4, rank_rows=64), resident=tuple(Residency(name=r, sha256=r) for r in resident),
    )  # fmt: skip


def table(version, entries, *adapters):
    routes = tuple(AdapterRoutes(adapter=record(a), routes=(Route(instance="one", phi=1.0),)) for a in adapters)
    return RoutingTable(
        epoch=3, version=version, base_model="toy", instances=tuple(entries), adapters=routes, made_at=float(version)
    )


def test_tables_are_decoded_whole_and_only_what_is_new_is_made_anew():
    decoder = TableDecoder()
    published = [
        table(1, [entry("one", "a"), entry("two")], "a", "b"),
        table(2, [entry("one", "a", running=3), entry("two", "b")], "a", "b"),
        table(3, [entry("two", "b")], "a"),
        table(4, [entry("one"), entry("two", "b")], "a", "c"),
        RoutingTable(epoch=4, version=1, base_model="", instances=(), adapters=()),
        table(5, [entry("one", "a")], "a"),
    ]
    seen = []
    for each in published:
        seen.append(decoder.decode(msgspec.msgpack.encode(each)))
        assert seen[-1] == each
        assert type(seen[-1]) is RoutingTable
    first, second = seen[:2]
    assert second.adapters is first.adapters
    assert second.instances[0].resident is first.instances[0].resident
    assert second.instances[0].load.running == 3


@pytest.mark.parametrize(
    "payload",
    [
        msgspec.msgpack.encode(Error(code="internal", message="no table")),
        msgspec.msgpack.encode(table(1, [entry("one", "a")], "a")).replace(b"phi", b"psi"),
        msgspec.msgpack.encode(table(1, [entry("one", "a")], "a")).replace(b"sha256\xa1a", b"sha256\x01\xc0"),
        msgspec.msgpack.encode(table(1, [entry("one", "a")], "a"))[:-3],
        b"",
    ],
    ids=["another message", "a broken route", "a broken copy", "cut", "nothing"],
)
def test_a_malformed_table_is_an_error_and_the_next_one_is_right(payload):
    decoder = TableDecoder()
    with pytest.raises(msgspec.MsgspecError):
        decoder.decode(payload)
    good = table(2, [entry("one", "a")], "a")
    assert decoder.decode(msgspec.msgpack.encode(good)) == good
