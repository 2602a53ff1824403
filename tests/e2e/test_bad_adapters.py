"""Adapters that can't be served are refused in one sentence; nothing of them stays, and serving goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import World

from vllm_loraserve.launcher import traffic
from vllm_loraserve.launcher.assets import PROMPTS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def configured(**changes: object) -> Callable[[Path], None]:
    """Changes the adapter's configuration."""

    def change(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**config, **changes}))

    return change


def without_config(path: Path) -> None:
    (path / CONFIG).unlink()


def broken_config(path: Path) -> None:
    (path / CONFIG).write_text('{"r": 4, "lora_alpha"')


def pickled(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()


def truncated(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def resized(rank: int | None = None, features: int | None = None) -> Callable[[Path], None]:
    """The same modules with another rank, or for a model with other features."""

    def change(path: Path) -> None:
        weights = {}
        for name, old in load_file(path / WEIGHTS).items():
            shape = list(old.shape)
            rank_axis = 0 if "lora_A" in name else 1
            if rank is not None:
                shape[rank_axis] = rank
            if features is not None:
                shape[1 - rank_axis] = features
            weights[name] = torch.zeros(shape, dtype=old.dtype)
        save_file(weights, path / WEIGHTS)
        if rank is not None:
            configured(r=rank)(path)

    return change


CASES: dict[str, tuple[Callable[[Path], None], int]] = {
    "no-config": (without_config, 400),
    "broken-config": (broken_config, 400),
    "pickle": (pickled, 400),
    "truncated": (truncated, 400),
    "rank-over-limit": (resized(rank=256), 400),
    "other-model": (resized(features=320), 400),
    "dora": (configured(use_dora=True), 400),
    "bias": (configured(bias="all"), 400),
}


def assert_refused(world: World, name: str, path: str, status: int) -> str:
    """The sentence of the refusal, after checking its form and that nothing happened."""
    given, text = world.cluster.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
    assert given == status, text
    message = json.loads(text)["error"]["message"]
    assert message.endswith(".")
    assert "\n" not in message
    assert "Traceback" not in message
    assert name not in {card["id"] for card in json.loads(world.cluster.get("/v1/models"))["data"]}
    body = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
    assert world.cluster.post("/v1/chat/completions", body)[0] == 404
    assert world.wrong(world.send([traffic.Request("apple", PROMPTS[0], False)])) == []
    return str(message)


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint_is_refused(world: World, case: str) -> None:
    spoil, status = CASES[case]
    path = world.root / case
    shutil.copytree(world.adapters[0].path, path)
    spoil(path)
    assert_refused(world, f"bad-{case}", str(path), status)


def test_a_path_outside_the_roots_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.adapters[0].path, tmp_path / "outside")
    assert "outside" in assert_refused(world, "bad-outside", str(tmp_path / "outside"), 403)


def test_a_path_that_climbs_is_refused(world: World) -> None:
    climbing = f"{world.root}/../{world.root.name}/x"
    assert "'..'" in assert_refused(world, "bad-climbing", climbing, 403)


def test_a_path_to_nothing_is_refused(world: World) -> None:
    assert_refused(world, "bad-nothing", str(world.root / "nothing"), 404)


def test_the_same_name_with_other_content_is_a_conflict(world: World) -> None:
    other = world.adapters[1]
    body = {"lora_name": "apple", "lora_path": str(other.path)}
    status, text = world.cluster.post("/v1/load_lora_adapter", body)
    assert status == 409
    assert "apple" in json.loads(text)["error"]["message"]
    assert world.wrong(world.send([traffic.Request("apple", PROMPTS[1], False)])) == []


def test_the_same_content_again_is_welcome(world: World) -> None:
    body = {"lora_name": "apple", "lora_path": str(world.adapters[0].path)}
    assert world.cluster.post("/v1/load_lora_adapter", body)[0] == 200
