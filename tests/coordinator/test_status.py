"""What `vllm-loraserve status` shows."""

from __future__ import annotations

import io
import time

import pytest
from coordinator_bench import record
from rich.console import Console

from vllm_loraserve.cluster.operating_points import StepCost
from vllm_loraserve.coordinator.messages import (
    AdapterDemand,
    AdapterRoutes,
    Capacity,
    InstanceEntry,
    Load,
    Prediction,
    Residency,
    Route,
    RoutingTable,
    Status,
)
from vllm_loraserve.coordinator.status import format_seconds, render


def shown(width: int, prediction: Prediction | None = None) -> list[str]:
    held = {
        "one": (Residency(name="a", sha256="sha-a"), Residency(name="b", sha256="sha-b", tier="host")),
        "two": (Residency(name="a", sha256="older"),),
    }
    instances = tuple(
        InstanceEntry(
            name=name,
            incarnation="1",
            url=f"http://{name}:8000",
            load=Load(running=2, waiting=1, kv_usage=0.5, tokens_per_s=9.0),
            capacity=Capacity(slots=8, rank_rows=512, device="[GPU]"),
            resident=resident,
            last_seen=time.time() + 3600.0,  # another clock; never negative
            draining=name == "two",
        )
        for name, resident in held.items()
    )
    routes = {"a": {"one": 0.75, "two": 0.25}, "b": {"two": 1.0}, "none": {}}
    status = Status(
        table=RoutingTable(
            epoch=1,
            version=1,
            base_model="toy",
            instances=instances,
            prediction=prediction,
            adapters=tuple(
                AdapterRoutes(
                    adapter=record(n, rank=64), routes=tuple(Route(instance=i, phi=f) for i, f in phi.items())
                )
                for n, phi in routes.items()
            ),
        ),
        uptime_s=93784.0,
        demand=(AdapterDemand(name="a", tokens_per_s=12.5, running=3), AdapterDemand(name="", tokens_per_s=1.0)),
        counters={},
        policy="loraserve+",
        problems=("'one' can't load 'b': [Errno 2] no such file.",),
    )
    console = Console(file=io.StringIO(), width=width)
    render(status, console)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_whole_picture() -> None:
    lines = shown(160)
    start = "toy: 2 instances, 3 adapters; policy loraserve+, coordinator up 1 d 2 h"
    assert lines[0] == f"{start}; requests by fraction and load"
    predicted = shown(160, Prediction(step_cost=StepCost()))
    assert predicted[0] == f"{start}; requests by predicted finish time (step cost shipped, not measured)"
    assert "one 2 1 50% 9.0 2 64/512 0.0 s ago http://one:8000 [GPU]" in lines  # the copy in host memory takes no rows
    assert "two 2 1 50% 9.0 1 64/512 stopping http://two:8000 [GPU]" in lines
    assert "a 64 62.5 KiB active 3 12.5 one 75%, two 25% (not loaded)" in lines  # two holds other content
    assert "b 64 62.5 KiB active 0 0.0 two 100% (not loaded), one (spare copy)" in lines
    assert "none 64 62.5 KiB active 0 0.0 -" in lines
    assert "(base model) 0 1.0 all" in lines
    assert lines[-1] == "! 'one' can't load 'b': [Errno 2] no such file."


def test_a_narrow_terminal_cuts_no_name() -> None:
    lines = shown(90)
    assert "one 2 1 50% 9.0 2 64/512 0.0 s ago" in lines


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5 s"), (65.0, "1 min 5 s"), (7260.0, "2 h 1 min"), (93784.0, "1 d 2 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
