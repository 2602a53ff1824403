"""Which adapters can run now, which are on their way, and what to bring in next. Pure: the time is passed in.

An adapter is ready when every rank has said so. Loads are ordered by the oldest request that waits for each adapter; at
most `concurrent_loads` run at a time, and at most `prefetch` adapters are loading or loaded ahead of their turn. A load
that fails for a passing reason is tried again after 0.5, 1, 2, ... seconds; any other failure, and the last of these,
is final for the requests that wait, and forgotten with them.

Workers hold what was loaded for requests until it is activated: it is not evicted meanwhile. What is held is bounded as
what is loaded ahead is, and let go when nobody waits for it any more, or for the good of older requests' adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from vllm_loraserve.engine import channel

FIRST_BACKOFF_S = 0.5
_PRUNE_ABOVE = 64
"""Adapters known, beyond twice those that were needed last, before those that nobody needs are looked for."""
LOAD_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@dataclass(slots=True)
class Adapter:
    """What the scheduler knows about one adapter id."""

    path: str
    state: Literal["wanted", "loading", "ready", "failed"] = "wanted"
    lora_rank: int = 0
    """In rank rows; 0 until it was ready once."""
    attempt: int = 0
    ready_on: set[int] = field(default_factory=set)
    """Ranks of workers that said Ready."""
    started: float = 0.0
    not_before: float = 0.0
    retries: int = 0
    reason: str = ""
    status: int = 400


@dataclass(slots=True)
class LoadCounters:
    """Totals since start."""

    loads: int = 0
    load_seconds: float = 0.0
    failures: int = 0
    retries: int = 0
    timeouts: int = 0
    """Loads that hung."""
    stalls: int = 0
    stall_seconds: float = 0.0
    load_histogram: list[int] = field(default_factory=lambda: [0] * (len(LOAD_BUCKETS_S) + 1))


class Readiness:
    """State of every adapter that was asked for. `world_size`: workers that must be ready; 0: no channel, all count
    as ready and vLLM loads in the step."""

    def __init__(
        self, world_size: int, *, prefetch: int, concurrent_loads: int, load_timeout_s: float, load_retries: int
    ) -> None:
        self.world_size = world_size
        self.prefetch, self.concurrent_loads = prefetch, concurrent_loads
        self.load_timeout_s, self.load_retries = load_timeout_s, load_retries
        self.counters = LoadCounters()
        self._adapters: dict[int, Adapter] = {}
        self._loading: set[int] = set()
        self._ready: set[int] = set()
        self._failed: set[int] = set()
        self._retrying: set[int] = set()
        self.pinned: set[int] = set()
        """Adapters that keep their place in the arena while nobody uses them."""
        self.rank_limit: int | None = None
        """Largest rank that fits the arena; None: any."""
        self._attempts = 0
        self.host_rows: int | None = None
        """Rank rows that the workers' host tiers hold; None: any. What is loaded ahead beyond them would push out what
        was loaded and has not run."""
        self.rows_of: Callable[[int], int] = lambda lora_rank: lora_rank
        """Rank rows that an adapter of a rank takes."""
        self._held: set[int] = set()
        """Adapters that the workers hold; they let go by themselves of what they activate."""
        self._owed: set[int] = set()
        """Adapters that the workers were told to hold, and not yet to release."""
        self._give_way: list[int] = []
        self._prune_at = _PRUNE_ABOVE

    def is_ready(self, adapter: int, path: str) -> bool:
        """Whether a request for this content can be scheduled now."""
        if not self.world_size:
            return True
        entry = self._adapters.get(adapter)
        return entry is not None and entry.state == "ready" and entry.path == path

    def rank_of(self, adapter: int) -> int:
        """Its rank in rank rows; 0 when it was never ready."""
        entry = self._adapters.get(adapter)
        return entry.lora_rank if entry is not None else 0

    def forget_failure(self, adapter: int) -> None:
        """Its waiting requests have been ended: the next request tries anew."""
        if adapter in self._failed:
            self._failed.discard(adapter)
            del self._adapters[adapter]

    # ---- what workers hold ----

    def hold(self, adapter: int) -> bool:
        """Whether the workers must be told to hold an adapter that is ready, since requests wait for it now."""
        if adapter in self._held or adapter in self._give_way or adapter not in self._ready:
            return False
        if len(self._held) >= self.prefetch:
            return False
        if not self._host_takes(self._held_rows() + self.rows_of(self.rank_of(adapter))):
            return False
        self._held.add(adapter)
        self._owed.add(adapter)
        return True

    def is_held(self, adapter: int) -> bool:
        return adapter in self._held

    def activated(self, adapters: Collection[int]) -> None:
        """These run: the arena has them."""
        self._held.difference_update(adapters)

    def releases(self, needed: Callable[[int, str], bool]) -> list[int]:
        """Adapters that the workers may evict again. needed: whether requests wait for or run with (adapter, path).

        Forgets what nobody needs and no worker has, too.
        """
        given, self._give_way = self._give_way, []
        for adapter in self._owed:
            entry = self._adapters.get(adapter)
            if entry is None or not needed(adapter, entry.path):
                given.append(adapter)
        self._owed.difference_update(given)
        self._held.difference_update(given)
        if len(self._adapters) > self._prune_at:
            for adapter in [a for a, e in self._adapters.items() if e.state == "wanted" and not needed(a, e.path)]:
                del self._adapters[adapter]
                self._retrying.discard(adapter)
            self._prune_at = _PRUNE_ABOVE + 2 * len(self._adapters)
        return given

    def _held_rows(self) -> int:
        largest = self._largest_rank()
        return sum(self.rows_of(self.rank_of(adapter) or largest) for adapter in self._held)

    def _largest_rank(self) -> int:
        """What an adapter that was never loaded is taken for."""
        return max((self._adapters[adapter].lora_rank for adapter in self._ready | self._loading), default=0)

    def _make_way(self, adapter: int, rows: int, ahead: set[int]) -> None:
        """What is held and not among `ahead`, those before `adapter` in the queue, goes as far as `rows` more rank rows
        for it need that."""
        for held in self._held - ahead - self._loading - {adapter}:
            if len(self._held) < self.prefetch and self._host_takes(self._held_rows() + rows):
                return
            self._held.discard(held)
            self._owed.discard(held)
            self._give_way.append(held)

    # ---- loads ----

    def ready(self) -> Iterator[tuple[int, str]]:
        """(adapter, path) of what is ready."""
        return ((adapter, self._adapters[adapter].path) for adapter in self._ready)

    def failed(self) -> list[tuple[int, str, int, str]]:
        """(adapter, path, HTTP status, reason) of loads that ended for good and were not forgotten."""
        entries = ((adapter, self._adapters[adapter]) for adapter in self._failed)
        return [(adapter, entry.path, entry.status, entry.reason) for adapter, entry in entries]

    @property
    def can_start(self) -> bool:
        """Whether one more load may run now."""
        return bool(self.world_size) and len(self._loading) < self.concurrent_loads

    @property
    def retrying(self) -> int:
        """Adapters whose last load failed and that will be tried again."""
        return len(self._retrying)

    @property
    def loading(self) -> int:
        """Adapters being loaded now."""
        return len(self._loading)

    def next_loads(self, wanted: Iterable[tuple[int, str]], running: set[int], now: float) -> list[tuple[int, int]]:
        """(adapter, attempt) to start now. `wanted`: (adapter, path) in queue order, oldest first; `running`: adapters
        of running requests, whose content must not change under them."""
        starts: list[tuple[int, int]] = []
        if not self.world_size:
            return starts
        ahead: set[int] = set()
        rows = 0
        again: list[tuple[int, Adapter]] = []
        largest = self._largest_rank()
        for adapter, path in wanted:
            entry = self._adapters.get(adapter)
            if entry is None:
                entry = self._adapters[adapter] = Adapter(path)
            elif entry.path != path and entry.state != "loading" and adapter not in running:
                self._ready.discard(adapter)
                self._failed.discard(adapter)
                self._retrying.discard(adapter)
                entry.path, entry.state, entry.retries, entry.not_before = path, "wanted", 0, 0.0
                entry.ready_on.clear()
            if entry.state == "wanted" and entry.path == path:
                if entry.retries or now < entry.not_before:
                    # Behind those that were never tried: a source that is away holds up nobody else.
                    again.append((adapter, entry))
                    continue
                if len(self._loading) >= self.concurrent_loads:
                    break
                need = self.rows_of(entry.lora_rank or largest)
                if ahead and not self._host_takes(rows + need):
                    break
                self._make_way(adapter, need, ahead)
                starts.append((adapter, self._begin(adapter, entry, now)))
            if adapter not in running and entry.state in ("loading", "ready"):
                ahead.add(adapter)
                rows += self.rows_of(entry.lora_rank or largest)
            if len(ahead) >= self.prefetch:
                break
        for adapter, entry in again:
            if len(ahead) >= self.prefetch or len(self._loading) >= self.concurrent_loads:
                break
            if now < entry.not_before:
                continue
            need = self.rows_of(entry.lora_rank or largest)
            if ahead and not self._host_takes(rows + need):
                break
            self._make_way(adapter, need, ahead)
            starts.append((adapter, self._begin(adapter, entry, now)))
            ahead.add(adapter)
            rows += need
        return starts

    def _host_takes(self, rows: int) -> bool:
        return self.host_rows is None or rows <= self.host_rows

    def _begin(self, adapter: int, entry: Adapter, now: float) -> int:
        self._attempts += 1
        entry.state, entry.attempt, entry.started = "loading", self._attempts, now
        entry.ready_on.clear()
        self._loading.add(adapter)
        self._held.add(adapter)
        self._owed.add(adapter)
        if adapter in self._give_way:
            self._give_way.remove(adapter)
        return entry.attempt

    def on_report(self, report: channel.Report, now: float) -> None:
        """A worker's message."""
        if isinstance(report, channel.Ready):
            self._on_ready(report)
        elif isinstance(report, channel.Failed):
            entry = self._adapters.get(report.adapter)
            if entry is not None and entry.state == "loading" and report.attempt == entry.attempt:
                if report.no_room and self._held - {report.adapter}:
                    self._wait_for_room(report.adapter, entry, now)
                else:
                    self._fail(report.adapter, entry, report.reason, report.transient, report.status, now)
        elif isinstance(report, channel.Pinned):
            (self.pinned.add if report.pinned else self.pinned.discard)(report.adapter)
        elif isinstance(report, channel.Gone):
            self.pinned.discard(report.adapter)
            entry = self._adapters.get(report.adapter)
            if entry is not None:
                had = report.rank in entry.ready_on
                entry.ready_on.discard(report.rank)
                if entry.state == "ready" or (entry.state == "loading" and had):
                    # Another rank may still load: it is ordered again on all of them.
                    self._ready.discard(report.adapter)
                    self._loading.discard(report.adapter)
                    self._retrying.discard(report.adapter)
                    self._held.discard(report.adapter)
                    entry.state, entry.retries, entry.not_before = "wanted", 0, 0.0
        elif isinstance(report, channel.Stalled):
            self.counters.stalls += 1
            self.counters.stall_seconds += report.seconds

    def _on_ready(self, report: channel.Ready) -> None:
        entry = self._adapters.get(report.adapter)
        if entry is None:
            # Brought in by `add_lora`, before any request.
            entry = self._adapters[report.adapter] = Adapter(report.path, attempt=report.attempt)
        if report.path and report.path != entry.path:
            if entry.state == "loading" or entry.ready_on:
                return
            entry.path = report.path
        if report.attempt not in (0, entry.attempt):
            # Of a load that was given up: what it brought was dropped, or is not what is waited for now.
            return
        entry.ready_on.add(report.rank)
        entry.lora_rank = max(entry.lora_rank, report.lora_rank)
        if len(entry.ready_on) >= self.world_size and entry.state != "ready":
            self._loading.discard(report.adapter)
            self._failed.discard(report.adapter)
            self._retrying.discard(report.adapter)
            if self.rank_limit is not None and entry.lora_rank > self.rank_limit:
                entry.state, entry.status = "failed", 400
                entry.reason = (
                    f"LoRA adapter at {entry.path} of rank {entry.lora_rank} does not fit the arena, which holds "
                    f"{self.rank_limit} rank rows"
                )
                self._failed.add(report.adapter)
                return
            entry.state, entry.retries = "ready", 0
            self._ready.add(report.adapter)
            counters = self.counters
            counters.loads += 1
            counters.load_seconds += report.seconds
            counters.load_histogram[sum(report.seconds > bound for bound in LOAD_BUCKETS_S)] += 1

    def expire(self, now: float) -> None:
        """Loads that take too long count as failed."""
        for adapter in [a for a in self._loading if now - self._adapters[a].started > self.load_timeout_s]:
            entry = self._adapters[adapter]
            self.counters.timeouts += 1
            reason = f"LoRA adapter at {entry.path} was not loaded within {self.load_timeout_s:g} s"
            self._fail(adapter, entry, reason, True, 503, now)

    def _wait_for_room(self, adapter: int, entry: Adapter, now: float) -> None:
        """The host tier is full of what is held: that will be activated, so this is no failure of the source."""
        self._loading.discard(adapter)
        self._held.discard(adapter)
        entry.state, entry.not_before = "wanted", now + FIRST_BACKOFF_S
        self._retrying.add(adapter)

    def _fail(self, adapter: int, entry: Adapter, reason: str, transient: bool, status: int, now: float) -> None:
        self._loading.discard(adapter)
        self._held.discard(adapter)
        entry.reason, entry.status = reason, status
        if transient and entry.retries < self.load_retries:
            entry.state = "wanted"
            entry.not_before = now + FIRST_BACKOFF_S * 2**entry.retries
            entry.retries += 1
            self._retrying.add(adapter)
            self.counters.retries += 1
        else:
            self._retrying.discard(adapter)
            entry.state = "failed"
            self._failed.add(adapter)
            self.counters.failures += 1
