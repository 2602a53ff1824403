"""Every diff in patches/ applies cleanly to the installed vLLM, alone and together, and belongs to a hook."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PATCHES = Path(__file__).parent.parent / "patches"
DIFFS = sorted(PATCHES.glob("*.patch"))

pytestmark = pytest.mark.vllm


def _copy_sources(diffs: list[Path], to: Path) -> list[Path]:
    """Copies what the diffs touch from the installed vLLM into a bare git tree."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parent.parent
    files = sorted({m for d in diffs for m in re.findall(r"^--- a/(\S+)", d.read_text(), re.MULTILINE)})
    assert files
    for name in files:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(site / name, to / name)
    subprocess.run(["git", "init", "-q"], cwd=to, check=True)
    return [to / name for name in files]


def _apply(diff: Path, to: Path) -> None:
    done = subprocess.run(["git", "apply", "--check", "-v", str(diff)], cwd=to, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "offset" not in done.stderr, f"{diff.name} has drifted: {done.stderr}"
    subprocess.run(["git", "apply", str(diff)], cwd=to, check=True)


@pytest.mark.parametrize("diff", DIFFS, ids=lambda d: d.stem)
def test_applies_alone(diff: Path, tmp_path: Path) -> None:
    for file in _copy_sources([diff], tmp_path):
        before = file.read_text()
        compile(before, str(file), "exec")
    _apply(diff, tmp_path)
    for file in tmp_path.rglob("*.py"):
        compile(file.read_text(), str(file), "exec")


def test_apply_together(tmp_path: Path) -> None:
    _copy_sources(DIFFS, tmp_path)
    for diff in DIFFS:
        subprocess.run(["git", "apply", str(diff)], cwd=tmp_path, check=True)
    for file in tmp_path.rglob("*.py"):
        compile(file.read_text(), str(file), "exec")


def test_each_hook_has_its_diff() -> None:
    from vllm_loraserve import plugin

    wanted = {hook.patch for hook in plugin.hooks() if hook.kind == "hook"}
    assert None not in wanted
    assert wanted == {d.name for d in DIFFS}
    readme = (PATCHES / "README.md").read_text()
    assert all(d.stem in readme for d in DIFFS)
