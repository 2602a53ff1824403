"""engine/kv_gain.py: the tokens that the log names are those by which vLLM's own KV cache would differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec

from vllm_loraserve.engine.kv_gain import kv_cache_tokens, log_kv_gain

pytestmark = pytest.mark.vllm

LENGTH, BLOCK = 8192, 16
BF16: dict[str, Any] = {"block_size": BLOCK, "dtype": torch.bfloat16}


def full() -> Any:
    return FullAttentionSpec(num_kv_heads=8, head_size=128, **BF16)


def window(size: int) -> Any:
    return SlidingWindowSpec(num_kv_heads=8, head_size=128, sliding_window=size, dcp_sharded=False, **BF16)


def state() -> Any:
    return MambaSpec(block_size=LENGTH, shapes=((64, 512),), dtypes=(torch.bfloat16,))


def layers(*specs: Any) -> dict[str, Any]:
    return {f"model.layers.{index}.self_attn.attn": spec for index, spec in enumerate(specs)}


MODELS = {
    "dense, grouped query attention": layers(*(full() for _ in range(32))),
    "MLA": layers(*(MLAAttentionSpec(num_kv_heads=1, head_size=576, **BF16) for _ in range(27))),
    "sliding window": layers(*(window(1024) for _ in range(32))),
    "hybrid of windows and full attention": layers(*(full() if n % 6 == 5 else window(512) for n in range(24))),
    "hybrid of state and full attention": layers(*(full() if n % 4 == 3 else state() for n in range(8))),
}
BYTES_PER_TOKEN = {
    "dense, grouped query attention": 32 * 2 * 8 * 128 * 2,
    # One latent vector, no V, the same on every worker.
    "MLA": 27 * 576 * 2,
}


@pytest.fixture
def config() -> Any:
    made: Any = VllmConfig()
    made.model_config = SimpleNamespace(max_model_len=LENGTH, original_max_model_len=LENGTH)
    made.lora_config = SimpleNamespace(max_loras=6, max_lora_rank=48)
    made.scheduler_config.max_num_batched_tokens = 2048
    made.cache_config.kv_cache_layout = "BLHNC"
    return made


def cache_of(config: Any, specs: dict[str, Any], nbytes: int) -> Any:
    return get_kv_cache_configs(config, [dict(specs)], [nbytes])[0]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_vllms_own_cache(config: Any, name: str) -> None:
    memory, saved = 24 << 30, 3 << 30
    ours, stock = (cache_of(config, MODELS[name], size) for size in (memory, memory - saved))
    differ = get_kv_cache_capacity(config, ours)[0] - get_kv_cache_capacity(config, stock)[0]
    gained = kv_cache_tokens(config, ours, saved)
    assert gained == pytest.approx(differ, rel=1e-3)
    assert kv_cache_tokens(config, ours, -saved) == pytest.approx(-gained, abs=1)
    if name in BYTES_PER_TOKEN:
        assert gained == pytest.approx(saved / BYTES_PER_TOKEN[name], rel=1e-3)


def test_a_model_without_attention_has_no_tokens(config: Any) -> None:
    assert kv_cache_tokens(config, cache_of(config, {}, 1 << 30), 1 << 30) == 0


def test_the_log_names_the_gain(config: Any, said: list[str]) -> None:
    name = "dense, grouped query attention"
    cache = cache_of(config, MODELS[name], 24 << 30)
    log_kv_gain(config, cache, arena_bytes=1 << 30, stock_bytes=4 << 30)
    log_kv_gain(config, cache, arena_bytes=4 << 30, stock_bytes=1 << 30)
    assert [line.split()[0] for line in said] == ["+24576", "-24576"]
    stock = "KV cache tokens against stock vLLM with --max-loras 6 --max-lora-rank 48: "
    assert all(stock in line for line in said)
    assert said[0].endswith("LoRA takes 3.000 GiB less")
    assert said[1].endswith("LoRA takes 3.000 GiB more")


@pytest.mark.parametrize(
    ("option", "named"),
    [("kv_cache_memory_bytes", "--kv-cache-memory-bytes"), ("num_gpu_blocks_override", "--num-gpu-blocks-override")],
)
def test_a_cache_of_fixed_size_gains_nothing(config: Any, said: list[str], option: str, named: str) -> None:
    cache = cache_of(config, MODELS["MLA"], 24 << 30)
    setattr(config.cache_config, option, 1000)
    log_kv_gain(config, cache, arena_bytes=1 << 30, stock_bytes=4 << 30)
    assert len(said) == 1
    assert named in said[0]
    assert "LoRA takes 3.000 GiB less" in said[0]
    assert "tokens" not in said[0]


@pytest.mark.parametrize("wanted", [True, False])
def test_kernels_are_compiled_once_the_cache_is_there_where_vllm_compiles_its_own(config: Any, wanted: bool) -> None:
    from vllm_loraserve.engine.model_manager import PagedLoRAModelManager

    compiled: list[str] = []
    wrappers = {"language_model": SimpleNamespace(warm_up=lambda: compiled.append("once"))}
    wrappers["lm_head"] = wrappers["language_model"]
    config.kernel_config.enable_jit_warmup = wanted
    manager = object.__new__(PagedLoRAModelManager)
    vars(manager).update(_vllm_config=config, layout=SimpleNamespace(groups=()), punica_wrapper_mapping=wrappers)
    manager.kv_cache_allocated(cache_of(config, MODELS["MLA"], 1 << 30))
    assert compiled == (["once"] if wanted else [])


def test_a_worker_tells_its_manager_what_the_cache_has_become() -> None:
    from vllm_loraserve.engine.worker_hooks import wrap_initialize_from_config

    order: list[Any] = []
    hooked = wrap_initialize_from_config(lambda self, configs: order.append("allocated"))
    tells, stock = {"lora_manager": SimpleNamespace(kv_cache_allocated=order.append)}, {"lora_manager": None}
    for runner in (tells, stock, {}):
        worker: Any = SimpleNamespace(global_rank=1, worker=SimpleNamespace(model_runner=SimpleNamespace(**runner)))
        hooked(worker, ["first", "mine"])
    assert order == ["allocated", "mine", "allocated", "allocated"]
