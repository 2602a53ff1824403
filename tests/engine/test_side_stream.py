"""In which order copies into the arena and kernels that read it may run: on made-up streams, and on a GPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_loraserve.engine.side_stream import SideStream


class Streams:
    """In place of torch.cuda: each stream keeps what it was given, in order. `before`: all that must be done before."""

    def __init__(self) -> None:
        self.compute = self.current = Stream("compute")
        self.side: Stream | None = None

    def Stream(self, device: Any) -> Stream:
        made = Stream("side")
        self.side = self.side or made
        return made

    def set_device(self, device: Any) -> None:
        pass

    def Event(self) -> Event:
        return Event()

    def current_stream(self) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def give(self, work: str) -> set[str]:
        """To the current stream; everything that is done when it runs."""
        done = set(self.current.done)
        self.current.done.add(work)
        return done


class Stream:
    def __init__(self, name: str) -> None:
        self.name, self.done = name, set[str]()

        self.synchronized: set[str] = set()

    def wait_event(self, event: Event) -> None:
        self.done |= event.behind

    def synchronize(self) -> None:
        self.synchronized = set(self.done)


class Event:
    def __init__(self) -> None:
        self.behind: set[str] = set()

    def record(self, stream: Stream) -> None:
        self.behind = set(stream.done)


def test_kernels_see_whole_adapters_and_copies_wait_for_readers_of_their_pages_alone() -> None:
    streams = Streams()
    side = SideStream(torch.device("cuda"), streams)
    streams.give("step 1")
    with side.copying():
        assert streams.give("copy to free pages") == set(), "beside the step"
    assert streams.give("step 2") >= {"step 1", "copy to free pages"}
    side.freed()
    streams.give("step 3")
    with side.copying():
        assert streams.give("copy to freed pages") == {"step 1", "copy to free pages", "step 2"}
    assert "copy to freed pages" in streams.give("step 4")


def test_a_copy_aside_waits_for_readers_of_its_pages_alone_and_the_step_for_nothing() -> None:
    streams = Streams()
    side = SideStream(torch.device("cuda"), streams)
    streams.give("step 1")
    side.freed()
    streams.give("step 2")
    seen: list[set[str]] = []
    side.copy_aside(lambda: seen.append(streams.give("aside")))
    assert seen == [{"step 1"}]
    assert side._aside.synchronized == {"step 1", "aside"}, "the thread waited for it"
    assert streams.give("step 3") == {"step 1", "step 2"}


def test_a_copy_that_fails_leaves_the_streams_in_order() -> None:
    streams = Streams()
    side = SideStream(torch.device("cuda"), streams)

    def fail() -> None:
        with side.copying():
            streams.give("half a copy")
            raise RuntimeError("no such page")

    with pytest.raises(RuntimeError):
        fail()
    assert "half a copy" in streams.give("step")


@pytest.mark.vllm
def test_the_manager_copies_on_it_and_tells_when_pages_come_free() -> None:
    from vllm_loraserve.engine.model_manager import PagedLoRAModelManager
    from vllm_loraserve.engine.pending_copies import PendingCopies

    streams = Streams()
    held: list[set[str]] = []

    @contextmanager
    def read(adapter: int) -> Any:
        yield SimpleNamespace(ranks=(8,), pages=(1,), generation=1)

    def event() -> Any:
        held.append(set(streams.current.done))
        return SimpleNamespace(query=lambda: True)

    def write(*_: Any) -> None:
        streams.give("copy")

    manager: Any = SimpleNamespace(
        device=SimpleNamespace(type="cuda"),
        side_stream=SideStream(torch.device("cuda"), streams),
        copies=PendingCopies(event),
        host=SimpleNamespace(reading=read, targets=lambda entry: [None]),
        residents=SimpleNamespace(is_staged=lambda *_: False, lock=RLock(), reserve=lambda *_: [[0]]),
        arena=SimpleNamespace(write=write, numbers=lambda pages: pages),
        _numbers_in_place=lambda entry: None,
        _page_victims=lambda adapter: [],
        _make_room=lambda *_: None,
        _take_slot=lambda adapter: None,
    )
    streams.give("step")
    PagedLoRAModelManager._pages_freed(manager)
    PagedLoRAModelManager._bring_in(manager, 1, SimpleNamespace())  # type: ignore[arg-type]
    assert held == [{"step", "copy"}], "the host's pages stay until the side stream is done with them"
    assert streams.side is not None
    assert "copy" in streams.compute.done


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: streams were not run on a GPU")
def test_on_a_gpu_copies_and_kernels_keep_their_order() -> None:
    """Long kernels read pages that are freed and overwritten at once, again and again."""
    device = torch.device("cuda")
    side = SideStream(device)
    pages = torch.zeros(1 << 20, device=device)
    load = torch.randn(2048, 2048, device=device)
    sources = [torch.full((1 << 20,), float(value)).pin_memory() for value in range(8)]
    read = []
    for source in sources:
        side.freed()
        with side.copying():
            pages.copy_(source, non_blocking=True)
        for _ in range(10):
            load = (load @ load).clamp(-1, 1)
        read.append(pages + 0 * load[0, 0])
    torch.cuda.synchronize()
    for value, seen in enumerate(read):
        assert (seen == value).all()
