"""Real servers on real slabs, in this process or in one that can be killed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from transfer.helpers import KEY, LAYOUT, Holder, make_pages
from vllm_loraserve.transfer.peer import Peer
from vllm_loraserve.transfer.server import TransferServer
from vllm_loraserve.transfer.slab_store import SlabStore


@pytest.fixture
def source() -> Iterator[SlabStore]:
    """A store that holds adapters "a" and "b", cut into several ranges."""
    with SlabStore(32 << 20, max_range=200_000) as store:
        store.put("a", make_pages(1), layout=LAYOUT, digest="sha-a", meta=b"rank 64")
        store.put("b", make_pages(2), layout=LAYOUT, digest="sha-b")
        yield store


@pytest.fixture
def target() -> Iterator[SlabStore]:
    """An empty store that cuts its ranges otherwise."""
    with SlabStore(32 << 20, max_range=150_000) as store:
        yield store


@pytest.fixture
def server(source: SlabStore) -> Iterator[TransferServer]:
    with TransferServer([source], KEY, "one", verbs="off") as running:
        yield running


@pytest.fixture
def connect(server: TransferServer) -> Iterator[Callable[..., Peer]]:
    """connect("tcp") -> a Peer that reads by these rungs only."""
    with contextlib.ExitStack() as stack:
        yield lambda *order, **options: stack.enter_context(
            Peer(server.endpoint, KEY, "two", order=order or ("memfd", "tcp"), **options)
        )


@pytest.fixture
def holder() -> Iterator[Callable[..., Holder]]:
    """holder(mib=8, name="holder") -> a running Holder."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: object, **named: object) -> Holder:
            made = Holder(*arguments, **named)  # type: ignore[arg-type]
            stack.callback(made.close)
            return made

        yield start
