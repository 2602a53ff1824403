"""Workers' ends of the channel with loads that take as long, and end, as a test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from vllm_loraserve.engine import channel


class FakeWorkers:
    """`count` ranks. `ranks`: adapter -> LoRA rank (default 8); `delays`: (adapter, rank of the worker) -> seconds;
    `fails`: adapter -> list of (reason, transient) used up one by one; an adapter in `hangs` never answers."""

    def __init__(
        self,
        address: str,
        count: int = 1,
        *,
        rank_rows: int | None = None,
        page_rows: int = 8,
        prepared: int | None = None,
    ) -> None:
        self.ranks: dict[int, int] = {}
        self.delays: dict[tuple[int, int], float] = {}
        self.fails: dict[int, list[tuple[str, bool]]] = {}
        self.hangs: set[int] = set()
        self.orders: list[channel.Prepare] = []
        self.ends = [
            channel.WorkerEnd(address, channel.Hello(rank, rank_rows, page_rows, prepared), self._answer(rank))
            for rank in range(count)
        ]

    def _answer(self, rank: int) -> Callable[[channel.Order], None]:
        def on_order(order: channel.Order) -> None:
            if not isinstance(order, channel.Prepare):
                return
            if rank == 0:
                self.orders.append(order)
            if order.adapter in self.hangs:
                return
            threading.Thread(target=self._load, args=(rank, order), daemon=True).start()

        return on_order

    def _load(self, rank: int, order: channel.Prepare) -> None:
        import msgspec
        from vllm.lora.request import LoRARequest

        time.sleep(self.delays.get((order.adapter, rank), 0.0))
        fails = self.fails.get(order.adapter)
        report: channel.Report
        if fails and rank == 0:
            reason, transient = fails.pop(0)
            report = channel.Failed(rank, order.adapter, order.attempt, reason, transient, 503 if transient else 400)
        else:
            path = msgspec.msgpack.decode(order.request, type=LoRARequest).lora_path
            lora_rank = self.ranks.get(order.adapter, 8)
            report = channel.Ready(rank, order.adapter, order.attempt, lora_rank, 0.001, path)
        self.ends[rank].report(report)

    def gone(self, adapter: int) -> None:
        """Every rank has lost the adapter."""
        for rank, end in enumerate(self.ends):
            end.report(channel.Gone(rank, adapter))

    def pin(self, adapter: int, pinned: bool = True) -> None:
        """Every rank has pinned (or unpinned) the adapter."""
        for rank, end in enumerate(self.ends):
            end.report(channel.Pinned(rank, adapter, pinned))

    def close(self) -> None:
        for end in self.ends:
            end.close()


def run_until(scheduler: Any, done: Callable[[], bool], check: Callable[[Any], None], seconds: float = 60) -> list[Any]:
    """Steps until `done`; every output of every request. Fails when it takes longer than `seconds`."""
    from scheduler_harness import step

    outputs: list[Any] = []
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not end in time"
        output, outs = step(scheduler)
        outputs += outs
        check(output)
        if not output.total_num_scheduled_tokens:
            time.sleep(0.001)
    return outputs
