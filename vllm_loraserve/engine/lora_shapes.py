"""Which modules of the base model an adapter may target, and their sizes: told by the LoRA layers that vLLM made.

A coordinator compares new adapters with this when they are registered. What it can't tell from a module's name (see
`_rules`) is left to the load, which compares every tensor with the layer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations
from typing import Any

from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear

from vllm_loraserve.adapters.shapes import OTHERS

EVERY = "*"
"""In place of what a rule looks for: any name."""


def lora_shapes(manager: Any) -> dict[str, list[tuple[int, int]]]:
    """Of a worker's LoRA model manager: the modules that adapters may target, and their unsharded (in, out) features.

    As `adapters.shapes.ModuleShapes`, in types that cross process borders. No features: no linear layer of that name on
    this worker (an embedding, another pipeline stage, a module outside of `--lora-target-modules`).
    """
    found: dict[str, set[tuple[int, int]]] = {}
    for module in manager.supported_lora_modules:
        for name in (module, *manager.packed_modules_mapping.get(module, ())):
            found.setdefault(_suffix(name), set())
    for name, layer in {**getattr(manager, "paged_modules", {}), **manager.modules}.items():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, LinearBase):
            outs = _out_sizes(base)
            for part, sizes in _parts(manager.packed_modules.get(name, ()), outs).items():
                found.setdefault(_suffix(part), set()).update((base.input_size, out) for out in sizes)
            # A checkpoint may hold the fused module itself (`qkv_proj`).
            found.setdefault(_suffix(name), set()).add((base.input_size, sum(outs)))
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    rules = _rules(mapper.get_rename_mapper()) if mapper is not None else ()
    if rules or getattr(manager.model, "lora_skip_prefixes", None):
        found = {name: sizes for name, sizes in found.items() if not any(_speaks_of(rule, name) for rule in rules)}
        found[OTHERS] = set()
    return {name: sorted(sizes) for name, sizes in found.items()}


def _suffix(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _out_sizes(base: LinearBase) -> list[int]:
    """Unsharded output features of each slice."""
    if isinstance(base, QKVParallelLinear):
        # Its own `output_sizes` count key and value heads once for each replica.
        return [
            base.total_num_heads * base.head_size,
            base.total_num_kv_heads * base.head_size,
            base.total_num_kv_heads * base.v_head_size,
        ]
    if isinstance(base, MergedColumnParallelLinear):
        return list(base.output_sizes)
    return [base.output_size]


def _parts(names: Sequence[str], outs: Sequence[int]) -> dict[str, list[int]]:
    """Checkpoint module -> the output features that it may have."""
    if len(names) == len(outs):
        return {name: [out] for name, out in zip(names, outs, strict=True)}
    # Each stands for some slices in a row, and which ones only an adapter's own sizes tell (vLLM's expand_packed_lora).
    ends = [0, *accumulate(outs)]
    return {name: [end - start for start, end in combinations(ends, 2)] for name in names}


def _rules(mapper: Any) -> list[str]:
    """What the model's renaming rules look for, of those that can change a module's own name.

    Most models only put the name under another parent. A rule about the name itself depends on what stands before it,
    which the name alone does not show.
    """
    literal = {**mapper.orig_to_new_substr, **mapper.orig_to_new_suffix}
    out = [old for old, new in literal.items() if _suffix(old.rstrip(".")) != _suffix(new.rstrip("."))]
    out += [pattern.pattern for pattern in mapper.orig_to_new_regex]
    return [*out, EVERY] if mapper.orig_to_new_renaming else out


def _speaks_of(rule: str, name: str) -> bool:
    return rule == EVERY or name in rule
