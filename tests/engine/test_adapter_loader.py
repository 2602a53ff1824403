"""What the loader reads, and what it knows already."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def test_a_file_that_was_not_touched_is_hashed_once(
    make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_loraserve.adapters.checkpoint import open_checkpoint
    from vllm_loraserve.engine import adapter_loader

    hashed = []

    class Reader(adapter_loader.WeightsReader):
        def digest(self) -> str:
            hashed.append(self)
            return super().digest()

    def digest_of(folder: Path) -> str:
        return loader._digest(Reader(open_checkpoint(folder))).result()

    now = [0.0]
    monkeypatch.setattr(adapter_loader.time, "time", lambda: now[0])
    facts: Any = None
    loader = adapter_loader.AdapterLoader(facts, facts)
    folder = make_adapter("a", 8, 1)
    weights = folder / "adapter_model.safetensors"

    now[0] = weights.stat().st_ctime + 1
    fresh = digest_of(folder)
    assert digest_of(folder) == fresh
    assert len(hashed) == 2, "a file written just now may be written again within its time stamp"

    now[0] += 3600
    assert {digest_of(folder) for _ in range(3)} == {fresh}
    assert len(hashed) == 3

    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = digest_of(folder)
    assert changed != fresh, "other content of the same size and time"

    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert digest_of(folder) not in {fresh, changed}


@pytest.fixture
def loader() -> Any:
    """A real AdapterLoader and host tier for a model of one module."""
    import torch

    from vllm_loraserve.adapters.layout import ModuleShape, build_layout
    from vllm_loraserve.engine.adapter_loader import AdapterLoader, ModelFacts
    from vllm_loraserve.memory.host_tier import HostTier

    name = "model.layers.0.self_attn.q_proj"
    layout = build_layout(
        [ModuleShape(name, "q_proj", 64, (64,))], model="tiny", dtype="float32", page_rows=8, tp_rank=0, tp_size=1
    )
    facts = ModelFacts(
        layout=layout,
        layers={name: SimpleNamespace(n_slices=1, tp_size=1)},
        parts={name: [name]},
        stock_names=frozenset(),
        expected_suffixes=frozenset({"q_proj", "lm_head"}),
        module_names=frozenset({"", "model", "model.layers", "model.layers.0", name.rpartition(".")[0]}),
        elsewhere=frozenset(),
        left_out=frozenset({"vision_tower"}),
        weights_mapper=None,
        skip_prefixes=(),
        strip_model_prefix=False,
        allow_modules_to_save=False,
        max_rank=64,
        stock_max_rank=4,
        lora_dtype=torch.float32,
        vocab_size=8,
        max_positions=None,
    )
    return AdapterLoader(facts, HostTier(layout, 1 << 20), resolve=lambda path: path.removesuffix("/."))


Q_PROJ = "model.layers.0.self_attn.q_proj"


def write(folder: Path, seed: int, ranks: dict[str, int] | None = None, value: float | None = None) -> Path:
    """A checkpoint of that model; other seeds, other weights of the same size. `ranks`: by module; `value`: of the
    first element of each B."""
    import torch
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, rank in (ranks or {Q_PROJ: 8}).items():
        for half, shape in {"lora_A": (rank, 64), "lora_B": (64, rank)}.items():
            tensor = tensors[f"base_model.model.{name}.{half}.weight"] = torch.randn(shape, generator=generator)
            if value is not None and half == "lora_B":
                tensor[0, 0] = value
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    pattern = {name.rsplit(".", 1)[-1]: rank for name, rank in (ranks or {}).items()}
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": pattern, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("pooling", [False, True])
def test_what_another_pipeline_stage_holds_is_not_read(loader: Any, tmp_path: Path, pooling: bool) -> None:
    """`pooling`: checkpoints of pooling models may name modules without the model's own prefix."""
    from vllm.lora.request import LoRARequest

    elsewhere = Q_PROJ.replace("0", "1")
    if pooling:
        loader.facts.strip_model_prefix, elsewhere = True, elsewhere.removeprefix("model.")
    loader.facts.elsewhere = frozenset({"model.layers.1"})
    here = loader.prepare(LoRARequest("here", 1, str(write(tmp_path / "a", 1, {Q_PROJ: 8, elsewhere: 8}))))
    assert (here.ranks, here.loras) == ((8,), {}), "though its rank is above --max-lora-rank"
    other = loader.prepare(LoRARequest("other", 2, str(write(tmp_path / "b", 1, {elsewhere: 8}))))
    assert (other.ranks, other.pages, other.loras) == ((0,), (0,), {})


