"""Real small things for tests of the engine: a model directory, PEFT adapters with random weights, schedulers with a
channel to made-up workers."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The small real model that tests run on."""
    from vllm_loraserve.launcher import assets

    return assets.model_path(os.environ.get("LORASERVE_TEST_MODEL"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the LoRA manager's logger says; vLLM's loggers hand nothing on to pytest's."""
    lines: list[str] = []
    logger = logging.getLogger("vllm.loraserve.lora_manager")
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture
def make_adapter(tmp_path: Path, model_dir: Path) -> Callable[..., Path]:
    """make(name, rank, seed, strength) -> directory of a PEFT checkpoint whose weights visibly change the answers."""

    def make(name: str, rank: int = 8, seed: int = 0, strength: float = 0.2) -> Path:
        import torch
        from safetensors.torch import save_file

        config = json.loads((model_dir / "config.json").read_text())
        hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
        outputs = {"q_proj": hidden, "v_proj": hidden // heads * kv}
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for layer in range(config["num_hidden_layers"]):
            for module, out in outputs.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                weights[f"{key}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) / hidden**0.5
                weights[f"{key}.lora_B.weight"] = strength * torch.randn(out, rank, generator=generator)
        folder = tmp_path / name
        folder.mkdir()
        save_file(weights, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            json.dumps(
                {
                    "peft_type": "LORA",
                    "base_model_name_or_path": str(model_dir),
                    "r": rank,
                    "lora_alpha": rank,
                    "target_modules": list(outputs),
                    "bias": "none",
                    "task_type": "CAUSAL_LM",
                }
            )
        )
        return folder

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scheduler's time, which stands still until a settled step or the test moves it."""
    from fake_workers import Clock

    from vllm_loraserve.engine import admission, scheduler

    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    monkeypatch.setattr(admission, "time", clock)
    return clock


@pytest.fixture
def build(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """build(ranks=..., rank_rows=..., tp=..., **make_scheduler's) -> (scheduler, workers)."""
    from fake_workers import ANSWERS_WITHIN_S, FakeWorkers, SettlingEnd
    from scheduler_harness import make_scheduler

    from vllm_loraserve.engine import channel, scheduler

    monkeypatch.setattr(scheduler, "WORKERS_TIMEOUT_S", ANSWERS_WITHIN_S)
    made: list[Any] = []

    def make(
        *,
        ranks: dict[int, int] | None = None,
        rank_rows: int | None = None,
        tp: int = 1,
        prepared: int | None = None,
        host_rows: int | None = None,
        cls: type = scheduler.RankAwareScheduler,
        **options: Any,
    ) -> tuple[Any, Any]:
        address = f"ipc://{tmp_path}/channel{len(made)}"
        monkeypatch.setattr(channel, "address_of", lambda _, purpose="loads": f"{address}-{purpose}")
        workers = FakeWorkers(f"{address}-loads", tp, rank_rows=rank_rows, prepared=prepared, host_rows=host_rows)
        workers.ranks.update(ranks or {})
        monkeypatch.setattr(channel, "SchedulerEnd", partial(SettlingEnd, workers))
        made_scheduler = make_scheduler(cls, str(model_dir), world_size=tp, **options)
        assert made_scheduler.readiness.world_size == tp
        made.append((made_scheduler, workers))
        return made_scheduler, workers

    yield make
    for made_scheduler, workers in made:
        made_scheduler._end.close()
        workers.close()


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Any]:
    """A coordinator that the test starts, and may stop and start again."""
    from one_instance import Coordinator

    directory = tempfile.mkdtemp(prefix="lrs")  # a socket's path must be short
    yield Coordinator(tmp_path / "r.sqlite", f"ipc://{directory}/c")
    shutil.rmtree(directory)


@pytest.fixture
async def joined(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Any, Any, Any, Any]]:
    """(coordinator, agent, engine, models) of a running membership."""
    from fake_engine import FakeEngine
    from one_instance import membership

    monkeypatch.setattr("vllm_loraserve.engine.orders.LINGER_S", 0.2)
    engine = FakeEngine()
    async with membership(coordinator, engine) as (agent, models):
        yield coordinator, agent, engine, models
    assert len(coordinator.controller.members) == 0, "left in good order"
    assert engine.generate.__func__ is FakeEngine.generate
    assert engine.logger_manager.stat_loggers == []


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """(a scheduler's end of the channel, the worker side with a made-up manager)."""
    from worker_side import Manager

    from vllm_loraserve.engine import channel
    from vllm_loraserve.engine.side_loading import side_loading

    monkeypatch.setattr(channel, "address_of", lambda *_: f"ipc://{tmp_path}/loads")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(rank=0),
        lora_config=SimpleNamespace(max_loras=2, max_cpu_loras=5),
        additional_config={"loraserve": {}},
    )
    end = channel.SchedulerEnd(f"ipc://{tmp_path}/loads")
    manager = side_loading(Manager)(config)
    assert manager.create_lora_manager("model", config) == "model"
    (hello,) = end.wait_for_workers(1, 120)
    assert (hello.rank, hello.rank_rows, hello.prepared) == (0, None, 3)
    yield end, manager
    manager._channel.close()
    end.close()
