"""Slots and arena of a server that is given neither: stock vLLM's defaults hold one adapter of rank 16.

A slot of ours costs a few bytes, so there is no reason to serve one adapter at a time until somebody finds
`--max-loras`. Not where a slot does cost memory: experts and fully sharded layers stay in vLLM's padded stacks.
"""

from __future__ import annotations

import argparse
from typing import Any

import msgspec
from vllm.logger import init_logger

from vllm_loraserve.config import (
    ADDITIONAL_CONFIG_KEY,
    ARENA_RANK_ROWS,
    ARENA_SHARE,
    CPU_SLOTS,
    GPU_SLOTS,
    LoRAServeConfig,
)

logger = init_logger("vllm.loraserve.default_memory")


class NotGiven(int):
    """vLLM's own default of a number that the command line does not have; counts as that number everywhere else."""


def mark_defaults(parser: argparse.ArgumentParser) -> None:
    """Lets `is_given` tell vLLM's default of --max-loras from the same number given by the user."""
    for action in parser._actions:
        if "--max-loras" in action.option_strings and isinstance(action.default, int):
            action.default = NotGiven(action.default)


def is_given(value: int) -> bool:
    """Whether a user chose `value`; from Python, where that can't be seen, always."""
    return not isinstance(value, NotGiven)


def fill_in(vllm_config: Any, config: LoRAServeConfig, *, cpu_loras_given: bool) -> LoRAServeConfig:
    """Gives a finished VllmConfig, whose --max-loras was not given, slots for a batch of adapters and an arena for
    them; the options as they are then. `cpu_loras_given`: --max-cpu-loras has a value of the user's.

    Models with experts, fully sharded layers, and engines over several machines (each adapter there has its own part of
    the arena), keep vLLM's default.
    """
    lora = vllm_config.lora_config
    in_stacks = vllm_config.model_config.is_moe or lora.fully_sharded_loras
    if in_stacks or getattr(vllm_config.parallel_config, "nnodes", 1) > 1:
        why = "experts or fully sharded layers take memory for each slot" if in_stacks else "of several machines"
        logger.info("--max-loras is vLLM's default, %d, not more: %s; give it to mix adapters", lora.max_loras, why)
        return config
    slots = CPU_SLOTS
    if vllm_config.device_config.device_type != "cpu":
        # There vLLM's stacks of embedding and lm_head have memory for every slot, by --max-lora-rank and vocabulary.
        slots = min(GPU_SLOTS, max(CPU_SLOTS, ARENA_RANK_ROWS // lora.max_lora_rank))
    if cpu_loras_given:
        # No adapter is in a slot that is not in the host tier.
        slots = min(slots, lora.max_cpu_loras)
    else:
        lora.max_cpu_loras = slots + config.prefetch
    lora.max_loras = slots
    if config.arena_gib is None and config.arena_rank_rows is None:
        rows = max(ARENA_RANK_ROWS, config.max_rank, lora.max_lora_rank)
        share = config.arena_share
        if share is None and config.max_rank <= LoRAServeConfig().max_rank:
            # Who asks for a larger rank than the default is to have it.
            share = ARENA_SHARE
        config = msgspec.structs.replace(config, arena_rank_rows=rows, arena_share=share)
        vllm_config.additional_config[ADDITIONAL_CONFIG_KEY] = msgspec.to_builtins(config)
    return config
