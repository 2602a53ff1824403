"""The client against a bare ROUTER/PUB socket: absence, garbage, order of tables."""

import asyncio
import socket as sockets

import msgspec
import pytest
import zmq
import zmq.asyncio
from coordinator_bench import PATIENCE_S, free_endpoint

from vllm_loraserve.coordinator.client import (
    CoordinatorClient,
    CoordinatorError,
    CoordinatorUnavailable,
    TableSubscriber,
    publish_endpoint,
)
from vllm_loraserve.coordinator.messages import HEADER, TABLE_TOPIC, Error, GetStatus, Ok, RoutingTable


def bound(kind: int, endpoint: str) -> zmq.asyncio.Socket:
    socket = zmq.asyncio.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(endpoint)
    return socket


async def answer_once(server: zmq.asyncio.Socket, reply: object) -> None:
    identity, _, correlation, _ = await server.recv_multipart()
    await server.send_multipart([identity, HEADER, correlation, msgspec.msgpack.encode(reply)])


def table(epoch: int, version: int) -> RoutingTable:
    return RoutingTable(epoch=epoch, version=version, base_model="m", instances=(), adapters=())


async def test_absent_coordinator_is_unavailable_and_nothing_stale_reaches_the_next_one():
    endpoint = free_endpoint()
    async with CoordinatorClient(endpoint, timeout_s=PATIENCE_S) as client:
        with pytest.raises(CoordinatorUnavailable, match="did not answer"):
            await client.request(GetStatus(), timeout_s=0.2)
        server = bound(zmq.ROUTER, endpoint)
        try:
            task = asyncio.create_task(answer_once(server, Ok()))
            assert await client.request(GetStatus(), timeout_s=PATIENCE_S) == Ok()
            await task
            assert await server.poll(200) == 0
        finally:
            server.close()


async def test_error_reply_raises_with_its_code():
    endpoint = free_endpoint()
    server = bound(zmq.ROUTER, endpoint)
    try:
        async with CoordinatorClient(endpoint, timeout_s=PATIENCE_S) as client:
            task = asyncio.create_task(answer_once(server, Error(code="conflict", message="Taken.")))
            with pytest.raises(CoordinatorError, match="Taken") as raised:
                await client.request(GetStatus())
            assert raised.value.code == "conflict"
            await task
    finally:
        server.close()


async def test_replies_are_matched_in_any_order():
    endpoint = free_endpoint()
    server = bound(zmq.ROUTER, endpoint)
    try:
        async with CoordinatorClient(endpoint, timeout_s=PATIENCE_S) as client:
            first = asyncio.create_task(client.request(GetStatus()))
            one = await server.recv_multipart()
            second = asyncio.create_task(client.request(GetStatus()))
            two = await server.recv_multipart()
            for (identity, _, correlation, _), reply in ((two, Ok()), (one, table(1, 1))):
                await server.send_multipart([identity, HEADER, correlation, msgspec.msgpack.encode(reply)])
            assert await second == Ok()
            assert await first == table(1, 1)
    finally:
        server.close()


async def test_subscriber_keeps_the_newest_table_and_survives_garbage_and_absence():
    endpoint = free_endpoint()
    seen = []
    subscriber = TableSubscriber(endpoint, lambda t: seen.append((t.epoch, t.version)))
    subscriber.start()
    publisher = bound(zmq.PUB, publish_endpoint(endpoint))
    try:
        while subscriber.table is None:
            await publisher.send_multipart([TABLE_TOPIC, HEADER, msgspec.msgpack.encode(table(2, 5))])
            await asyncio.sleep(0.05)
        no_text = b"\x81\xa4type\xa2\xff\xfe"  # no UTF-8
        garbage = [
            [TABLE_TOPIC, HEADER, b"\xff\x00"],
            [TABLE_TOPIC, HEADER, no_text],
            [TABLE_TOPIC],
            [TABLE_TOPIC, b"LRS\x09", b""],
        ]
        older = [table(2, 4), table(1, 99), table(2, 5)]
        for frames in [*garbage, *([TABLE_TOPIC, HEADER, msgspec.msgpack.encode(t)] for t in older)]:
            await publisher.send_multipart(frames)
        while subscriber.table.epoch != 3:
            await publisher.send_multipart([TABLE_TOPIC, HEADER, msgspec.msgpack.encode(table(3, 1))])
            await asyncio.sleep(0.05)
        assert seen == [(2, 5), (3, 1)]
    finally:
        publisher.close()
    await asyncio.sleep(0.1)
    assert subscriber.table == table(3, 1)
    await subscriber.stop()


async def test_a_failed_read_does_not_end_the_reading(monkeypatch):
    """The reader lives as long as the process: had it ended, every later request would seem unanswered."""
    monkeypatch.setattr("vllm_loraserve.coordinator.client.READ_PAUSE_S", 0.0)
    endpoint = free_endpoint()
    server = bound(zmq.ROUTER, endpoint)
    real, failures = zmq.asyncio.Socket.recv_multipart, [zmq.ZMQError(zmq.ENOTSUP), zmq.ZMQError(zmq.EAGAIN)]

    async def recv_multipart(socket, *args, **kwargs):
        if socket.type == zmq.DEALER and failures:
            raise failures.pop()
        return await real(socket, *args, **kwargs)

    monkeypatch.setattr(zmq.asyncio.Socket, "recv_multipart", recv_multipart)
    try:
        async with CoordinatorClient(endpoint) as client:
            for _ in range(2):
                task = asyncio.create_task(answer_once(server, Ok()))
                assert await client.request(GetStatus()) == Ok()
                await task
        assert failures == []
    finally:
        server.close()


@pytest.mark.skipif(not sockets.has_ipv6, reason="this Python has no IPv6")
async def test_an_ipv6_endpoint():
    try:
        with sockets.create_server(("::1", 0), family=sockets.AF_INET6) as s:
            endpoint = f"tcp://[::1]:{s.getsockname()[1]}"
    except OSError:
        pytest.skip("this machine has no IPv6 loopback address")
    assert publish_endpoint(endpoint).startswith("tcp://[::1]:")
    server = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    server.setsockopt(zmq.IPV6, 1)
    server.bind(endpoint)
    try:
        async with CoordinatorClient(endpoint) as client:
            task = asyncio.create_task(answer_once(server, Ok()))
            assert await client.request(GetStatus()) == Ok()
            await task
    finally:
        server.close()


async def test_an_endpoint_that_is_none_is_told_in_a_sentence():
    async with CoordinatorClient("localhost:5700") as client:
        with pytest.raises(CoordinatorUnavailable, match=r"'localhost:5700' is no coordinator endpoint .* give tcp://"):
            await client.request(GetStatus())


async def test_a_replaced_coordinator_with_a_smaller_epoch_is_followed_after_a_while(monkeypatch):
    subscriber = TableSubscriber(free_endpoint())
    assert await subscriber.offer(table(5, 9))
    assert not await subscriber.offer(table(4, 1))
    monkeypatch.setattr("vllm_loraserve.coordinator.client.STALE_S", 0.0)
    assert not await subscriber.offer(table(5, 8))  # of one coordinator an older table stays old
    assert await subscriber.offer(table(4, 1))
    assert subscriber.table == table(4, 1)


def test_publish_endpoint():
    assert publish_endpoint("tcp://127.0.0.1:5700") == "tcp://127.0.0.1:5701"
    assert publish_endpoint("ipc:///run/x") == "ipc:///run/x.table"
    with pytest.raises(ValueError, match="no usable port"):
        publish_endpoint("tcp://127.0.0.1")
