"""adapters/checkpoint.py: what a checkpoint is said to be, and every way in which one is refused."""

import json
import math
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from adapter_files import SHAPES, edit_config, write_adapter
from safetensors.numpy import load_file, save_file

from vllm_loraserve.adapters.checkpoint import (
    AdapterError,
    inspect_checkpoint,
    open_checkpoint,
    resolve_source,
)
from vllm_loraserve.adapters.shapes import OTHERS, merged

MODULES = {name: [sizes] for name, sizes in SHAPES.items()}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def refused(kind: str, path: Path, *words: str, **options: object) -> str:
    with pytest.raises(AdapterError) as caught:
        inspect_checkpoint(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert caught.value.kind == kind, message
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_describes_a_plain_adapter(adapter: Path) -> None:
    info = inspect_checkpoint(adapter, module_shapes=MODULES, check_values=True)
    assert info.rank == 8
    assert info.target_modules == ("down_proj", "k_proj", "q_proj", "v_proj")
    assert info.module_ranks == ((8, 8),)
    assert info.size_bytes == (adapter / "adapter_model.safetensors").stat().st_size
    assert (info.base_model, info.alpha, info.use_rslora, info.dtype) == ("base", 16.0, False, "F32")
    assert len(info.sha256) == 64


def test_rank_pattern_and_a_subset_of_modules(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", rank=4, ranks={"q_proj": 32}, modules=("q_proj", "v_proj"), layers=3)
    info = inspect_checkpoint(path)
    assert (info.rank, info.target_modules) == (32, ("q_proj", "v_proj"))
    assert info.module_ranks == ((4, 3), (32, 3))


def test_scaling_follows_alpha_rslora_and_patterns(tmp_path: Path) -> None:
    path = write_adapter(
        tmp_path / "a", rank=4, alpha=6, ranks={"q_proj": 16}, use_rslora=True, alpha_pattern={"v_proj": 10}
    )
    scaling = {module.suffix: module.scaling for module in open_checkpoint(path).modules}
    assert scaling["k_proj"] == pytest.approx(6 / math.sqrt(4))
    assert scaling["q_proj"] == pytest.approx(6 / math.sqrt(16))
    assert scaling["v_proj"] == pytest.approx(10 / math.sqrt(4))
    edit_config(path, use_rslora=False)
    scaling = {module.suffix: module.scaling for module in open_checkpoint(path).modules}
    assert scaling == {"k_proj": 1.5, "q_proj": 6 / 16, "v_proj": 2.5, "down_proj": 1.5}


def test_a_pattern_matches_at_a_dot_and_the_first_match_wins(adapter: Path) -> None:
    edit_config(adapter, alpha_pattern={"layers.1.self_attn.q_proj": 80, "q_proj": 8, "proj": 1000})
    scaling = {module.name: module.scaling for module in open_checkpoint(adapter).modules}
    assert scaling["model.layers.0.self_attn.q_proj"] == 1.0
    assert scaling["model.layers.1.self_attn.q_proj"] == 10.0
    assert scaling["model.layers.1.self_attn.k_proj"] == 2.0


def test_hash_is_of_meaning_not_of_place(adapter: Path, tmp_path: Path) -> None:
    first = inspect_checkpoint(adapter).sha256
    assert inspect_checkpoint(write_adapter(tmp_path / "elsewhere")).sha256 == first
    edit_config(adapter, base_model_name_or_path="renamed", target_modules=["q_proj"])
    assert inspect_checkpoint(adapter).sha256 == first
    edit_config(adapter, lora_alpha=17)
    assert inspect_checkpoint(adapter).sha256 != first
    assert inspect_checkpoint(write_adapter(tmp_path / "other", seed=1)).sha256 != first


def test_missing_things(tmp_path: Path, adapter: Path) -> None:
    refused("not_found", tmp_path / "nowhere", "nowhere")
    (adapter / "adapter_config.json").rename(adapter / "kept.json")
    refused("invalid", adapter, "adapter_config.json")
    (adapter / "kept.json").rename(adapter / "adapter_config.json")
    (adapter / "adapter_model.safetensors").unlink()
    refused("invalid", adapter, "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_unread(adapter: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(adapter / "exploded"),)  # type: ignore[return-value]

    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(pickle.dumps(Bomb()))
    refused("unsupported", adapter, name)
    assert not (adapter / "exploded").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": 8}', '{"r": "eight", "lora_alpha": 8}', "\xff\xfe"])
def test_a_broken_config(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text, encoding="latin-1")
    refused("invalid", adapter, "adapter_config.json")


@pytest.mark.parametrize("kind", ["fifo", "directory", "huge"])
def test_a_config_that_is_no_small_file_is_refused_unread(adapter: Path, kind: str) -> None:
    config = adapter / "adapter_config.json"
    config.unlink()
    if kind == "fifo":
        os.mkfifo(config)  # reading it would wait for a writer
    elif kind == "directory":
        config.mkdir()
    else:
        with config.open("wb") as file:
            file.truncate(1 << 40)
    refused("invalid", adapter, "adapter_config.json", "16 MiB")


@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        ({"use_dora": True}, "unsupported", "DoRA"),
        ({"bias": "all"}, "unsupported", "bias"),
        ({"lora_bias": True}, "unsupported", "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "unsupported", "lm_head"),
        ({"init_lora_weights": "pissa"}, "unsupported", "pissa"),
        ({"peft_type": "IA3"}, "unsupported", "IA3"),
        ({"layer_replication": [[0, 2]]}, "unsupported", "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "unsupported", "aLoRA".replace("aLoRA", "Activated LoRA")),
        ({"use_qalora": True}, "unsupported", "QALoRA"),
        ({"r": 0}, "invalid", "rank 0"),
        ({"rank_pattern": {"q_proj": -1}}, "invalid", "q_proj"),
        ({"rank_pattern": {"(": 4}}, "invalid", "("),
        ({"r": 16}, "mismatch", "16"),
    ],
)
def test_config_features_that_are_refused(adapter: Path, change: dict[str, object], kind: str, word: str) -> None:
    edit_config(adapter, **change)
    refused(kind, adapter, word)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", None])
def test_plain_initialisations_are_served(adapter: Path, init: object) -> None:
    edit_config(adapter, init_lora_weights=init)
    assert inspect_checkpoint(adapter).rank == 8


def test_rank_over_the_limit(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", rank=4, ranks={"q_proj": 40})
    refused("too_large", path, "40", "32", max_rank=32)
    assert inspect_checkpoint(path, max_rank=40).rank == 40


def test_shapes_of_another_model(adapter: Path) -> None:
    refused("mismatch", adapter, "q_proj", "(64, 128)", module_shapes={**MODULES, "q_proj": [(64, 128)]})
    refused("mismatch", adapter, "down_proj", module_shapes={"q_proj": [(64, 64)]})


def test_a_module_may_have_several_sizes_or_be_left_to_the_load(adapter: Path) -> None:
    several = {**MODULES, "q_proj": [(64, 64), (64, 128)]}
    assert inspect_checkpoint(adapter, module_shapes=several).rank == 8
    refused("mismatch", adapter, "(64, 128) or (96, 64)", module_shapes={**several, "q_proj": [(96, 64), (64, 128)]})
    assert inspect_checkpoint(adapter, module_shapes={**MODULES, "q_proj": []}).rank == 8
    assert inspect_checkpoint(adapter, module_shapes={OTHERS: [], "q_proj": [(64, 64)]}).rank == 8
    refused("mismatch", adapter, "q_proj", module_shapes={OTHERS: [], "q_proj": [(1, 1)]})


def test_experts_and_embeddings_are_refused_where_the_model_has_none(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    places = {"model.layers.0.mlp.experts.0.up_proj": (".lora_A.weight", ".lora_B.weight")}
    places["model.embed_tokens"] = (".lora_embedding_A", ".lora_embedding_B")
    for name, (a, b) in places.items():
        more = {f"base_model.model.{name}{a}": np.ones((8, 5), np.float32)}
        more[f"base_model.model.{name}{b}"] = np.ones((7, 8), np.float32)
        save_file({**weights, **more}, adapter / "adapter_model.safetensors")
        refused("mismatch", adapter, name, "train the adapter on this base model", module_shapes=MODULES)
        known = "experts" if "experts" in name else "embed_tokens"
        for table in ({**MODULES, known: []}, {**MODULES, OTHERS: []}):
            assert inspect_checkpoint(adapter, module_shapes=table).rank == 8, "sizes are for the load"


def test_tables_of_workers_and_instances_are_put_together() -> None:
    one, two = {"q_proj": [(4, 8)], "lm_head": []}, {"q_proj": ((4, 8), (4, 6)), "o_proj": [(8, 4)]}
    assert merged([one, two]) == {"lm_head": (), "o_proj": ((8, 4),), "q_proj": ((4, 6), (4, 8))}
    assert merged([]) == {}


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1, -4000])
def test_truncated_weights(adapter: Path, keep: int) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused("invalid", adapter, "safetensors")


def test_trailing_bytes_are_not_safetensors(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    refused("invalid", adapter, "complete")


def _rewrite_header(adapter: Path, edit: object) -> None:
    weights = adapter / "adapter_model.safetensors"
    data = weights.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = edit(json.loads(data[8 : 8 + length]))  # type: ignore[operator]
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    weights.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def test_hostile_headers(adapter: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    good = (adapter / "adapter_model.safetensors").read_bytes()

    def change(**fields: object) -> object:
        return lambda header: {**header, name: {**header[name], **fields}}

    for edit in (
        change(data_offsets=[0, 10**15]),
        change(data_offsets=[-8, 8]),
        change(data_offsets="ab"),
        change(shape=[8, 640]),
        change(shape=[8.5, 64]),
        lambda header: {**header, "extra": "text"},
        lambda header: b"[1, 2]",
        lambda header: b'{"a": ' * 20000,
    ):
        (adapter / "adapter_model.safetensors").write_bytes(good)
        _rewrite_header(adapter, edit)
        refused("invalid", adapter)
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**62) + good)
    refused("invalid", adapter)
    (adapter / "adapter_model.safetensors").write_bytes(good)
    _rewrite_header(adapter, change(dtype="F8_E4M3"))
    refused("unsupported", adapter, "F8_E4M3")


def _tensors(adapter: Path) -> dict[str, np.ndarray]:
    return {key: value.copy() for key, value in load_file(adapter / "adapter_model.safetensors").items()}


def test_half_a_pair_and_foreign_tensors(adapter: Path) -> None:
    tensors = _tensors(adapter)
    name = "base_model.model.model.layers.1.mlp.down_proj"
    half = {key: value for key, value in tensors.items() if key != f"{name}.lora_B.weight"}
    save_file(half, adapter / "adapter_model.safetensors")
    refused("invalid", adapter, "down_proj")
    extra = {**tensors, f"{name}.lora_magnitude_vector": np.ones(3, np.float32)}
    save_file(extra, adapter / "adapter_model.safetensors")
    refused("unsupported", adapter, "lora_magnitude_vector")
    save_file(
        {**tensors, f"{name}.lora_A.weight": np.ones((7, 96), np.float32)},
        adapter / "adapter_model.safetensors",
    )
    refused("mismatch", adapter, "down_proj")
    save_file({}, adapter / "adapter_model.safetensors")
    refused("invalid", adapter, "no LoRA weights")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: type) -> None:
    path = write_adapter(tmp_path / "a", dtype=dtype)
    inspect_checkpoint(path, check_values=True)
    tensors = _tensors(path)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors[name][3, 2] = value
    save_file(tensors, path / "adapter_model.safetensors")
    assert inspect_checkpoint(path).rank == 8
    refused("invalid", path, name, check_values=True)


def test_bfloat16_values(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    path = write_adapter(tmp_path / "a")
    tensors = {key: torch.from_numpy(value).bfloat16() for key, value in _tensors(path).items()}
    save_torch(tensors, path / "adapter_model.safetensors")
    assert inspect_checkpoint(path, check_values=True).dtype == "BF16"
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_torch(tensors, path / "adapter_model.safetensors")
    refused("invalid", path, "NaN", check_values=True)


def test_errors_survive_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(AdapterError("mismatch", "why")))
    assert (error.kind, str(error)) == ("mismatch", "why")


class TestResolveSource:
    def forbidden(self, source: object, roots: list[Path], kind: str = "forbidden") -> None:
        with pytest.raises(AdapterError) as caught:
            resolve_source(str(source), roots)
        assert caught.value.kind == kind, str(caught.value)

    def test_inside_a_root(self, adapter: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        assert resolve_source(str(adapter), [other, tmp_path]) == adapter.resolve()
        assert resolve_source("adapter", [other, tmp_path]) == adapter.resolve()
        self.forbidden(adapter, [other])
        self.forbidden(adapter, [])

    def test_a_name_that_only_starts_like_the_root(self, adapter: Path, tmp_path: Path) -> None:
        self.forbidden(write_adapter(tmp_path / "adapter2"), [adapter])

    def test_no_parent_steps(self, adapter: Path, tmp_path: Path) -> None:
        self.forbidden(tmp_path / "x" / ".." / "adapter", [tmp_path])
        self.forbidden("../adapter", [tmp_path / "x"])

    def test_links_count_where_they_lead(self, adapter: Path, tmp_path: Path) -> None:
        root = tmp_path / "root"
        root.mkdir()
        (root / "link").symlink_to(adapter)
        self.forbidden("link", [root])
        assert resolve_source("link", [root, tmp_path]) == adapter.resolve()
        inner = write_adapter(root / "inner")
        weights = inner / "adapter_model.safetensors"
        weights.rename(tmp_path / "weights")
        weights.symlink_to(tmp_path / "weights")
        self.forbidden(inner, [root])

    def test_what_does_not_exist(self, tmp_path: Path) -> None:
        self.forbidden("nothing", [tmp_path], "not_found")
        self.forbidden(tmp_path / "nothing", [tmp_path], "not_found")
        self.forbidden("/etc/nothing-there", [tmp_path])
        self.forbidden("", [tmp_path], "invalid")
        self.forbidden("a\0b", [tmp_path], "invalid")

    def test_hub_ids_come_from_the_local_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = pytest.importorskip("huggingface_hub")
        calls = []

        def download(repo: str, *, local_files_only: bool, allow_patterns: list[str]) -> str:
            calls.append((repo, local_files_only))
            if repo == "org/absent":
                raise OSError("not cached")
            return str(tmp_path)

        monkeypatch.setattr(hub, "snapshot_download", download)
        assert resolve_source("org/name", []) == tmp_path
        assert resolve_source("org/name", [], allow_download=True) == tmp_path
        assert calls == [("org/name", True), ("org/name", False)]
        for other in ("örg/name", "org/näme", "org/name\u0661"):
            with pytest.raises(AdapterError, match="There is no adapter"):
                resolve_source(other, [], allow_download=True)
        assert len(calls) == 2, "no id that the hub could have"
        self.forbidden("org/absent", [], "not_found")
