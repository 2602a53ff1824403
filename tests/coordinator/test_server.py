"""The server over real sockets: protocol faults, tables, keys."""

import asyncio
import socket as sockets

import msgspec
import pytest
import zmq
import zmq.asyncio
from coordinator_bench import PATIENCE_S, free_endpoint, join
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_loraserve.coordinator.client import (
    CoordinatorClient,
    CoordinatorUnavailable,
    TableSubscriber,
)
from vllm_loraserve.coordinator.curve import KeysError, create_keys, load_coordinator_keys, load_member_keys
from vllm_loraserve.coordinator.messages import (
    HEADER,
    Error,
    GetStatus,
    GetTable,
    RoutingTable,
    Status,
)
from vllm_loraserve.coordinator.server import CoordinatorServer, ServerError, ServerOptions

CORRELATION = b"12345678"


async def raw(endpoint: str, frames: list[bytes]) -> Error:
    """Sends frames as they are and returns the Error that comes back."""
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(endpoint)
    try:
        await socket.send_multipart(frames)
        async with asyncio.timeout(PATIENCE_S):
            reply = await socket.recv_multipart()
    finally:
        socket.close()
    assert reply[0] == HEADER
    return msgspec.msgpack.decode(reply[2], type=Error)


@pytest.mark.parametrize(
    ("frames", "code", "counter"),
    [
        ([b""], "malformed", "malformed"),
        ([b"x"] * 5, "malformed", "malformed"),
        ([b"HTTP", CORRELATION, b""], "malformed", "malformed"),
        ([b"LRS\x63", CORRELATION, b""], "version", "version"),
        ([HEADER, CORRELATION, b"\xc1"], "malformed", "malformed"),
        ([HEADER, CORRELATION, b"\xdd\xff\xff\xff\xff"], "malformed", "malformed"),
        ([HEADER, CORRELATION, b"\x91" * 100_000], "malformed", "malformed"),
        ([HEADER, CORRELATION, msgspec.msgpack.encode({"type": "LaunchRocket"})], "unknown_message", "unknown_message"),
        ([HEADER, CORRELATION, msgspec.msgpack.encode({"type": "GetAdapter", "name": 7})], "malformed", "malformed"),
        ([HEADER, CORRELATION, msgspec.msgpack.encode({"type": "Heartbeat", "instance": "a", "incarnation": "1",
          "load": {}, "demand": [{"name": "x", "tokens_per_s": float("nan")}]})], "malformed", "malformed"),
        ([HEADER, CORRELATION, msgspec.msgpack.encode({"type": "Heartbeat", "instance": "a", "incarnation": "1",
          "load": {"kv_usage": float("inf")}})], "malformed", "malformed"),
        ([HEADER, CORRELATION, msgspec.msgpack.encode({"type": "Ok"})], "unknown_message", "unknown_message"),
        ([HEADER, CORRELATION, msgspec.msgpack.encode({"type": "AddAdapter", "name": "../x", "source": "/"})],
         "malformed", "malformed"),
        ([HEADER, CORRELATION, msgspec.msgpack.encode({"type": "AddAdapter", "name": "a\u00e9", "source": "/"})],
         "malformed", "malformed"),
    ],
)  # fmt: skip
async def test_bad_messages_are_answered_and_counted(running, frames, code, counter):
    server, client = running
    reply = await raw(server.options.bind, frames)
    assert reply.code == code
    assert server.counters[counter] == 1
    assert isinstance(await client.request(GetStatus()), Status)


async def test_a_field_error_names_the_field(running):
    server, _ = running
    payload = msgspec.msgpack.encode({"type": "RemoveAdapter", "name": "a", "drain_s": "soon"})
    assert "$.drain_s" in (await raw(server.options.bind, [HEADER, CORRELATION, payload])).message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.binary(max_size=64), st.just(HEADER), st.just(CORRELATION)), max_size=6))
def test_hypothesis_garbage_never_kills_it(garbage_server, frames):
    loop, server, dealer = garbage_server

    async def attack() -> None:
        before = sum(server.counters.values())
        await dealer.send_multipart(frames or [b""])
        async with asyncio.timeout(PATIENCE_S):
            reply = await dealer.recv_multipart()
        assert msgspec.msgpack.decode(reply[2], type=Error).code in ("malformed", "unknown_message", "version")
        assert sum(server.counters.values()) > before

    loop.run_until_complete(attack())


