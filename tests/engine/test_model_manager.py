"""Which registered adapter goes at --max-cpu-loras, and how a device copies; the rest runs in a real vLLM."""

from __future__ import annotations

from contextlib import contextmanager
from threading import RLock
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def cache(*adapters: int, pinned: tuple[int, ...] = ()) -> Any:
    return SimpleNamespace(cache={a: SimpleNamespace(pages=(1,)) for a in adapters}, pinned_items=set(pinned))


@pytest.mark.parametrize(
    ("in_use", "pinned", "held", "last_copies", "gone"),
    [
        ((), (), (), (), 1),
        ((1,), (), (), (), 2),
        ((1,), (2,), (), (), 3),
        ((), (), (), (1, 2), 3),
        ((), (), (1, 2), (), 3),
        ((), (), (1,), (2, 3), 2),
        ((3,), (), (1,), (), 2),
        ((3,), (), (1, 2), (), 1),
        ((3,), (), (), (1, 2), 1),
        ((1, 2), (3,), (), (), None),
    ],
)
def test_what_is_awaited_and_last_copies_go_last_and_what_is_in_use_or_pinned_never(
    in_use: tuple[int, ...],
    pinned: tuple[int, ...],
    held: tuple[int, ...],
    last_copies: tuple[int, ...],
    gone: int | None,
) -> None:
    from vllm_loraserve.engine.model_manager import PagedLoRAModelManager

    class Host:
        evictions = 0
        is_held = staticmethod(held.__contains__)

        def may_evict(self, adapter: int) -> bool:
            return adapter not in last_copies

        def __contains__(self, adapter: int) -> bool:
            return adapter != 3

    removed: list[int] = []
    host = Host()
    manager: Any = SimpleNamespace(
        _registered_adapters=cache(1, 2, 3, pinned=pinned),
        _active_adapters=cache(),
        in_use=frozenset(in_use),
        layout=SimpleNamespace(size_bytes=lambda pages: 4096),
        _demand=SimpleNamespace(of=lambda adapter, now: float(adapter)),
        host=host,
        remove_adapter=removed.append,
    )
    assert PagedLoRAModelManager.remove_oldest_adapter(manager) == (gone is not None)
    assert removed == ([gone] if gone is not None else [])
    assert host.evictions == int(gone is not None and gone in host)


def test_what_requests_wait_for_and_only_the_arena_has_leaves_it_last() -> None:
    from vllm_loraserve.engine.model_manager import PagedLoRAModelManager

    class Host:
        is_held = staticmethod({1, 2}.__contains__)

        def __contains__(self, adapter: int) -> bool:
            return adapter != 1

    manager: Any = SimpleNamespace(
        host=Host(), in_use=frozenset({9}), _idle=lambda pinned=False: [4] if pinned else [1, 2, 3]
    )
    manager._awaited_here_alone = lambda adapter: PagedLoRAModelManager._awaited_here_alone(manager, adapter)
    assert PagedLoRAModelManager._victims(manager, 9) == [2, 3, 1, 4]


class Event:
    done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_a_device_copies_behind_the_step_and_its_source_stays_until_then() -> None:
    from vllm_loraserve.engine.model_manager import PagedLoRAModelManager
    from vllm_loraserve.engine.pending_copies import PendingCopies

    events: list[Event] = []
    reading: set[int] = set()

    def event() -> Event:
        events.append(Event())
        return events[-1]

    @contextmanager
    def read(adapter: int) -> Any:
        reading.add(adapter)
        yield SimpleNamespace(ranks=(8,), pages=(1,), generation=1)
        reading.discard(adapter)

    manager: Any = SimpleNamespace(
        device=SimpleNamespace(type="cuda"),
        side_stream=None,
        copies=PendingCopies(event),
        host=SimpleNamespace(reading=read, targets=lambda entry: [None]),
        residents=SimpleNamespace(is_staged=lambda *_: False, lock=RLock(), reserve=lambda *_: [[0]]),
        arena=SimpleNamespace(write=lambda *_: None, numbers=lambda pages: pages),
        _numbers_in_place=lambda entry: None,
        _page_victims=lambda adapter: [],
        _make_room=lambda *_: None,
        _take_slot=lambda adapter: None,
    )
    for adapter in (1, 2):
        assert PagedLoRAModelManager._bring_in(manager, adapter, SimpleNamespace()) == ([[0]], None)  # type: ignore[arg-type]
    assert reading == {1, 2}, "nobody waited, and both are being copied"
    events[0].done = True
    PagedLoRAModelManager._bring_in(manager, 3, SimpleNamespace())  # type: ignore[arg-type]
    assert reading == {2, 3}
    manager.copies.drain(wait=True)
    assert (reading, len(manager.copies)) == (set(), 0)
    assert all(each.done for each in events)


def test_a_copy_that_could_not_be_queued_holds_nothing() -> None:
    from vllm_loraserve.engine.arena_residents import ArenaFullError
    from vllm_loraserve.engine.model_manager import PagedLoRAModelManager
    from vllm_loraserve.engine.pending_copies import PendingCopies

    ended: list[int] = []

    @contextmanager
    def read(adapter: int) -> Any:
        try:
            yield SimpleNamespace(ranks=(8,), pages=(1,), generation=1)
        finally:
            ended.append(adapter)

    def full(*_: Any) -> None:
        raise ArenaFullError("no room")

    manager: Any = SimpleNamespace(
        copies=PendingCopies(Event),
        host=SimpleNamespace(reading=read, targets=lambda entry: [None]),
        _numbers_in_place=lambda entry: None,
        residents=SimpleNamespace(is_staged=lambda *_: False, lock=RLock()),
        _page_victims=lambda adapter: [],
        _make_room=full,
    )
    with pytest.raises(ArenaFullError):
        PagedLoRAModelManager._bring_in(manager, 1, SimpleNamespace())  # type: ignore[arg-type]
    assert ended == [1]
