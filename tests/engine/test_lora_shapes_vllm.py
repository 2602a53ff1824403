"""engine/lora_shapes.py by made-up layers: what tensor parallelism, packing and renaming do to an adapter's modules.

Real models are told of in test_tensor_parallel_vllm.py and test_lora_manager_vllm.py.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import WeightsMapper

from vllm_loraserve.adapters.shapes import OTHERS
from vllm_loraserve.engine.lora_shapes import lora_shapes

pytestmark = pytest.mark.vllm


def layer(kind: type[LinearBase], **sizes: Any) -> Any:
    """A LoRA layer over a linear layer that has its sizes and no weights."""
    base = kind.__new__(kind)
    for name, value in sizes.items():
        object.__setattr__(base, name, value)
    return SimpleNamespace(base_layer=base)


def manager(
    layers: dict[str, Any],
    packed: dict[str, list[str]] | None = None,
    mapper: WeightsMapper | None = None,
    skip_prefixes: tuple[str, ...] = (),
    others: tuple[str, ...] = (),
) -> Any:
    packed = packed or {}
    names = {name.rsplit(".", 1)[-1] for name in layers}
    full = {n: n.rsplit(".", 1) for n in layers if n.rsplit(".", 1)[-1] in packed}
    return SimpleNamespace(
        supported_lora_modules=[*names, *others],
        packed_modules_mapping=packed,
        packed_modules={name: [f"{parent}.{part}" for part in packed[leaf]] for name, (parent, leaf) in full.items()},
        modules={"lm_head": SimpleNamespace(base_layer=object())},
        paged_modules=layers,
        model=SimpleNamespace(hf_to_vllm_mapper=mapper, lora_skip_prefixes=skip_prefixes),
    )


OUT = layer(RowParallelLinear, input_size=64, input_size_per_partition=8, output_size=48)


def test_a_packed_layer_is_told_by_its_parts_and_as_a_whole_unsharded() -> None:
    # Eight workers share two key-value heads: vLLM's own `output_sizes` count each head four times.
    qkv = layer(
        QKVParallelLinear, input_size=48, output_sizes=[64, 64, 32], output_size=160, total_num_heads=8,
        total_num_kv_heads=2, head_size=8, v_head_size=4,
    )  # fmt: skip
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    told = lora_shapes(manager({"l.0.attn.qkv_proj": qkv, "l.0.attn.o_proj": OUT}, packed, others=("embed_tokens",)))
    assert told == {
        "q_proj": [(48, 64)],
        "k_proj": [(48, 16)],
        "v_proj": [(48, 8)],
        "qkv_proj": [(48, 88)],
        "o_proj": [(64, 48)],
        "embed_tokens": [],
    }


def test_layers_of_one_name_may_differ_in_size() -> None:
    layers = {
        f"l.{i}.mlp.down_proj": layer(RowParallelLinear, input_size=n, output_size=48) for i, n in enumerate((64, 96))
    }
    assert lora_shapes(manager(layers)) == {"down_proj": [(64, 48), (96, 48)]}


def test_a_part_of_several_slices_may_have_the_size_of_any_slices_in_a_row() -> None:
    gdn = layer(MergedColumnParallelLinear, input_size=48, output_sizes=[16, 16, 32, 32], output_size=96)
    told = lora_shapes(manager({"l.in_proj_qkvz": gdn}, {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]}))
    assert (48, 64) in told["in_proj_qkv"]
    assert (48, 32) in told["in_proj_z"]
    assert (48, 40) not in told["in_proj_z"]


@pytest.mark.parametrize(
    ("mapper", "told"),
    [
        (WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}), {"o_proj": [(64, 48)]}),
        (
            WeightsMapper(orig_to_new_substr={".attention.": ".self_attn.", ".o_proj": None}),
            {"o_proj": [(64, 48)], OTHERS: []},
        ),
        (WeightsMapper(orig_to_new_stacked={".q_proj": (".qkv_proj", "q")}), {"o_proj": [(64, 48)]}),
        (WeightsMapper(orig_to_new_substr={".to_out.": ".o_proj."}), {"o_proj": [(64, 48)], OTHERS: []}),
        (WeightsMapper(orig_to_new_substr={".o_proj.": ".out_proj."}), {OTHERS: []}),
        (WeightsMapper(orig_to_new_regex={re.compile(r"vision\.o_proj$"): "vision.proj"}), {OTHERS: []}),
        (WeightsMapper(orig_to_new_renaming=[object()]), {OTHERS: []}),  # type: ignore[list-item]
    ],
    ids=["prefix", "parent", "stacked", "to", "from", "regex", "renaming"],
)
def test_a_module_that_the_model_may_rename_is_left_to_the_load(
    mapper: WeightsMapper, told: dict[str, list[tuple[int, int]]]
) -> None:
    assert lora_shapes(manager({"l.0.attn.o_proj": OUT}, mapper=mapper)) == told


def test_parts_of_a_checkpoint_that_are_not_served_may_have_modules_of_their_own() -> None:
    assert lora_shapes(manager({"l.o_proj": OUT}, skip_prefixes=("mtp.",))) == {"o_proj": [(64, 48)], OTHERS: []}