@pytest.fixture
def garbage_server(tmp_path):
    import time

    from vllm_loraserve.cluster.placement import make_policy
    from vllm_loraserve.coordinator.control import Controller, ControlOptions
    from vllm_loraserve.coordinator.registry import Registry

    loop = asyncio.new_event_loop()
    registry = Registry(tmp_path / "registry.sqlite")
    endpoint = free_endpoint()

    async def start():
        controller = Controller(registry, make_policy("rank-weighted"), ControlOptions(), time.monotonic())
        server = CoordinatorServer(controller, ServerOptions(bind=endpoint))
        await server.start()
        dealer = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(endpoint)
        return server, dealer

    server, dealer = loop.run_until_complete(start())
    yield loop, server, dealer

    async def end():
        async with CoordinatorClient(endpoint, timeout_s=PATIENCE_S) as client:
            assert isinstance(await client.request(GetStatus()), Status), "still answers after all of it"
        dealer.close()
        await server.stop()

    loop.run_until_complete(end())
    loop.close()
    registry.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 4096,
        b"\xff" * 4096,
        # A valid ZMTP greeting, then a frame that claims to be 2^60 bytes long.
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00NULL" + b"\0" * 16 + b"\0" * 32 + b"\x02" + (1 << 60).to_bytes(8, "big"),
    ],
)
async def test_raw_bytes_on_the_port_do_not_kill_it(running, data):
    server, client = running
    host, port = server.options.bind.removeprefix("tcp://").split(":")
    for _ in range(3):
        with sockets.create_connection((host, int(port)), timeout=PATIENCE_S) as s:
            s.sendall(data)
    assert isinstance(await client.request(GetStatus()), Status)


async def test_get_table_and_counters(running):
    _, client = running
    await join(client)
    table = await client.ask(GetTable(), RoutingTable)
    assert [i.name for i in table.instances] == ["one"]
    later = await client.ask(GetTable(), RoutingTable)
    assert (later.epoch, later.version) > (table.epoch, table.version)
    status = await client.ask(GetStatus(), Status)
    assert status.counters["Register"] == 1
    assert status.counters["GetTable"] == 2


async def test_a_bind_beyond_loopback_needs_keys_or_insecure(running):
    server, _ = running
    for bind in ("tcp://0.0.0.0:7", "tcp://*:7", "tcp://192.0.2.1:7", "tcp://example.org:7"):
        with pytest.raises(ServerError, match="--keys"):
            await CoordinatorServer(server.controller, ServerOptions(bind=bind)).start()


async def test_keys_let_members_in_and_strangers_not(running, tmp_path):
    server, _ = running
    create_keys(tmp_path / "keys")
    create_keys(tmp_path / "strangers")
    with pytest.raises(KeysError, match="already has keys"):
        create_keys(tmp_path / "keys")
    assert (tmp_path / "keys" / "coordinator.key_secret").stat().st_mode & 0o077 == 0
    members = load_member_keys(tmp_path / "keys")
    secured = CoordinatorServer(
        server.controller, ServerOptions(bind=free_endpoint()), load_coordinator_keys(tmp_path / "keys")
    )
    await secured.start()
    try:
        async with CoordinatorClient(secured.options.bind, keys=members) as member:
            assert isinstance(await member.request(GetStatus(), timeout_s=PATIENCE_S), Status)
        subscriber = TableSubscriber(secured.options.bind, keys=members)
        subscriber.start()
        await subscriber.first_table(PATIENCE_S)
        await subscriber.stop()
        foreign = load_member_keys(tmp_path / "strangers")
        impostor = msgspec.structs.replace(foreign, coordinator=members.coordinator)
        for keys in (None, foreign, impostor):
            async with CoordinatorClient(secured.options.bind, keys=keys) as stranger:
                with pytest.raises(CoordinatorUnavailable):
                    await stranger.request(GetStatus(), timeout_s=0.7)
    finally:
        await secured.stop()
