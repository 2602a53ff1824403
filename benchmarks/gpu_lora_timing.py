"""Timing for the GPU kernel benchmark: CUDA graphs, interleaved repeats, and what the device can do at best.

On a CPU the same functions run the work once each and say so: their times mean nothing then.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

Work = Callable[[], None]


class Timer:
    """Captures work in CUDA graphs and times replays; on a CPU it merely runs it."""

    def __init__(self, device: torch.device, *, repeats: int = 5, min_seconds: float = 0.02) -> None:
        self.device, self.repeats, self.min_seconds = device, repeats, min_seconds
        self.measures = device.type == "cuda"

    def compare(self, works: Mapping[str, Work], divide_by: int) -> dict[str, float]:
        """Median microseconds of each work, divided by `divide_by`; repeats of all works alternate."""
        replays = {name: self._prepare(work) for name, work in works.items()}
        counts = {name: self._replays_needed(replay) for name, replay in replays.items()}
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.repeats if self.measures else 1):
            for name, replay in replays.items():
                times[name].append(self._seconds(replay, counts[name]) / counts[name])
        return {name: statistics.median(found) / divide_by * 1e6 for name, found in times.items()}

    def _prepare(self, work: Work) -> Work:
        if not self.measures:
            return work
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def _replays_needed(self, replay: Work) -> int:
        if not self.measures:
            return 1
        once = self._seconds(replay, 1)
        return max(1, int(self.min_seconds / max(once, 1e-7)))

    def _seconds(self, replay: Work, count: int) -> float:
        if not self.measures:
            began = time.perf_counter()
            replay()
            return time.perf_counter() - began
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@triton.jit
def _leave_at_once(flag_ptr, out_ptr):
    flag = tl.load(flag_ptr + tl.program_id(0) % 32)
    if flag == -1:
        return
    tl.store(out_ptr + tl.program_id(0), flag)


@triton.jit
def _nothing(out_ptr):
    pass


def device_constants(timer: Timer, *, tiny: bool) -> dict[str, Any]:
    """Copy bandwidth of device memory and of the L2 cache (read plus write), rate at which thread blocks that leave at
    once are retired, and the cost of one graph node."""
    device = timer.device
    big = torch.empty((1 << 10) if tiny else (1 << 29), dtype=torch.uint8, device=device)
    small = torch.empty((1 << 10) if tiny else (10 << 20), dtype=torch.uint8, device=device)
    big_out, small_out = torch.empty_like(big), torch.empty_like(small)
    flags = torch.full((32,), -1, dtype=torch.int32, device=device)
    out = torch.zeros(32, dtype=torch.int32, device=device)
    grids = (4, 8) if tiny else (100_000, 1_000_000)
    nodes = 4 if tiny else 1000
    works: dict[str, Work] = {
        "copy": lambda: _keep(big_out.copy_(big)),
        "l2": lambda: _keep(small_out.copy_(small)),
        "nodes": lambda: [_nothing[(1,)](out) for _ in range(nodes)] and None,
    }
    for grid in grids:
        works[f"exits {grid}"] = lambda grid=grid: _keep(_leave_at_once[(grid,)](flags, out))
    times = timer.compare(works, 1)
    extra = times[f"exits {grids[1]}"] - times[f"exits {grids[0]}"]
    return {
        "copy_bytes_per_second": 2 * big.numel() / times["copy"] * 1e6,
        "l2_bytes_per_second": 2 * small.numel() / times["l2"] * 1e6,
        "exiting_blocks_per_second": (grids[1] - grids[0]) / extra * 1e6 if extra > 0 else None,
        "graph_node_us": times["nodes"] / nodes,
    }


def _keep(_: Any) -> None:
    """A lambda that returns nothing."""
