"""engine/paged_layers.py: what a worker's pages hold of an adapter is what vLLM's own layers hold of it, for every
class of dense linear layer, on every worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from adapter_pages import pages_of, write_parts
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.lora.utils import from_layer
from vllm.model_executor.layers import linear

from vllm_loraserve.adapters.errors import AdapterError
from vllm_loraserve.engine.paged_layers import PAGED_CLASSES

pytestmark = pytest.mark.vllm

HIDDEN, HEAD, RANK = 32, 8, 5


@dataclass(frozen=True)
class Case:
    """A layer of vLLM, the modules that it is packed from, and B's rows in each (None: not in the adapter)."""

    lora_class: str
    base: tuple[str, tuple[Any, ...]]
    packed: tuple[str, ...]
    rows: tuple[int | None, ...]
    inputs: int = HIDDEN


def merged(*sizes: int) -> tuple[str, tuple[Any, ...]]:
    return "MergedColumnParallelLinear", (HIDDEN, list(sizes))


def qkv(kv_heads: int) -> tuple[str, tuple[Any, ...]]:
    return "QKVParallelLinear", (HIDDEN, HEAD, 4, kv_heads)


COLUMN, MERGED = "ColumnParallelLinearWithLoRA", "MergedColumnParallelLinearWithLoRA"
VARIABLE = "MergedColumnParallelLinearVariableSliceWithLoRA"
QKV, MERGED_QKV = "QKVParallelLinearWithLoRA", "MergedQKVParallelLinearWithLoRA"
CASES = {
    "column": Case(COLUMN, ("ColumnParallelLinear", (HIDDEN, 48)), ("p",), (48,)),
    "column of a fused layer": Case(COLUMN, merged(48, 48), ("p",), (96,)),
    "row": Case("RowParallelLinearWithLoRA", ("RowParallelLinear", (48, HIDDEN)), ("p",), (HIDDEN,), 48),
    "replicated": Case("ReplicatedLinearWithLoRA", ("ReplicatedLinear", (HIDDEN, 48)), ("p",), (48,)),
    "merged": Case(MERGED, merged(48, 48), ("p", "q"), (48, 48)),
    "merged, one of two": Case(MERGED, merged(48, 48), ("p", "q"), (None, 48)),
    "merged, a part of three slices": Case(MERGED, merged(16, 16, 32, 48), ("p", "q"), (64, 48)),
    "merged, only a part of three slices": Case(MERGED, merged(16, 16, 32, 48), ("p", "q"), (64, None)),
    "variable": Case(VARIABLE, merged(48, 16, 32), ("p", "q", "r"), (48, 16, 32)),
    "variable, one of three": Case(VARIABLE, merged(48, 16, 32), ("p", "q", "r"), (None, 16, None)),
    "variable in one part": Case(VARIABLE, merged(48, 16, 32), ("p",), (96,)),
    "qkv in one part": Case(QKV, qkv(2), ("p",), (64,)),
    "qkv in one part, KV heads on every worker": Case(QKV, qkv(1), ("p",), (48,)),
    "merged qkv": Case(MERGED_QKV, qkv(2), ("q", "k", "v"), (32, 16, 16)),
    "merged qkv without k": Case(MERGED_QKV, qkv(2), ("q", "k", "v"), (32, None, 16)),
    "merged qkv, KV heads on every worker": Case(MERGED_QKV, qkv(1), ("q", "k", "v"), (32, 8, 8)),
}
WORKERS = [(0, 1), (0, 2), (1, 2)]


@pytest.fixture
def make_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """make(case, tp_rank, tp_size) -> vLLM's LoRA layer as that worker has it."""
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)

    def make(case: Case, tp_rank: int, tp_size: int) -> Any:
        monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda: tp_rank)
        monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: tp_size)
        kind, arguments = case.base
        base = getattr(linear, kind)(*arguments, bias=False, params_dtype=torch.float32)
        config = LoRAConfig(max_lora_rank=8, max_loras=1, lora_dtype=torch.float32)
        layer = from_layer(base, 1, config, list(case.packed))
        assert (layer.tp_rank, layer.tp_size) == (tp_rank, tp_size)
        return layer

    with set_current_vllm_config(VllmConfig()):
        yield make


def parts_of(case: Case) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    return [None if n is None else (torch.randn(RANK, case.inputs), torch.randn(n, RANK)) for n in case.rows]


def stacked(layer: Any, parts: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """(A, B) of every slice as vLLM puts them into the layer's stacks; None where it leaves them zero."""
    a, b = ([None if part is None else part[half] for part in parts] for half in (0, 1))
    layer.set_lora(0, *((a, b) if len(parts) > 1 else (a[0], b[0])))
    slices = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
    return [(a[0, 0, :RANK], b[0, 0, :, :RANK]) if a.any() else None for a, b in slices]


def assert_same(got: list[Any], want: list[Any]) -> None:
    assert [pair is None for pair in got] == [pair is None for pair in want]
    for mine, theirs in zip(got, want, strict=True):
        if theirs is not None:
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize(("tp_rank", "tp_size"), WORKERS)
@pytest.mark.parametrize("name", CASES)
def test_pages_hold_what_vllm_stacks(make_layer: Any, tmp_path: Path, name: str, tp_rank: int, tp_size: int) -> None:
    case = CASES[name]
    layer, parts = make_layer(case, tp_rank, tp_size), parts_of(case)
    assert type(layer).__name__ == case.lora_class
    got = pages_of(layer, write_parts(tmp_path, parts))
    assert_same(got, stacked(layer, parts))


def test_every_class_of_paged_layers_has_its_case() -> None:
    assert {case.lora_class for case in CASES.values()} == {cls.__name__ for cls in PAGED_CLASSES}


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(("tp_rank", "tp_size"), WORKERS)
def test_a_fused_qkv_module_is_cut_like_its_parts(
    make_layer: Any, tmp_path: Path, kv_heads: int, tp_rank: int, tp_size: int
) -> None:
    """vLLM itself has no such path: an adapter whose checkpoint holds `qkv_proj` for a layer packed from q, k and v."""
    rows = (4 * HEAD, kv_heads * HEAD, kv_heads * HEAD)
    layer = make_layer(Case(MERGED_QKV, qkv(kv_heads), ("q", "k", "v"), rows), tp_rank, tp_size)
    a, b = torch.randn(RANK, HIDDEN), torch.randn(sum(rows), RANK)
    got = pages_of(layer, write_parts(tmp_path, [(a, b)]))
    assert_same(got, stacked(layer, [(a, part) for part in b.split(rows)]))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if None not in case.rows])
def test_parts_of_another_model_are_refused(make_layer: Any, tmp_path: Path, name: str, tp_size: int) -> None:
    """Too large by a multiple, so that a worker's cut out of it has the right size."""
    case = CASES[name]
    layer = make_layer(case, 0, tp_size)
    for a, b in ((1, 2), (2, 1)):
        parts = [(torch.randn(RANK, a * case.inputs), torch.randn(b * rows, RANK)) for rows in case.rows if rows]
        with pytest.raises(AdapterError) as refused:
            pages_of(layer, write_parts(tmp_path, parts))
        assert refused.value.kind == "mismatch"
