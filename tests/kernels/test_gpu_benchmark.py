"""The GPU benchmark's logic on toy shapes in the interpreter: every section runs and both sides are right.

Its times mean nothing here and are not looked at.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the benchmark cannot run")

from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.kernels.cost import Batch, LayerShape, layout_only, metadata_of

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
    decode, prefill = result["linears"]["rows"]
    assert decode["us"].keys() == {"stock", "stock specialised", "stock tuned", "ours"}
    assert "stock at own rank" in prefill["us"], "the batch needs rank 8, stock is set to 16"
    for row in (decode, prefill):
        for name, value in row["ratio"].items():
            assert value == pytest.approx(row["us"][name] / row["us"]["ours"])
    assert {row["slots"] for row in result["slots"]} == {4, 8}
    assert {row["rank"] for row in result["interference"]} == {8, 16}
    assert all("no LoRA" in row["us"] for row in result["step"])
    assert all(row["best"] for row in result["sweep"])


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


def test_without_a_gpu_it_says_what_to_do():
    done = run("--only", "constants", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA device was found" in done.stderr
