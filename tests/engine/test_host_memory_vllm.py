"""engine/host_memory.py: the host tier and a KV cache in the same memory both fit, or somebody is told."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_loraserve import cgroup
from vllm_loraserve.adapters.layout import Layout, ModuleShape, build_layout
from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine.host_memory import host_tier_bytes, make_host_tier, shortage
from vllm_loraserve.memory import extension

pytestmark = pytest.mark.vllm

GIB = 1 << 30
TIER = LoRAServeConfig(host_gib=1 / 16)


@pytest.fixture
def layout() -> Layout:
    module = ModuleShape("o", "o", 4096, (4096,))
    return build_layout([module], model="tiny", dtype="bfloat16", page_rows=8, tp_rank=0, tp_size=1)


def config(kv_bytes: int | None, workers: int = 1) -> Any:
    return SimpleNamespace(
        lora_config=SimpleNamespace(max_loras=2, max_cpu_loras=4, max_lora_rank=16),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=kv_bytes),
        parallel_config=SimpleNamespace(local_world_size=workers),
    )


def touched(tier: Any) -> int:
    """Bytes of the tier's slab that have their memory, as the kernel counts them for its memfd."""
    return os.fstat(tier.slab.fd).st_blocks * 512


@pytest.mark.parametrize(
    ("on_cpu", "kv_bytes", "whole"), [(True, None, True), (True, 64 << 20, False), (False, None, False)]
)
def test_memory_is_taken_at_once_where_vllm_gives_the_rest_to_the_kv_cache(
    layout: Layout, on_cpu: bool, kv_bytes: int | None, whole: bool
) -> None:
    with make_host_tier(TIER, layout, config(kv_bytes), on_cpu).slab as slab:
        assert slab.size == GIB // 16
        assert (touched(SimpleNamespace(slab=slab)) == slab.size) is whole


def test_a_shortage_is_named(layout: Layout, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "available_memory", lambda: GIB)
    make_host_tier(TIER, layout, config(GIB // 2), on_cpu=True)
    assert said == []
    make_host_tier(TIER, layout, config(GIB), on_cpu=True)
    make_host_tier(TIER, layout, config(GIB // 2, workers=2), on_cpu=True)
    assert said == [
        "0.06 GiB of host tier and 1.00 GiB of KV cache are more than the 1.00 GiB of host memory that are left; "
        "lower --loraserve-config.host_gib or --max-cpu-loras, or the KV cache.",
        "0.12 GiB of host tier and 1.00 GiB of KV cache (2 workers) are more than the 1.00 GiB of host memory that are "
        "left; lower --loraserve-config.host_gib or --max-cpu-loras, or the KV cache.",
    ]
    monkeypatch.setattr(cgroup, "available_memory", lambda: GIB // 32)
    with pytest.raises(
        ValueError, match=r"^0.06 GiB of host tier are more than the 0.03 GiB .* lower .*max-cpu-loras\.$"
    ):
        make_host_tier(TIER, layout, config(None), on_cpu=True)


def test_a_tier_that_is_not_page_locked_beside_a_gpu_is_named(
    layout: Layout, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "PINNED", 0)  # not granted, whatever this machine has
    make_host_tier(TIER, layout, config(None), on_cpu=False)
    assert [line.split(" (")[0] for line in said] == ["The host tier is not page-locked"]


def test_what_fits_is_no_shortage() -> None:
    assert shortage(3, 4, 2, 14) is None
    assert shortage(3, 4, 2, 13) is not None


def test_the_default_is_the_adapters_that_the_flags_name(layout: Layout) -> None:
    lora = config(None).lora_config
    rank_16, rank_256 = 2 * layout.bytes_per_page_set, 32 * layout.bytes_per_page_set
    assert host_tier_bytes(LoRAServeConfig(), layout, lora) == 5 * (rank_16 + 4096) + rank_256
    assert host_tier_bytes(LoRAServeConfig(host_gib=2), layout, lora) == 2 * GIB
