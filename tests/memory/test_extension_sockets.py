"""Pages over sockets by the extension: right bytes and checksums, and every way in which a stream ends too early."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vllm_loraserve.memory.checksum import CHUNK, checksum_of
from vllm_loraserve.memory.extension import ExtensionError
from vllm_loraserve.memory.slab import HostSlab

PATIENCE_S = 120.0
LENGTHS = (1, 63, CHUNK - 1, CHUNK, CHUNK + 1, 0, 256 << 10, (256 << 10) + 1, 1_000_003)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.fixture
def slab() -> Iterator[HostSlab]:
    with HostSlab(4 << 20, huge=False) as made:
        yield made


def places(slab: HostSlab) -> list[tuple[int, int]]:
    """A page of each length, apart from each other by a byte."""
    pages, at = [], slab.address
    for length in LENGTHS:
        pages.append((at, length))
        at += length + 1
    return pages


def test_what_one_side_sends_the_other_has_with_its_checksums(library, pair, slab):
    data = np.random.default_rng(1).integers(0, 256, sum(LENGTHS), np.uint8)
    with HostSlab(data.size, huge=False) as source, ThreadPoolExecutor(1) as aside:
        source.array()[: data.size] = data
        sending = aside.submit(library.send, pair[0].fileno(), source.address, data.size)
        sums = library.receive_checksums(pair[1].fileno(), places(slab), PATIENCE_S, PATIENCE_S)
        sending.result(PATIENCE_S)
    at = 0
    for (address, length), got in zip(places(slab), sums, strict=True):
        want = data[at : at + length]
        assert bytes(slab.view(address - slab.address, length)) == want.tobytes()
        assert got == checksum_of(want)
        assert slab.array()[address - slab.address + length] == 0  # the byte between two pages
        at += length


def test_bytes_that_come_in_drips_are_hashed_as_one_page(library, pair, slab):
    data = np.random.default_rng(2).integers(0, 256, 5 * CHUNK + 7, np.uint8)

    def drip() -> None:
        for start in range(0, data.size, 501):
            pair[0].sendall(data[start : start + 501].tobytes())

    with ThreadPoolExecutor(1) as aside:
        dripping = aside.submit(drip)
        got = library.receive_checksums(pair[1].fileno(), [(slab.address, data.size)], PATIENCE_S, PATIENCE_S)
        dripping.result(PATIENCE_S)
    assert got == [checksum_of(data)]


def test_a_damaged_byte_changes_the_checksum_of_its_page_alone(library, pair, slab):
    data = bytearray(3 * CHUNK)
    pages = [(slab.address + i * CHUNK, CHUNK) for i in range(3)]
    pair[0].sendall(data)
    clean = library.receive_checksums(pair[1].fileno(), pages, PATIENCE_S, PATIENCE_S)
    data[CHUNK + 77] ^= 1
    pair[0].sendall(data)
    dirty = library.receive_checksums(pair[1].fileno(), pages, PATIENCE_S, PATIENCE_S)
    assert [a == b for a, b in zip(clean, dirty, strict=True)] == [True, False, True]


def test_a_stream_that_ends_inside_a_page_is_no_page(library, pair, slab):
    pair[0].sendall(bytes(100))
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(ExtensionError, match="ended early") as caught:
        library.receive_checksums(pair[1].fileno(), [(slab.address, 101)], PATIENCE_S, PATIENCE_S)
    assert caught.value.errno == errno.EPIPE


@pytest.mark.parametrize(("stall", "limit"), [(0.01, PATIENCE_S), (PATIENCE_S, 0.01)])
def test_silence_ends_at_the_stall_and_at_the_limit(stall, limit, library, pair, slab):
    pair[0].sendall(bytes(100))
    with pytest.raises(ExtensionError) as caught:
        library.receive_checksums(pair[1].fileno(), [(slab.address, 101)], stall, limit)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_shutdown_ends_a_call_that_waits(library, pair, slab):
    with ThreadPoolExecutor(1) as aside:
        waiting = aside.submit(
            library.receive_checksums, pair[1].fileno(), [(slab.address, 101)], PATIENCE_S, PATIENCE_S
        )
        pair[1].shutdown(socket.SHUT_RDWR)
        with pytest.raises(ExtensionError, match="ended early"):
            waiting.result(PATIENCE_S)


def test_a_reader_that_is_gone_or_takes_nothing_ends_a_send(library, pair, slab):
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 10_000))
    with pytest.raises(ExtensionError, match="took no byte") as caught:
        library.send(pair[0].fileno(), slab.address, slab.size)
    assert caught.value.errno == errno.ETIMEDOUT
    pair[1].close()
    with pytest.raises(ExtensionError) as caught:
        library.send(pair[0].fileno(), slab.address, slab.size)
    assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)
