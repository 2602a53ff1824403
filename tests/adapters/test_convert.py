"""adapters/convert.py and layout.py: pages hold exactly the adapter, at its rank, as this worker's shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import write_adapter
from safetensors.torch import load_file, save_file

from vllm_loraserve.adapters import native_rows
from vllm_loraserve.adapters.checkpoint import AdapterError, Checkpoint, LoRATensors, open_checkpoint
from vllm_loraserve.adapters.convert import (
    ModulePlan,
    Pair,
    WeightsReader,
    page_addresses,
    slice_ranks,
    write_pages,
)
from vllm_loraserve.adapters.layout import Layout, ModuleShape, build_layout


@pytest.fixture(autouse=True, params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test by the compiled converter and by torch."""
    assert native_rows.load() is not None
    if request.param == "torch":
        monkeypatch.setattr(native_rows, "load", lambda: None)


SHAPES = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "down_proj": (96, 64)}
QKV = ("q_proj", "k_proj", "v_proj")


def layout(dtype: str = "float32", page_rows: int = 8, layers: int = 2, tp: int = 1, tp_rank: int = 0) -> Layout:
    modules = []
    for n in range(layers):
        modules.append(
            ModuleShape(f"model.layers.{n}.self_attn.qkv_proj", "qkv_proj", 64, (64 // tp, 32 // tp, 32 // tp))
        )
        modules.append(ModuleShape(f"model.layers.{n}.mlp.down_proj", "down_proj", 96 // tp, (64,)))
    return build_layout(modules, model="m", dtype=dtype, page_rows=page_rows, tp_rank=tp_rank, tp_size=tp)


def plans_for(checkpoint: Checkpoint, layers: int = 2, tp: int = 1, tp_rank: int = 0) -> list[ModulePlan]:
    """Column-parallel qkv, row-parallel down, as vLLM shards them."""
    by_name = {module.name: module for module in checkpoint.modules}

    def cut(size: int) -> slice:
        return slice(tp_rank * size // tp, (tp_rank + 1) * size // tp)

    def column(pairs: Sequence[Pair | None]) -> list[Pair | None]:
        return [None if p is None else (p[0], p[1][cut(p[1].shape[0])]) for p in pairs]

    def row(pairs: Sequence[Pair | None]) -> list[Pair | None]:
        return [None if p is None else (p[0][:, cut(p[0].shape[1])], p[1]) for p in pairs]

    plans = []
    for n in range(layers):
        parts: list[LoRATensors | None] = [by_name.get(f"model.layers.{n}.self_attn.{m}") for m in QKV]
        if any(parts):
            plans.append(ModulePlan(f"model.layers.{n}.self_attn.qkv_proj", parts, column))
        down = by_name.get(f"model.layers.{n}.mlp.down_proj")
        if down is not None:
            plans.append(ModulePlan(f"model.layers.{n}.mlp.down_proj", [down], row))
    return plans


def convert(path: Path, where: Layout, **sharding: int) -> tuple[list[int], list[torch.Tensor | None]]:
    checkpoint = open_checkpoint(path)
    plans = plans_for(checkpoint, **sharding)
    parts = {plan.module: list(range(len(plan.parts))) for plan in plans}
    ranks = slice_ranks(where, plans, parts)
    targets: list[torch.Tensor | None] = [
        torch.full((count, group.page_elements), float("nan"), dtype=getattr(torch, where.dtype)) if count else None
        for count, group in zip(where.pages_for(ranks), where.groups, strict=True)
    ]
    write_pages(WeightsReader(checkpoint), where, plans, ranks, targets)
    return ranks, targets


def rows_of(where: Layout, targets: Sequence[torch.Tensor | None], module: str, index: int, rank: int) -> Pair:
    for group, pages in zip(where.groups, targets, strict=True):
        for place in group.places:
            if (place.module, place.index) == (module, index):
                assert pages is not None
                a, b = (
                    torch.cat(
                        [page[offset : offset + where.page_rows * width].view(where.page_rows, width) for page in pages]
                    )
                    for offset, width in ((place.a_offset, place.in_size), (place.b_offset, place.out_size))
                )
                assert not a[rank:].any(), "rows beyond the rank are zero"
                assert not b[rank:].any()
                return a[:rank], b[:rank].T
    raise AssertionError(module)


@pytest.mark.parametrize("rank", [1, 8, 13, 64])
@pytest.mark.parametrize("page_rows", [4, 8])
def test_every_row_arrives(tmp_path: Path, rank: int, page_rows: int) -> None:
    path = write_adapter(tmp_path / "a", rank=rank, alpha=3 * rank)
    where = layout(page_rows=page_rows)
    ranks, targets = convert(path, where)
    assert set(ranks) == {rank}
    assert not any(pages.isnan().any() for pages in targets if pages is not None), "every element was written"
    assert where.pages_for(ranks) == (-(-rank // page_rows),) * 2
    weights = load_file(path / "adapter_model.safetensors")
    for n in range(2):
        for index, name in enumerate(QKV):
            a, b = rows_of(where, targets, f"model.layers.{n}.self_attn.qkv_proj", index, rank)
            source = f"base_model.model.model.layers.{n}.self_attn.{name}"
            assert torch.equal(a, weights[f"{source}.lora_A.weight"])
            assert torch.equal(b, weights[f"{source}.lora_B.weight"] * 3.0), "the scaling is folded into B"


def test_a_subset_of_modules_costs_only_itself(tmp_path: Path) -> None:
    where = layout()
    ranks, targets = convert(write_adapter(tmp_path / "a", rank=16, modules=("q_proj", "v_proj")), where)
    assert ranks == [16, 0, 16, 16, 0, 16, 0, 0]
    assert where.pages_for(ranks) == (2, 0)
    assert targets[1] is None


def test_ranks_by_module(tmp_path: Path) -> None:
    where = layout()
    path = write_adapter(tmp_path / "a", rank=4, ranks={"q_proj": 24, "down_proj": 9})
    ranks, targets = convert(path, where)
    assert ranks == [24, 4, 4, 24, 4, 4, 9, 9]
    assert where.pages_for(ranks) == (3, 2)
    rows_of(where, targets, "model.layers.1.self_attn.qkv_proj", 1, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_cast_rounds_once(tmp_path: Path, dtype: str) -> None:
    path = write_adapter(tmp_path / "a", rank=8, alpha=24)
    where = layout(dtype)
    ranks, targets = convert(path, where)
    weights = load_file(path / "adapter_model.safetensors")
    source = "base_model.model.model.layers.1.mlp.down_proj"
    a, b = rows_of(where, targets, "model.layers.1.mlp.down_proj", 0, ranks[-1])
    assert torch.equal(a, weights[f"{source}.lora_A.weight"].to(getattr(torch, dtype)))
    assert torch.equal(b, (weights[f"{source}.lora_B.weight"] * 3).to(getattr(torch, dtype)))


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_add_up(tmp_path: Path, tp: int) -> None:
    path = write_adapter(tmp_path / "a", rank=8)
    weights = load_file(path / "adapter_model.safetensors")
    q, down = (f"base_model.model.model.layers.0.{m}" for m in ("self_attn.q_proj", "mlp.down_proj"))
    q_rows, down_columns, prints = [], [], set()
    for tp_rank in range(tp):
        where = layout(tp=tp, tp_rank=tp_rank)
        prints.add(where.fingerprint)
        _, targets = convert(path, where, tp=tp, tp_rank=tp_rank)
        a, b = rows_of(where, targets, "model.layers.0.self_attn.qkv_proj", 0, 8)
        assert torch.equal(a, weights[f"{q}.lora_A.weight"])
        q_rows.append(b)
        a, b = rows_of(where, targets, "model.layers.0.mlp.down_proj", 0, 8)
        assert torch.equal(b, weights[f"{down}.lora_B.weight"] * 2)
        down_columns.append(a)
    assert torch.equal(torch.cat(q_rows), weights[f"{q}.lora_B.weight"] * 2)
    assert torch.equal(torch.cat(down_columns, 1), weights[f"{down}.lora_A.weight"])
    assert len(prints) == tp, "shards are not interchangeable"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_the_pages_cannot_hold(tmp_path: Path, value: float) -> None:
    path = write_adapter(tmp_path / "a")
    weights = load_file(path / "adapter_model.safetensors")
    weights["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"][7, 63] = value
    save_file(weights, path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="qkv_proj") as caught:
        convert(path, layout("float16"))
    assert caught.value.kind == "invalid"


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", shapes={**SHAPES, "k_proj": (64, 48)})
    with pytest.raises(AdapterError, match="qkv_proj") as caught:
        convert(path, layout())
    assert caught.value.kind == "mismatch"


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    checkpoint = open_checkpoint(path)
    weights = path / "adapter_model.safetensors"
    reader = WeightsReader(checkpoint)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="not a complete"):
        WeightsReader(checkpoint)
    last = max(checkpoint.entries.values(), key=lambda entry: entry.end)
    with pytest.raises(AdapterError, match="shorter"):
        reader.tensor(last)


def test_fingerprint_is_of_what_gives_bytes_their_meaning() -> None:
    same = layout().fingerprint
    assert layout().fingerprint == same
    others = {
        layout("float16").fingerprint,
        layout(page_rows=4).fingerprint,
        layout(layers=3).fingerprint,
        layout(tp=2).fingerprint,
        layout(tp=2, tp_rank=1).fingerprint,
    }
    assert len(others) == 5
    assert same not in others


def test_blocks_are_aligned_and_apart() -> None:
    where = build_layout(
        [ModuleShape("a", "g", 33, (7, 5)), ModuleShape("b", "g", 10, (3,))],
        model="m",
        dtype="bfloat16",
        page_rows=8,
        tp_rank=0,
        tp_size=1,
    )
    ends = 0
    for place in where.places():
        assert place.a_offset >= ends
        assert place.b_offset >= place.a_offset + 8 * place.in_size
        assert place.a_offset % 32 == place.b_offset % 32 == 0
        ends = place.b_offset + 8 * place.out_size
    assert where.groups[0].page_elements >= ends
    assert where.groups[0].page_elements % 32 == 0
    with pytest.raises(ValueError, match="float8"):
        build_layout([], model="m", dtype="float8", page_rows=8, tp_rank=0, tp_size=1)


def test_page_addresses() -> None:
    where = layout()
    starts, sizes = page_addresses(where, (2, 1), 1000)
    first, second = where.page_bytes(0), where.page_bytes(1)
    assert starts == [1000, 1000 + first, 1000 + 2 * first]
    assert sizes == [first, first, second]
    assert page_addresses(where, (0, 0), 1000) == ([], [])
    assert isinstance(starts[0], int)
    assert np.sum(sizes) == where.size_bytes((2, 1))
