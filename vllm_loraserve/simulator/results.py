"""What a run produced: latencies, throughput, memory and traffic; as a struct, JSON and CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vllm_loraserve.simulator.simulation import Simulation


class Result(msgspec.Struct, kw_only=True):
    """One run. Latencies in seconds; a request that got no first token counts as infinite.

    `ttft` [requests], `tbt` [finished requests with more than one token], `finish` [requests]; `load` is a
    list of (time, load of each server): tokens of running and waiting requests / KV capacity.
    `adapters_per_server`: most copies that a server's host memory ever held at once, those on their way out and
    spilled ones included; `placed_per_server`: most adapters that a placement routed to one server.
    """

    system: str
    workload: str
    servers: int
    offered_rps: float
    requests: int
    finished: int
    aborted: bool
    duration_s: float
    ttft: NDArray[np.float64]
    tbt: NDArray[np.float64]
    finish: NDArray[np.float64]
    tokens_per_s: float
    adapters_per_server: int
    placed_per_server: int
    bytes_moved: int
    fetches: int
    loads: int
    rebalances: int
    busy: list[float]
    load: list[tuple[float, list[float]]] = []

    @classmethod
    def of(cls, sim: Simulation, now: float) -> Result:
        """The result of a simulation that has run."""
        requests = sim.requests
        first = np.array([r.first_token for r in requests])
        finish = np.array([r.finish for r in requests])
        arrival = np.array([r.arrival for r in requests])
        output = np.array([r.output + r.generated for r in requests])
        ttft = np.where(first >= 0.0, first - arrival, np.inf)
        done = (finish >= 0.0) & (output > 1)
        tokens = sum(r.prompt + r.output for r in requests if r.finish >= 0.0)
        return cls(
            system=sim.system.name,
            workload=sim.workload.name,
            servers=len(sim.servers),
            offered_rps=sim.workload.rate,
            requests=len(requests),
            finished=sim.finished,
            aborted=sim.aborted,
            duration_s=now,
            ttft=ttft,
            tbt=(finish[done] - first[done]) / (output[done] - 1),
            finish=np.where(finish >= 0.0, finish - arrival, np.inf),
            tokens_per_s=tokens / max(now, 1e-9),
            adapters_per_server=max(s.peak_host for s in sim.servers),
            placed_per_server=sim.placed_per_server,
            bytes_moved=sim.bytes_moved,
            fetches=sim.fetches,
            loads=sum(s.loads for s in sim.servers),
            rebalances=sim.rebalances,
            busy=[s.busy_s / max(now, 1e-9) for s in sim.servers],
            load=sim.load_samples,
        )

    def ttft_percentile(self, q: float) -> float:
        """Time to first token at percentile `q` (0..100), seconds; inf when too many never got one."""
        return float(np.percentile(self.ttft, q, method="higher")) if len(self.ttft) else 0.0

    def meets(self, ttft_s: float, q: float = 95.0) -> bool:
        """Whether the SLO (percentile `q` of TTFT at most `ttft_s`) holds."""
        return not self.aborted and self.ttft_percentile(q) <= ttft_s

    def summary(self) -> dict[str, float | int | str]:
        """The figures worth a row of a table; percentiles in seconds."""

        def p(values: NDArray[np.float64], q: float) -> float:
            return float(np.percentile(values, q, method="higher")) if len(values) else 0.0

        return {
            "system": self.system,
            "workload": self.workload,
            "servers": self.servers,
            "offered_rps": round(self.offered_rps, 3),
            "requests": self.requests,
            "finished": self.finished,
            "p50_ttft_s": p(self.ttft, 50),
            "p95_ttft_s": p(self.ttft, 95),
            "p99_ttft_s": p(self.ttft, 99),
            "p50_tbt_s": p(self.tbt, 50),
            "p95_tbt_s": p(self.tbt, 95),
            "p95_finish_s": p(self.finish, 95),
            "tokens_per_s": self.tokens_per_s,
            "adapters_per_server": self.adapters_per_server,
            "placed_per_server": self.placed_per_server,
            "bytes_moved": self.bytes_moved,
            "fetches": self.fetches,
            "loads": self.loads,
            "rebalances": self.rebalances,
        }


def write_csv(rows: Iterable[dict[str, float | int | str]], path: str | Path) -> None:
    """One line per row; the columns are those of the first."""
    rows = list(rows)
    with Path(path).open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def write_json(value: object, path: str | Path) -> None:
    """Indented JSON."""
    Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
