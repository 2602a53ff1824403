"""The GPU benchmark's logic: on toy shapes in the interpreter every section runs and both sides are right (its times
mean nothing here and are not looked at); its judgement on made-up figures.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the benchmark cannot run")

from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.kernels.cost import Batch, LayerShape, layout_only, metadata_of
from vllm_loraserve.kernels.tuning import DeviceShape, choose

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_lora_kernels.py"
SECTIONS = ("constants", "correctness", "linears", "interference", "slots", "step", "sweep")


def run(*arguments, **env):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    file = tmp_path_factory.mktemp("gpu") / "result.json"
    done = run("--tiny", "--device", "cpu", "--json", str(file), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(file.read_text())


@pytest.mark.slow
def test_every_section_runs_and_says_that_nothing_was_measured(result):
    assert all(result[section] for section in SECTIONS)
    assert result["measured"] is False


@pytest.mark.slow
def test_both_sides_compute_the_same_thing(result):
    assert len(result["correctness"]) >= 4
    for row in result["correctness"]:
        assert 0 < row["ours"] < 2e-3
        assert 0 < row["stock"] < 2e-3
        assert row["base_rows_unchanged"]


@pytest.mark.slow
def test_the_sides_are_all_there(result):
    decode, prefill = result["linears"]
    assert decode["us"].keys() == {"stock", "stock specialised", "stock tuned", "ours"}
    assert "stock at own rank" in prefill["us"], "the batch needs rank 8, stock is set to 16"
    for row in (decode, prefill):
        for name, value in row["ratio"].items():
            assert value == pytest.approx(row["us"][name] / row["us"]["ours"])
    assert {row["slots"] for row in result["slots"]} == {4, 8}
    assert {row["rank"] for row in result["interference"]} == {8, 16}
    assert all("no LoRA" in row["us"] for row in result["step"])
    assert all(row["best"] and row["tried"] > 1 for row in result["sweep"])
    assert {verdict["met"] for verdict in result["goals"]} == {"not run"}


def test_a_wrong_kernel_stops_the_benchmark(tmp_path):
    """Timings of wrong results are worthless: break our expand and expect no numbers."""
    sabotage = tmp_path / "sitecustomize.py"
    sabotage.write_text(
        "import vllm_loraserve.kernels.lora_linear as module\nmodule.run_expand = lambda y, *a, **k: y.add_(1)\n"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    arguments = ("--tiny", "--device", "cpu", "--only", "correctness", "--cases", "D1")
    done = run(*arguments, TRITON_INTERPRET="1", PYTHONPATH=path)
    assert done.returncode != 0
    assert "wrong results, timings would be worthless" in done.stderr


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of `benchmarks/`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_counts_and_timings_take_page_tables_of_the_engines_size(benchmark):
    """The launches that a CUDA graph captures follow from the room in the page table, not from the adapters."""
    layer, batch = LayerShape("o", 1024, (64,)), Batch("D5", (0,) * 4, (16,), 16)
    engine = LoRAServeConfig().max_rank
    assert layout_only(layer, batch).max_rank == metadata_of(batch).max_rank == engine
    ours = benchmark("gpu_lora_sides").Ours(layer, batch, 1, torch.device("cpu"), torch.float16)
    assert ours.linears[0].max_rank == ours.metadata.max_rank == engine
    assert ours.launch.planes[3] == engine
    assert ours.launch.config.block_rank == 32


@pytest.mark.parametrize(("tokens", "block_m"), [(64, 16), (8192, 64)])
@pytest.mark.parametrize("in_size", [1024, 4096, 14336])
@pytest.mark.parametrize("dependent", [False, True])
def test_the_sweep_tries_sizes_that_can_be_launched(benchmark, dependent, in_size, tokens, block_m):
    base = choose(k=in_size, n_slices=1, block_m=block_m, block_r=16, items=4, top_rank=256, device=DeviceShape())
    axes = benchmark("gpu_lora_sides").sweep_axes(in_size, tokens, dependent_launch=dependent)
    candidates = [config for axis in axes for config in axis(base)]
    assert all(config.split_k % config.expand_planes == 0 for config in candidates)
    assert len(candidates) < 50, "one command on a GPU must get through"
    if tokens == 64 and in_size > 1024:
        assert {(32, 8), (base.split_k, 8)} <= {(config.split_k, config.expand_planes) for config in candidates}
    assert {config.dependent_launch for config in candidates} == {False, dependent}
    assert {config.expand_early_y for config in candidates} == {False, True}
    assert {(256, 4), (128, 6)} <= {(config.block_k, config.shrink_stages) for config in candidates}
    assert all(sum(a != b for a, b in zip(*map(dataclasses.astuple, (base, c)), strict=True)) <= 3 for c in candidates)


def made_up(**changed):
    """A result that meets every goal, by little; `changed`: the time of ours in one section, by case."""

    def row(section, case, times):
        ours = changed.get(section, {}).get(case[-1], 10.0)
        names = ("model", "layer", "rank" if section == "interference" else "slots" if section == "slots" else "batch")
        ratio = {name: us / ours for name, us in times.items()}
        return dict(zip(names, case, strict=True)) | {"us": times | {"ours": ours}, "ratio": ratio}

    decode = {"stock": 20.0, "stock specialised": 19.0, "stock tuned": 15.0}
    prefill, alone = dict.fromkeys(decode, 11.0), dict.fromkeys(decode, 9.6)
    batches = {"D1 a": decode, "D2 b": decode, "D3 c": decode, "P2 d": prefill}
    one = {"D4 e": decode | {"stock at own rank": 9.6}, "D5 f": alone, "P1 g": prefill | {"stock at own rank": 9.6}}
    return {
        "measured": True,
        "linears": [row("linears", ("m", "o", name), times) for name, times in (batches | one).items()],
        "step": [row("step", ("m", "all", name), times) for name, times in batches.items()],
        "slots": [row("slots", ("m", "qkv", slots), decode) for slots in (16, 256)],
        "interference": [row("interference", ("m", "o", rank), decode) for rank in (8, 64, 128)],
    }


def missed(verdicts):
    assert all(verdict["met"] in (True, False) for verdict in verdicts)
    return {verdict["goal"]: verdict["where"] for verdict in verdicts if not verdict["met"]}


@pytest.mark.parametrize(
    ("changed", "goals"),
    [
        ({}, {}),
        ({"linears": {"D5 f": 11.7}}, {"one adapter of the rank that stock is set to: each linear": "m o, D5 f"}),
        ({"linears": {"D4 e": 11.7}}, {"one adapter of the rank that stock is set to: each linear": "m o, D4 e"}),
        ({"step": {"D2 b": 10.9}}, {"decode step, 16 mixed adapters: tuned stock": "m all, D2 b"}),
        (
            {"step": {"D1 a": 11.5}},
            {
                "decode step, 16 mixed adapters: tuned stock": "m all, D1 a",
                "decode step, 16 mixed adapters: default stock": "m all, D1 a",
            },
        ),
        ({"step": {"D3 c": 15.0}}, {}),
        ({"step": {"P2 d": 10.6}}, {"prefill step: tuned stock": "m all, P2 d"}),
        ({"linears": {"P2 d": 10.6}}, {"prefill, each linear: tuned stock": "m o, P2 d"}),
        ({"slots": {256: 11.6}}, {"flat in the number of slots": "m qkv"}),
        ({"interference": {128: 11.4}}, {}),
        ({"interference": {64: 11.6}}, {"flat when one adapter among small ones grows": "m o"}),
        ({"linears": {"D1 a": 14.0, "D2 b": 14.0}}, {"median of D1..D3, each linear: tuned stock": ""}),
    ],
)
def test_goals_are_judged_by_the_worst_figure(benchmark, changed, goals):
    assert missed(benchmark("gpu_lora_goals").judge(made_up(**changed))) == goals


@pytest.mark.parametrize("section", ["linears", "step", "slots", "interference"])
def test_a_goal_without_figures_was_not_run(benchmark, section):
    goals = benchmark("gpu_lora_goals")
    verdicts = goals.judge(made_up() | {section: []})
    idle = [verdict for verdict in verdicts if verdict["met"] == "not run"]
    assert 0 < len(idle) < len(verdicts)
    assert all(verdict["value"] is None and verdict["figures"] == 0 for verdict in idle)
    assert any(line.startswith("not run") for line in goals.lines(verdicts))
    assert {verdict["met"] for verdict in goals.judge(made_up() | {"measured": False})} == {"not run"}


def test_figures_are_added_to_case_by_case_and_never_to_those_of_other_conditions(tmp_path, benchmark):
    """Commands of a few minutes each fill one file; another device's figures do not get in between."""
    kernels, file = benchmark("gpu_lora_kernels"), tmp_path / "result.json"
    same = dict.fromkeys(kernels.SAME, "a") | {"measured": False}
    file.write_text(json.dumps(same | {"commands": ["first"], "linears": [{"layer": "o", "batch": "x", "us": 1}]}))
    run = object.__new__(kernels.Run)
    run.options = SimpleNamespace(json=file)
    run.result = kernels.continued(file, same | {"commands": ["second"]})
    run.add("linears", {"layer": "o", "batch": "y", "us": 2})
    run.add("linears", {"layer": "o", "batch": "x", "us": 3})
    stored = json.loads(file.read_text())
    assert {row["batch"]: row["us"] for row in stored["linears"]} == {"x": 3, "y": 2}
    assert stored["commands"] == ["first", "second"]
    with pytest.raises(SystemExit, match=r"result\.json has device 'a', now it is 'b': name another --json"):
        kernels.continued(file, same | {"device": "b", "commands": []})


def test_without_a_gpu_it_says_what_to_do():
    done = run("--only", "constants", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA device was found" in done.stderr
