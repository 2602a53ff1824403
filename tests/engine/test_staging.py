"""engine/staging.py: pages come into the arena beside the step, and never at the cost of what a step uses."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_loraserve.adapters.layout import ModuleShape, build_layout
from vllm_loraserve.engine import staging as staging_module
from vllm_loraserve.engine.arena_residents import ArenaResidents
from vllm_loraserve.engine.staging import Staging
from vllm_loraserve.memory.arena import Arena
from vllm_loraserve.memory.host_tier import HostTier

CPU = torch.device("cpu")
PAGES = 6


class Bench:
    """An arena of six pages of four rank rows, a host tier, and a clock that stands."""

    def __init__(self) -> None:
        layout = build_layout(
            [ModuleShape("a", "a", 16, (16,))], model="tiny", dtype="float32", page_rows=4, tp_rank=0, tp_size=1
        )
        self.host = HostTier(layout, 1 << 20)
        self.residents = ArenaResidents(Arena(layout, 4 * PAGES, CPU))
        self.now = 0.0
        self.staging = Staging(self.residents, lambda: self.host, clock=lambda: self.now)

    def prepare(self, lora_id: int, pages: int, value: float | None = None) -> int:
        """Into the host tier, every element `value`; the generation."""
        entry = self.host.create(lora_id, "", [4 * pages])
        (target,) = self.host.targets(entry)
        assert target is not None
        target.fill_(float(lora_id) if value is None else value)
        self.host.commit(entry)
        return entry.generation

    def activate(self, lora_id: int, pages: int) -> None:
        generation = self.prepare(lora_id, pages)
        with self.host.reading(lora_id) as entry:
            assert entry is not None
            pages = self.residents.reserve(lora_id, entry.pages, generation)
            self.residents.arena.write(pages, self.host.targets(entry))

    def free(self) -> int:
        return self.residents.arena.free_pages()[0]

    def holds(self, pages: Sequence[Sequence[int]], value: float) -> bool:
        return bool((self.residents.arena.group_pages(0)[list(pages[0])] == value).all())


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_is_staged_is_taken_without_a_copy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = bench.prepare(7, 2)
    assert bench.staging.stage(7)
    assert bench.residents.staged() == [7]
    assert not bench.residents.is_current(7, generation), "it is not active"
    bench.residents.check_integrity(active=())
    monkeypatch.setattr(bench.residents.arena, "write", None)
    assert bench.residents.is_staged(7, generation)
    pages = bench.residents.take_staged(7)
    assert bench.holds(pages, 7.0)
    assert bench.residents.is_current(7, generation)
    bench.residents.check_integrity(active=(7,))
    assert not bench.staging.stage(7), "it is active"


def test_who_is_not_in_the_host_tier_or_finds_no_room_is_not_staged(bench: Bench) -> None:
    assert not bench.staging.stage(7)
    bench.activate(1, PAGES)
    bench.prepare(2, 1)
    # The engine stands: nobody would make room, and nothing is waited for.
    assert not bench.staging.stage(2)
    assert bench.residents.staged() == []


def test_the_engine_makes_room_in_its_next_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "GRANT_S", 60.0)
    bench.activate(1, 4)
    bench.activate(2, 2)
    bench.prepare(3, 3)
    bench.staging.step(lambda lora_id, needed: pytest.fail("nobody waits"))
    asked: list[tuple[int, tuple[int, ...]]] = []

    def make_room(lora_id: int, needed: Sequence[int]) -> bool:
        asked.append((lora_id, tuple(needed)))
        bench.residents.release(1)
        return True

    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(bench.staging.stage(3)))
    thread.start()
    while thread.is_alive():
        bench.staging.step(make_room)
        thread.join(1e-3)
    assert (results, asked) == ([True], [(3, (3,))])
    assert bench.holds(bench.residents.take_staged(3), 3.0)
    bench.residents.check_integrity(active=(2, 3))


def test_where_all_are_in_use_it_is_copied_in_the_step_as_ever(bench: Bench) -> None:
    bench.activate(1, PAGES)
    bench.prepare(2, 1)
    bench.staging.step(lambda lora_id, needed: False)
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(bench.staging.stage(2)))
    thread.start()
    while thread.is_alive():
        bench.staging.step(lambda lora_id, needed: False)
        thread.join(1e-3)
    assert results == [False]
    bench.residents.check_integrity(active=(1,))


def test_an_engine_that_never_comes_back_holds_no_load_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "GRANT_S", 0.001)
    bench.activate(1, PAGES)
    bench.prepare(2, 1)
    bench.staging.step(lambda lora_id, needed: True)
    assert not bench.staging.stage(2)
    bench.staging.step(lambda lora_id, needed: pytest.fail("it waits no more"))


def test_a_replaced_adapter_is_not_taken(bench: Bench) -> None:
    bench.prepare(7, 2)
    assert bench.staging.stage(7)
    generation = bench.prepare(7, 2, value=8.0)
    assert not bench.residents.is_staged(7, generation)
    assert (bench.residents.staged(), bench.free()) == ([], PAGES)
    assert bench.staging.stage(7)
    assert bench.holds(bench.residents.take_staged(7), 8.0)


def test_pages_under_a_copy_are_not_given_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = bench.prepare(7, 2)
    began, go_on = threading.Event(), threading.Event()
    write = bench.residents.arena.write

    def slow(*args: Any) -> None:
        began.set()
        assert go_on.wait(60)
        write(*args)

    monkeypatch.setattr(bench.residents.arena, "write", slow)
    copying = threading.Thread(target=bench.staging.stage, args=(7,))
    copying.start()
    assert began.wait(60)
    freed: list[int] = []
    releasing = threading.Thread(target=lambda: (bench.residents.release(7), freed.append(bench.free())))
    releasing.start()
    releasing.join(0.05)
    assert releasing.is_alive(), "it waits for the copy"
    go_on.set()
    releasing.join(60)
    copying.join(60)
    assert freed == [PAGES]
    assert not bench.residents.is_staged(7, generation)


def test_a_copy_that_fails_leaves_nothing_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = bench.prepare(7, 2)

    def fail(*args: Any) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(bench.residents.arena, "write", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        bench.staging.stage(7)
    assert not bench.residents.is_staged(7, generation)
    assert bench.free() == PAGES


def test_what_nobody_takes_is_known_by_its_age(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.prepare(7, 1)
    assert bench.staging.stage(7)
    assert (bench.residents.staged(10.0), bench.residents.staged()) == ([], [7])
    bench.residents._staged[7].since -= 20.0
    assert bench.residents.staged(10.0) == [7]


def test_on_a_gpu_a_side_stream_copies(bench: Bench) -> None:
    calls: list[str] = []

    def copy_aside(copy: Any) -> None:
        calls.append("aside")
        copy()

    side: Any = SimpleNamespace(copy_aside=copy_aside)
    staging = Staging(bench.residents, lambda: bench.host, side)
    bench.prepare(7, 2)
    assert staging.stage(7)
    assert calls == ["aside"]
    assert bench.holds(bench.residents.take_staged(7), 7.0)
