"""Small host tiers for tests, with adapters of random weights under the names of NAMES."""

from __future__ import annotations

import torch

from vllm_loraserve.adapters.layout import Layout, ModuleShape, build_layout
from vllm_loraserve.memory.host_tier import HostTier
from vllm_loraserve.transfer.host_store import HostTierStore
from vllm_loraserve.transfer.pages import Wanted

NAMES = {1: "a", 2: "b", 3: "c"}


def layout(tp_rank: int = 0) -> Layout:
    modules = [ModuleShape("q", "attention", 64, (64,)), ModuleShape("up", "mlp", 64, (96,))]
    return build_layout(modules, model="tiny", dtype="float32", page_rows=8, tp_rank=tp_rank, tp_size=2)


def store(size: int = 1 << 20, tp_rank: int = 0) -> HostTierStore:
    keys = {name: key for key, name in NAMES.items()}
    return HostTierStore(HostTier(layout(tp_rank), size), name_of=NAMES.get, key_of=keys.get)


def fill(holder: HostTierStore, key: int, ranks: tuple[int, ...], seed: int) -> None:
    entry = holder.tier.create(key, f"sha-{seed}", ranks)
    generator = torch.Generator().manual_seed(seed)
    for target in holder.tier.targets(entry):
        if target is not None:
            target.copy_(torch.rand(target.shape, generator=generator))
    holder.tier.commit(entry)


def content(holder: HostTierStore, key: int) -> bytes:
    entry = holder.tier.get(key)
    return bytes(holder.slab.view(entry.offset, entry.size))


def wanted(holder: HostTierStore, name: str = "a") -> Wanted:
    return Wanted(name=name, layout=holder.tier.layout.fingerprint)
