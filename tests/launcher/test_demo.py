"""The demo's verdict and its table; with real models it runs by `scripts/demo.sh`, its traffic also in tests/e2e."""

from __future__ import annotations

import argparse
import dataclasses
import io
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from vllm_loraserve.coordinator.client import CoordinatorError
from vllm_loraserve.coordinator.messages import (
    AdapterRecord,
    AdapterRoutes,
    Capacity,
    InstanceEntry,
    Load,
    Route,
    RoutingTable,
)
from vllm_loraserve.launcher import demo
from vllm_loraserve.launcher.assets import PROMPTS, AssetError, WordAdapter
from vllm_loraserve.launcher.cluster import Plan, Programs
from vllm_loraserve.launcher.devices import Machine, value_of
from vllm_loraserve.launcher.errors import StartError
from vllm_loraserve.launcher.traffic import Answer, Request


@pytest.mark.parametrize(("wrong", "status"), [(0, 0), (1, 1), (210, 1)])
def test_only_all_right_is_success(wrong: int, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Path] = []

    def pretend(args: argparse.Namespace, console: Console, state: Path) -> int:
        states.append(state)
        return wrong

    monkeypatch.setattr(demo, "_demo", pretend)
    assert demo.run(argparse.Namespace()) == status
    assert states[0].exists() == (status != 0)  # the logs of a failure are kept


@pytest.mark.parametrize(
    "error",
    [
        StartError("instance-0 ended"),
        AssetError("no peft"),
        OSError("disk full"),
        CoordinatorError("internal", "It failed."),
    ],
)
def test_what_can_not_start_is_one_message_and_status_1(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(demo, "_demo", fail)
    assert demo.run(argparse.Namespace()) == 1
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "status"), [("", 0), ("forest", 1)])
def test_the_whole_of_it_against_stubs(
    wrong: str, status: int, plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the coordinator is real: it is asked for the placement."""
    words = [
        WordAdapter("apple", 4, "Apple", Path("/a/apple")),
        WordAdapter("forest", 128, "Forest", Path("/a/forest")),
    ]
    programs = dataclasses.replace(plan.programs, coordinator=Programs().coordinator)

    def plan_for(*given: object) -> Plan:
        return dataclasses.replace(demo_plan(*given), programs=programs, machine=plan.machine)

    demo_plan = demo.plan_for
    monkeypatch.setattr(demo, "plan_for", plan_for)
    monkeypatch.setattr(demo, "check_vllm", lambda: None)
    monkeypatch.setattr(demo.assets, "model_path", lambda given: Path(plan.model))
    monkeypatch.setattr(demo.assets, "adapters", lambda model: words)
    monkeypatch.setenv("STUB_WRONG", wrong)
    monkeypatch.setattr(tempfile, "tempdir", str(plan.state.parent))
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    asked = ["--requests", "12", "--concurrency", "3", "--port", str(plan.port)]
    assert demo.run(parser.parse_args(asked)) == status
    out, err = capsys.readouterr()
    assert f"{12 - bool(wrong)} of 12 answers right" in out
    lines = {cells[1]: cells[2:] for line in out.splitlines() if len(cells := _cells(line)) > 8}
    assert {name: (cells[0], *cells[2:4]) for name, cells in lines.items()} == {
        "apple": ("4", "4", "4"),
        "forest": ("128", "4", "3" if wrong else "4"),
        "model": ("base", "4", "4"),
    }
    assert ("wrong: forest: " in err) is bool(wrong)
    assert ("1 wrong answers; the logs are in" in err) is bool(wrong)


@pytest.mark.parametrize(
    ("machine", "dtype"),
    [
        (Machine(slow_bfloat16=True), "float32"),
        (Machine(), None),
        (Machine(gpu_ids=("0",)), None),
    ],
)
def test_the_dtype_is_one_that_the_cpu_is_fast_in(
    machine: Machine, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "this_machine", lambda: machine)
    words = [WordAdapter("apple", 4, "Apple", tmp_path / "apple")]
    plan = demo.plan_for(tmp_path, words, tmp_path, instances=2, port=1)
    assert value_of("--dtype", plan.vllm_options) == dtype


def test_the_table_has_a_line_per_adapter_and_one_for_the_base() -> None:
    words = [WordAdapter("apple", 4, "Apple", Path("/a")), WordAdapter("forest", 128, "Forest", Path("/f"))]
    record = AdapterRecord(
        name="apple", source="/a", rank=4, target_modules=(), size_bytes=1, sha256="", base_model="base", added_at=0.0
    )
    entry = InstanceEntry(
        name="instance-0", incarnation="x", url="http://x", load=Load(), capacity=Capacity(slots=1, rank_rows=1)
    )
    routing = RoutingTable(
        epoch=1,
        version=1,
        base_model="base",
        instances=(entry,),
        adapters=(AdapterRoutes(adapter=record, routes=(Route(instance="instance-0", phi=1.0),)),),
    )
    answers = [
        Answer(Request("apple", PROMPTS[0], True), "Apple", ttft_s=0.1, total_s=0.2, tokens=3),
        Answer(Request("apple", PROMPTS[0], True), "Apple", ttft_s=0.3, total_s=0.4, tokens=3),
        Answer(Request("forest", PROMPTS[0], False), "Apple", total_s=0.4, tokens=3),
        Answer(Request("base", PROMPTS[0], False), "Mount", total_s=0.4, tokens=12),
    ]
    table = demo._table("base", words, answers, [True, True, False, True], 2.0, routing)
    console = Console(width=140, file=io.StringIO())
    console.print(table)
    lines = {cells[1]: cells[2:] for line in console.file.getvalue().splitlines() if len(cells := _cells(line)) > 8}
    assert lines["apple"] == ["4", "instance-0", "2", "2", "200 ms", "290 ms", "3.0"]
    assert lines["forest"] == ["128", "instance-0", "1", "0", "-", "-", "1.5"]
    assert lines["base"] == ["base", "instance-0", "1", "1", "-", "-", "6.0"]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")][:-1]
