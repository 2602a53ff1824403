"""Workers' ends of the channel, with loads that end when a test says, and a scheduler's end that can wait for them.

Nothing here depends on how fast a machine is: a load is answered as soon as its order is heard, or when the test
releases it; `SettlingEnd.settle` waits until every answer that is due has come, so that a test decides what the
scheduler knows in which step; `Clock` is the scheduler's time, which a test moves.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import msgspec
from vllm.lora.request import LoRARequest

from vllm_loraserve.engine import channel

ANSWERS_WITHIN_S = 120.0
"""Real time, for a thread of this process to be run: long enough for any machine, and only ever used up by a defect."""


class Clock:
    """In place of the module `time`: stands still but for a microsecond at each look, and moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.now

    time = monotonic

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeWorkers:
    """`count` ranks. `ranks`: adapter -> LoRA rank (default 8); `fails`: adapter -> list of (reason, transient) used up
    one by one. Every load is answered at once, but for those under way. `host_rows`: beyond so many the oldest is gone
    that the scheduler does not hold."""

    def __init__(
        self,
        address: str,
        count: int = 1,
        *,
        rank_rows: int | None = None,
        page_rows: int = 8,
        prepared: int | None = None,
        host_rows: int | None = None,
    ) -> None:
        self.ranks: dict[int, int] = {}
        self.fails: dict[int, list[tuple[str, bool]]] = {}
        self.full: set[int] = set()
        """Adapters for which the host tier has no room."""
        self.orders: list[channel.Prepare] = []
        """As rank 0 heard them."""
        self.in_use: Callable[[], set[int]] = set
        """Adapters that a host tier of `host_rows` need not hold: they are in the arena."""
        self._host_rows = host_rows
        self._in_host: dict[int, list[int]] = {}
        """Rank -> adapters, the oldest first."""
        self._lock = threading.Lock()
        self._under_way: set[tuple[int, int]] = set()
        self.held: list[set[int]] = [set() for _ in range(count)]
        """Adapters that each rank was told to hold, and has not activated or released since."""
        self._unanswered: list[tuple[int, channel.Prepare]] = []
        self.heard: Counter[int] = Counter()
        """Rank -> orders that were answered or are held."""
        self.reported: Counter[int] = Counter()
        """Rank -> reports sent, without the Hello."""
        self.ends = [
            channel.WorkerEnd(
                address, channel.Hello(rank, rank_rows, page_rows, prepared, host_rows), self._listen(rank)
            )
            for rank in range(count)
        ]

    def _listen(self, rank: int) -> Callable[[channel.Order], None]:
        def on_order(order: channel.Order) -> None:
            with self._lock:
                if isinstance(order, channel.Release):
                    self.held[rank].discard(order.adapter)
                    self.heard[rank] += 1
                    return
                self.held[rank].add(order.adapter)
                if isinstance(order, channel.Hold):
                    self.heard[rank] += 1
                    return
                assert isinstance(order, channel.Prepare)
                if rank == 0:
                    self.orders.append(order)
                if (order.adapter, rank) in self._under_way:
                    self._unanswered.append((rank, order))
                else:
                    self._answer(rank, order)
                self.heard[rank] += 1

        return on_order

    def _answer(self, rank: int, order: channel.Prepare) -> None:
        fails = self.fails.get(order.adapter)
        report: channel.Report
        if order.adapter in self.full:
            report = channel.Failed(rank, order.adapter, order.attempt, "full", True, 503, no_room=True)
        elif fails and rank == 0:
            reason, transient = fails.pop(0)
            report = channel.Failed(rank, order.adapter, order.attempt, reason, transient, 503 if transient else 400)
        else:
            path = msgspec.msgpack.decode(order.request, type=LoRARequest).lora_path
            report = channel.Ready(rank, order.adapter, order.attempt, self.ranks.get(order.adapter, 8), 0.001, path)
        if isinstance(report, channel.Failed):
            self.held[rank].discard(order.adapter)
        self._report(report)
        if isinstance(report, channel.Ready) and self._host_rows is not None:
            self._evict(rank, order.adapter, self._host_rows)

    def _evict(self, rank: int, newest: int, host_rows: int) -> None:
        held = self._in_host.setdefault(rank, [])
        held[:] = [adapter for adapter in held if adapter != newest] + [newest]
        idle = [adapter for adapter in held if adapter not in self.held[rank]]
        while idle and sum(self.ranks.get(adapter, 8) for adapter in held) > host_rows:
            gone = idle.pop(0)
            held.remove(gone)
            if gone not in self.in_use():
                self._report(channel.Gone(rank, gone))

    def _report(self, report: channel.Report) -> None:
        self.reported[report.rank] += 1
        self.ends[report.rank].report(report)

    def hold(self, adapter: int, rank: int = 0) -> None:
        """From now on its loads on this rank are under way until they are released."""
        with self._lock:
            self._under_way.add((adapter, rank))

    def release(self, adapter: int, rank: int = 0) -> None:
        """Its loads on this rank end, those under way and those to come."""
        with self._lock:
            self._under_way.discard((adapter, rank))
            due = [(r, order) for r, order in self._unanswered if (order.adapter, r) == (adapter, rank)]
            self._unanswered = [entry for entry in self._unanswered if entry not in due]
            for r, order in due:
                self._answer(r, order)

    def activate(self, adapters: Iterable[int]) -> None:
        """Every rank has these in its arena, as after a step that ran them: it holds them no longer."""
        with self._lock:
            for held in self.held:
                held.difference_update(adapters)

    def bring_in(self, adapter: int, path: str = "") -> None:
        """Every rank has the adapter without having been asked for it, as after `add_lora`."""
        lora_rank = self.ranks.get(adapter, 8)
        self._all(lambda rank: channel.Ready(rank, adapter, 0, lora_rank, 0.001, path or f"/adapters/{adapter}"))

    def gone(self, adapter: int) -> None:
        """Every rank has lost the adapter."""
        self._all(lambda rank: channel.Gone(rank, adapter))

    def pin(self, adapter: int, pinned: bool = True) -> None:
        """Every rank has pinned (or unpinned) the adapter."""
        self._all(lambda rank: channel.Pinned(rank, adapter, pinned))

    def _all(self, report: Callable[[int], channel.Report]) -> None:
        with self._lock:
            for rank in range(len(self.ends)):
                self._report(report(rank))

    def counts(self) -> tuple[Counter[int], Counter[int]]:
        """(orders heard, reports sent), of one moment."""
        with self._lock:
            return self.heard.copy(), self.reported.copy()

    def close(self) -> None:
        for end in self.ends:
            end.close()


class SettlingEnd(channel.SchedulerEnd):
    """The scheduler's end of a channel to `workers`, which knows what is still on its way."""

    def __init__(self, workers: FakeWorkers, address: str) -> None:
        super().__init__(address)
        self.workers = workers
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def send(self, order: channel.Order) -> None:
        super().send(order)
        self._sent.update(self._peers.keys())

    def _receive(self) -> Iterator[channel.Report]:
        for report in super()._receive():
            if not isinstance(report, channel.Hello):
                self._received[report.rank] += 1
            yield report

    def settle(self) -> None:
        """Waits until every order was heard and answered (unless its load is held) and every report has come; the next
        step takes them in."""
        deadline = time.monotonic() + ANSWERS_WITHIN_S
        while True:
            heard, reported = self.workers.counts()
            if heard == self._sent and reported == self._received:
                return
            assert time.monotonic() < deadline, f"sent {self._sent}, heard {heard}, reported {reported}"
            self._socket.poll(1)
            self._pending.extend(self._receive())