@pytest.mark.parametrize("name", [Q_PROJ.replace("0", "7"), Q_PROJ.replace("model", "model.language_model")])
@pytest.mark.parametrize("beside", [True, False])
def test_modules_that_the_model_has_not_are_refused(loader: Any, tmp_path: Path, name: str, beside: bool) -> None:
    """The name ends as the model's do and the sizes fit: served without it, the adapter would be another one."""
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.adapters.checkpoint import AdapterError

    folder = write(tmp_path / "deeper", 1, {name: 8} | ({Q_PROJ: 8} if beside else {}))
    with pytest.raises(AdapterError, match=rf"targets '{name}', and this model has no '{name.rpartition('.')[0]}'"):
        loader.prepare(LoRARequest("deeper", 1, str(folder)))
    assert 1 not in loader.tier
    loader.tier.check_integrity()


@pytest.mark.parametrize(
    "name", ["visual.blocks.0.attn.q_proj", "vision_tower.layers.23.attn.q_proj", "layers.0.mlp.q_proj"]
)
def test_layers_without_lora_are_left_out_but_not_all_of_an_adapter(loader: Any, tmp_path: Path, name: str) -> None:
    """As of a vision tower, also beyond the layers that vLLM builds of it, or what --lora-target-modules leaves out."""
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.adapters.checkpoint import AdapterError

    loader.facts.module_names |= {"visual.blocks.0.attn", "model.layers.0.mlp"}
    loader.facts.strip_model_prefix = name.startswith("layers")
    assert loader.prepare(LoRARequest("a", 1, str(write(tmp_path / "a", 1, {Q_PROJ: 8, name: 8})))).ranks == (8,)
    with pytest.raises(AdapterError, match=r"would answer as the base model.*targets q_proj"):
        loader.prepare(LoRARequest("b", 2, str(write(tmp_path / "b", 1, {name: 8}))))


