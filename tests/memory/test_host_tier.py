"""memory/host_tier.py: exact accounting, guarded readers, eviction; a stateful test against a plain dict."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_loraserve.adapters.errors import AdapterError
from vllm_loraserve.adapters.layout import Layout, ModuleShape, build_layout
from vllm_loraserve.memory.host_tier import HostEntry, HostTier, HostTierFullError
from vllm_loraserve.memory.slab import HostSlab


def layout() -> Layout:
    return build_layout(
        [ModuleShape("m.0.qkv", "qkv", 16, (16, 8, 8)), ModuleShape("m.0.down", "down", 24, (16,))],
        model="tiny",
        dtype="float32",
        page_rows=4,
        tp_rank=0,
        tp_size=1,
    )


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def tier(budget: int, **options: object) -> HostTier:
    return HostTier(layout(), budget, slab=HostSlab(budget, huge=False, pinned=False), **options)  # type: ignore[arg-type]


def put(host: HostTier, key: int, ranks: Sequence[int], value: float) -> HostEntry:
    entry = host.create(key, f"digest {value}", ranks)
    for target in host.targets(entry):
        if target is not None:
            target.fill_(value)
    return host.commit(entry)


R4, R8, Q_ONLY = (4, 4, 4, 4), (8, 8, 8, 8), (3, 0, 0, 0)


def test_an_adapter_costs_what_it_targets() -> None:
    host = tier(1 << 20)
    both, one = put(host, 1, R8, 1), put(host, 2, Q_ONLY, 2)
    assert (both.pages, one.pages) == ((2, 2), (1, 0))
    assert host.targets(one)[1] is None
    assert both.size == host.layout.size_bytes((2, 2))
    assert len(both.checksums) == 4
    assert both.rank == 8


def test_a_replacement_shows_only_when_it_is_complete() -> None:
    host = tier(1 << 20)
    put(host, 1, R4, 1)
    entry = host.create(1, "new", R8)
    assert host.get(1) is not None
    assert host.get(1).digest == "digest 1"  # type: ignore[union-attr]
    host.discard(entry)
    host.check_integrity()
    host.pin(1)
    new = put(host, 1, R8, 2)
    assert host.get(1) is new
    assert new.pinned, "it is the adapter that was pinned, not its content"
    assert new.generation > entry.generation
    host.check_integrity()


def test_a_reader_keeps_the_bytes() -> None:
    size = tier(1 << 20).layout.size_bytes((1, 1))
    host = tier(-(-size // 4096) * 4096 * 2)
    put(host, 1, R4, 1)
    with host.reading(1) as entry:
        assert entry is not None
        put(host, 2, R4, 2)
        host.pin(2)
        with pytest.raises(HostTierFullError, match="host_gib"):
            host.create(3, "x", R8)
        assert host.remove(1)
        assert host.get(1) is None
        view = host.targets(entry)[0]
        assert view is not None
        assert (view == 1).all(), "removed while it was read: its bytes stay until the reader is done"
        host.check_integrity()
    host.check_integrity()
    put(host, 3, R4, 3)
    assert host.get(2) is not None
    with host.reading(99) as missing:
        assert missing is None


def test_least_wanted_goes_first_and_pinned_stays() -> None:
    clock = Clock()
    size = tier(1 << 20).layout.size_bytes((1, 1))
    host = tier(-(-size // 4096) * 4096 * 3, clock=clock)
    for key in (1, 2, 3):
        put(host, key, R4, key)
    for _ in range(5):
        host.touch(2)
    host.touch(1)
    host.pin(3)
    put(host, 4, R4, 4)
    assert {key for key in range(1, 5) if key in host} == {2, 3, 4}
    host.may_evict = lambda key: key != 4
    put(host, 5, R4, 5)
    assert {key for key in range(1, 6) if key in host} == {3, 4, 5}
    assert host.pin(3, False)
    assert not host.pin(77)


def test_what_can_never_fit_is_refused_for_good_and_evicts_nobody() -> None:
    host = tier(4096 * 3)
    for key in (1, 2, 3):
        put(host, key, R4, key)
    with pytest.raises(AdapterError, match="host_gib") as caught:
        host.create(4, "x", (400,) * 4)
    assert caught.value.kind == "too_large"
    assert len(host) == 3


def test_what_cannot_fit_now_evicts_nobody() -> None:
    host = tier(4096 * 5)
    for key in range(5):
        put(host, key, R4, key)
    host.pin(2)
    with pytest.raises(HostTierFullError):
        host.create(9, "x", (24,) * 4)  # three extents' worth; there are two on either side of the pinned one
    assert len(host) == 5
    host.check_integrity()


def test_only_neighbours_go_for_a_large_adapter() -> None:
    """The order of eviction alone (0, 2, 4, then 1) would have emptied the tier for the same room."""
    clock = Clock()
    host = tier(4096 * 5, clock=clock)
    for key in range(5):
        put(host, key, R4, key)
    for key, uses in ((1, 1), (3, 3)):
        for _ in range(uses):
            host.touch(key)
    put(host, 9, (16,) * 4, 9)
    assert {key for key in range(5) if key in host} == {2, 3, 4}


def test_what_is_kept_is_not_evicted_though_it_came_later() -> None:
    host = tier(4096 * 2, max_adapters=2)
    with host.keeping(1), host.keeping(1):
        for key in (1, 2, 3, 4):
            put(host, key, R4, key)
        assert {key for key in range(5) if key in host} == {1, 4}
    put(host, 5, (16,) * 4, 5)
    assert {key for key in range(6) if key in host} == {5}


def test_what_is_held_is_not_evicted_until_it_is_let_go() -> None:
    host = tier(2 * 4096)
    host.hold(1)
    put(host, 1, R4, 1)
    put(host, 2, R4, 2)
    put(host, 3, R4, 3)
    assert [entry.key for entry in host.entries()] == [1, 3], "the oldest, and the least wanted"
    host.hold(3)
    with pytest.raises(HostTierFullError):
        put(host, 4, R4, 4)
    host.hold(1, False)
    host.hold(3, False)
    put(host, 4, R4, 4)
    put(host, 5, R4, 5)
    assert {entry.key for entry in host.entries()} == {4, 5}
    host.check_integrity()


def test_a_count_limit() -> None:
    host = tier(1 << 20, max_adapters=2)
    for key in (1, 2, 3):
        put(host, key, R4, key)
    assert len(host) == 2
    assert 3 in host


def test_corruption_is_seen() -> None:
    host = tier(1 << 20)
    entry = put(host, 1, R8, 1)
    assert host.current_checksums(entry) == entry.checksums
    host.slab.view(entry.offset + 5, 1)[0] ^= 1
    now = host.current_checksums(entry)
    assert now[0] != entry.checksums[0]
    assert now[1:] == entry.checksums[1:]


def test_threads_prepare_at_once() -> None:
    host = tier(1 << 18, max_adapters=6)
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for round_ in range(30):
                key = first + round_ % 4
                put(host, key, R8 if round_ % 2 else R4, key)
                with host.reading(key) as entry:
                    if entry is not None:
                        view = host.targets(entry)[0]
                        assert view is not None
                        assert (view == key).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(10 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    host.check_integrity()


class TierMachine(RuleBasedStateMachine):
    """Adapters come, go, are read and pinned; every byte is accounted for and every entry holds its value."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.host = tier(4096 * 9, max_adapters=5, clock=self.clock)
        self.value: dict[int, float] = {}
        self.readers: list[tuple[object, HostEntry, float]] = []
        self.count = 0.0

    @rule(key=st.integers(0, 7), ranks=st.sampled_from([R4, R8, Q_ONLY, (0, 0, 0, 9), (16, 0, 0, 16), (99,) * 4]))
    def add(self, key: int, ranks: tuple[int, ...]) -> None:
        self.count += 1
        self.clock.now += 1
        before = self.host.entries()
        try:
            put(self.host, key, ranks, self.count)
        except (HostTierFullError, AdapterError):
            assert self.host.entries() == before, "what finds no room takes nobody's"
            return
        self.value[key] = self.count

    @rule(key=st.integers(0, 7), ranks=st.sampled_from([R4, R8]))
    def fail_to_convert(self, key: int, ranks: tuple[int, ...]) -> None:
        before = self.host.entries()
        try:
            self.host.discard(self.host.create(key, "never", ranks))
        except HostTierFullError:
            assert self.host.entries() == before

    @rule(key=st.integers(0, 7))
    def remove(self, key: int) -> None:
        held = key in self.host
        assert self.host.remove(key) == held
        assert key not in self.host

    @rule(key=st.integers(0, 7))
    def read(self, key: int) -> None:
        context = self.host.reading(key)
        entry = context.__enter__()
        if entry is None:
            context.__exit__(None, None, None)
        else:
            self.readers.append((context, entry, self.value[key]))

    @rule(which=st.integers(0, 9))
    def stop_reading(self, which: int) -> None:
        if self.readers:
            context, _, _ = self.readers.pop(which % len(self.readers))
            context.__exit__(None, None, None)  # type: ignore[attr-defined]

    @rule(key=st.integers(0, 7), pinned=st.booleans())
    def pin(self, key: int, pinned: bool) -> None:
        self.host.pin(key, pinned)

    @rule(key=st.integers(0, 7))
    def use(self, key: int) -> None:
        self.host.touch(key)

    @invariant()
    def accounts_agree(self) -> None:
        self.host.check_integrity()
        for entry in self.host.entries():
            for target in self.host.targets(entry):
                assert target is None or bool((target == self.value[entry.key]).all())  # type: ignore[index]
            assert self.host.current_checksums(entry) == entry.checksums
        for _, entry, value in self.readers:
            for target in self.host.targets(entry):
                assert target is None or bool((target == value).all()), "bytes changed under a reader"


TierMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestTierMachine = TierMachine.TestCase


def test_targets_are_views() -> None:
    host = tier(1 << 20)
    entry = host.create(1, "d", R4)
    first = host.targets(entry)[0]
    assert first is not None
    first[0, 0] = 7
    again = host.targets(entry)[0]
    assert again is not None
    assert again[0, 0] == 7
    assert first.dtype == torch.float32
    host.discard(entry)
