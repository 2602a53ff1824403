"""engine/default_memory.py: slots and arena of a server that is given neither, through vLLM's own command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_loraserve.config import ARENA_RANK_ROWS, ARENA_SHARE, CPU_SLOTS, GPU_SLOTS, LoRAServeConfig
from vllm_loraserve.engine.default_memory import fill_in
from vllm_loraserve.engine.engine_config import config_of

pytestmark = pytest.mark.vllm

PREFETCH = LoRAServeConfig().prefetch


@pytest.fixture
def configured(model_dir: Path) -> Callable[..., Any]:
    """configured(words of the command line) -> the VllmConfig of `vllm serve`, made twice of one EngineArgs."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_loraserve import plugin

    plugin.register()

    def make(*words: str) -> Any:
        parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
        args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(model_dir), *words]))
        first, second = args.create_engine_config(), args.create_engine_config()
        assert first.lora_config == second.lora_config
        assert config_of(first) == config_of(second)
        return second

    return make


@pytest.mark.parametrize(
    ("words", "slots", "host", "rows"),
    [
        ([], CPU_SLOTS, CPU_SLOTS + PREFETCH, ARENA_RANK_ROWS),
        (["--max-loras", "1"], 1, 1 + PREFETCH, None),
        (["--max-cpu-loras", "20"], CPU_SLOTS, 20, ARENA_RANK_ROWS),
        (["--max-cpu-loras", "3"], 3, 3, ARENA_RANK_ROWS),
        (["--loraserve-config.arena_rank_rows", "64"], CPU_SLOTS, CPU_SLOTS + PREFETCH, 64),
        (["--loraserve-config.arena_gib", "0.5"], CPU_SLOTS, CPU_SLOTS + PREFETCH, None),
        (["--loraserve-config.max_rank", "512", "--max-lora-rank", "64"], CPU_SLOTS, CPU_SLOTS + PREFETCH, 512),
        (["--fully-sharded-loras"], 1, 1 + PREFETCH, None),
    ],
)
def test_what_is_not_given_is_filled_in(
    configured: Callable[..., Any], words: list[str], slots: int, host: int, rows: int | None
) -> None:
    made = configured("--enable-loraserve", *words)
    assert (made.lora_config.max_loras, made.lora_config.max_cpu_loras) == (slots, host)
    config = config_of(made)
    assert config is not None
    assert config.arena_rank_rows == rows


def test_without_the_flag_vllms_defaults_stay(configured: Callable[..., Any], model_dir: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    made = configured("--enable-lora").lora_config
    assert made == EngineArgs(model=str(model_dir), enable_lora=True).create_engine_config().lora_config
    assert made.max_loras == 1


def test_python_callers_get_what_they_ask_for(model_dir: Path) -> None:
    """There a default can't be told from the same number given."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_loraserve import plugin

    plugin.register()
    made = EngineArgs(model=str(model_dir), additional_config={"loraserve": {}}).create_engine_config()
    assert (made.lora_config.max_loras, made.lora_config.max_cpu_loras) == (1, 1 + PREFETCH)
    config = config_of(made)
    assert config is not None
    assert config.arena_rank_rows is None


@pytest.mark.parametrize(
    ("device", "moe", "machines", "slots"),
    [("cuda", False, 1, GPU_SLOTS), ("cpu", False, 1, CPU_SLOTS), ("cuda", True, 1, 1), ("cuda", False, 2, 1)],
)
@pytest.mark.parametrize("rank", [16, 64, 256])
def test_where_a_slot_costs_memory_there_are_fewer(
    device: str, moe: bool, machines: int, slots: int, rank: int
) -> None:
    """On a GPU embedding and lm_head have stacks for every slot."""
    if slots == GPU_SLOTS and rank > 16:
        slots = 8
    lora = SimpleNamespace(max_loras=1, max_cpu_loras=1, max_lora_rank=rank, fully_sharded_loras=False)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(is_moe=moe),
        parallel_config=SimpleNamespace(nnodes=machines),
        device_config=SimpleNamespace(device_type=device),
        lora_config=lora,
        additional_config={},
    )
    config = fill_in(vllm_config, LoRAServeConfig(), cpu_loras_given=False)
    assert lora.max_loras == slots
    assert config.arena_rank_rows == (None if slots == 1 else ARENA_RANK_ROWS)
    assert config.arena_share == (None if slots == 1 else ARENA_SHARE)
    large = fill_in(vllm_config, LoRAServeConfig(max_rank=512), cpu_loras_given=False)
    assert (large.arena_rank_rows, large.arena_share) == ((None, None) if slots == 1 else (512, None))