def test_modules_outside_the_pages_are_checked_too(loader: Any, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.adapters.checkpoint import AdapterError

    def prepare(name: str, rank: int = 4, value: float | None = None) -> Any:
        folder = write(tmp_path / name, 1, {Q_PROJ: 8, "lm_head": rank}, value)
        return loader.prepare(LoRARequest(name, 1, str(folder)))

    assert not prepare("untargeted").loras, "--lora-target-modules left it out"
    loader.facts.stock_names = frozenset({"lm_head"})
    assert list(prepare("good").loras) == ["lm_head"]
    with pytest.raises(AdapterError, match=r"rank 8 in 'lm_head'.*--max-lora-rank 8"):
        prepare("large", rank=8)
    loader.tier.remove(1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(AdapterError, match=r"lm_head.*NaN or Inf in float32"):
            prepare(str(value), value=value)
    assert 1 not in loader.tier
    loader.tier.check_integrity()


@pytest.fixture
def cached(loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loader with a page cache; `converted` counts the adapters that were made from their checkpoints."""
    from vllm_loraserve.adapters.page_cache import PageCache
    from vllm_loraserve.engine import adapter_loader

    def counted(*args: Any, **kwargs: Any) -> None:
        loader.converted += 1
        write_pages(*args, **kwargs)

    loader.cache, loader.converted, write_pages = PageCache(tmp_path / "cache"), 0, adapter_loader.write_pages
    monkeypatch.setattr(adapter_loader, "write_pages", counted)
    return loader


def load(loader: Any, folder: Path) -> bytes:
    """Reads the adapter into the emptied host tier; its pages as they lie there."""
    from vllm.lora.request import LoRARequest

    loader.tier.remove(1)
    loader.tier.slab.view()[:] = b"\xff" * loader.tier.slab.size
    assert loader.prepare(LoRARequest("a", 1, str(folder))).ranks == (8,)
    entry = loader.tier.get(1)
    assert loader.tier.current_checksums(entry) == list(entry.checksums)
    loader.tier.check_integrity()
    return bytes(loader.tier.slab.view(entry.offset, entry.size))


def test_an_adapter_that_the_page_cache_holds_is_not_converted_again(cached: Any, tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", seed=1), write(tmp_path / "b", seed=2)
    pages = load(cached, one)
    assert load(cached, one) == pages
    assert cached.converted == 1
    assert load(cached, write(tmp_path / "copy", seed=1)) == pages, "the content counts, not the path"
    assert cached.converted == 1
    assert load(cached, other) != pages
    assert cached.converted == 2
    assert load(cached, write(one, seed=2)) != pages, "overwritten"
    assert cached.converted == 2, "with what is cached from elsewhere"


def test_pages_of_another_layout_are_not_taken(cached: Any, tmp_path: Path) -> None:
    from vllm_loraserve.adapters.page_cache import PageCache

    folder = write(tmp_path / "a", seed=1)
    pages = load(cached, folder)
    (file,) = cached.cache.directory.iterdir()
    # As another worker of the same model has it: sizes and name alike, another part of the weights.
    file.write_bytes(file.read_bytes().replace(cached.facts.layout.fingerprint.encode(), b"0" * 64))
    assert load(cached, folder) == pages
    assert cached.converted == 2
    cached.cache = PageCache(tmp_path / "elsewhere")
    assert load(cached, folder) == pages
    assert cached.converted == 3


@pytest.mark.parametrize("damage", ["flipped", "short", "garbled", "other ranks"])
def test_a_damaged_file_is_replaced(cached: Any, tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "a", seed=1)
    pages = load(cached, folder)
    (file,) = cached.cache.directory.iterdir()
    whole = file.read_bytes()
    at = whole.index(b"\n") + 100
    broken = {
        "flipped": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        "short": whole[:-1],
        "garbled": b"{" + whole,
        "other ranks": whole.replace(b'"ranks":[8]', b'"ranks":[7]'),
    }[damage]
    assert broken != whole
    file.write_bytes(broken)
    assert load(cached, folder) == pages
    assert cached.converted == 2
    assert file.read_bytes() == whole
    assert load(cached, folder) == pages
    assert cached.converted == 2


def test_a_directory_that_was_overwritten_after_registration_is_refused(loader: Any, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.adapters.checkpoint import AdapterError, inspect_checkpoint
    from vllm_loraserve.engine.side_loading import _status_of, is_transient

    folder = write(tmp_path / "a", seed=1)
    path, registered = str(folder), inspect_checkpoint(folder).sha256
    loader.registered.expect("a", path, registered)
    assert loader.prepare(LoRARequest("a", 1, path)).ranks == (8,)
    assert loader.tier.get(1).digest == registered

    write(folder, seed=2)
    with pytest.raises(AdapterError, match=r"'.*/a' has changed since 'a' was registered from it") as refused:
        loader.prepare(LoRARequest("a", 2, path))
    assert (_status_of(refused.value), is_transient(refused.value)) == (400, False)
    assert 2 not in loader.tier
    loader.tier.check_integrity()

    # Registered anew, under the spelling of its own that the resolver gives it; and what is not the cluster's.
    loader.registered.expect("a", f"{path}/.", inspect_checkpoint(folder).sha256)
    assert loader.prepare(LoRARequest("a", 3, f"{path}/.")).ranks == (8,)
    assert loader.prepare(LoRARequest("own", 4, path)).ranks == (8,)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_checkpoint_tells_whether_its_experts_are_stacked(loader: Any, tmp_path: Path, stacked: bool) -> None:
    """Whatever the request says: one that the registry's resolver made says nothing."""
    import torch
    from safetensors.torch import load_file, save_file
    from vllm.lora.request import LoRARequest

    loader.facts.stock_max_rank = 8
    folder, experts = write(tmp_path / "a", seed=1), 4
    weights = load_file(folder / "adapter_model.safetensors")
    for name in ("experts.base_layer", "experts") if stacked else (f"experts.{i}.up_proj" for i in range(experts)):
        key, rows = f"base_model.model.model.layers.0.mlp.{name}", 8 * experts if stacked else 8
        weights |= {f"{key}.lora_A.weight": torch.ones(rows, 64), f"{key}.lora_B.weight": torch.ones(64, rows)}
    save_file(weights, folder / "adapter_model.safetensors")
    for said in (False, True):
        adapter = loader.prepare(LoRARequest("a", 1, str(folder), is_3d_lora_weight=said))
        assert adapter.is_3d_lora_weight is stacked
        assert adapter.ranks == (8,)


def test_a_file_that_is_overwritten_while_it_is_read_is_refused(
    loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.adapters.checkpoint import AdapterError
    from vllm_loraserve.engine import adapter_loader

    folder = write(tmp_path / "a", seed=1)
    write_pages = adapter_loader.write_pages

    def overwritten(*args: Any) -> None:
        write(folder, seed=2)
        write_pages(*args)

    monkeypatch.setattr(adapter_loader, "write_pages", overwritten)
    with pytest.raises(AdapterError, match="was changed while it was read"):
        loader.prepare(LoRARequest("a", 1, str(folder)))
    assert 1 not in loader.tier
    loader.tier.check_integrity()
    monkeypatch.undo()
    assert loader.prepare(LoRARequest("a", 1, str(folder))).ranks == (8,)


def test_a_clone_is_the_same_adapter_under_another_id() -> None:
    """vLLM clones its first warm-up adapter for the other slots before it captures graphs."""
    from vllm_loraserve.engine.adapter_loader import ServedAdapter

    first = ServedAdapter(1, 8, {})
    first.ranks, first.pages, first.shared_pages = (8, 8), (1, 1), True
    second = first.clone(2)
    assert isinstance(second, ServedAdapter)
    assert (second.id, second.rank, second.ranks, second.pages, second.shared_pages) == (2, 8, (8, 8), (1, 1), True)


def test_a_file_replaced_while_it_is_read_is_another_adapter(make_adapter: Callable[..., Path]) -> None:
    """Its pages would be kept, and given to peers, under the hash of the other."""
    from vllm_loraserve.adapters.checkpoint import content_hash, open_checkpoint
    from vllm_loraserve.adapters.convert import WeightsReader
    from vllm_loraserve.adapters.errors import AdapterError

    folder, same, other = make_adapter("a", 8, 1), make_adapter("b", 8, 2), make_adapter("c", 16, 3)
    checkpoint, weights = open_checkpoint(folder), folder / "adapter_model.safetensors"
    reader, digest = WeightsReader(checkpoint), content_hash(checkpoint)
    entry = next(iter(checkpoint.entries.values()))
    values = reader.tensor(entry).clone()
    (same / "adapter_model.safetensors").rename(weights)
    assert reader.digest() == digest != content_hash(checkpoint)
    assert (reader.tensor(entry) == values).all()
    (other / "adapter_model.safetensors").rename(weights)
    with pytest.raises(AdapterError, match="replaced while it was read"):
        WeightsReader(checkpoint)
