"""Activating an adapter that is in host memory: vLLM's manager and ours, on the same model and adapter, alternating.

Two in-process engines of the same dummy Llama on a CPU; in each, rank-64 adapters are registered (their weights are in
host memory) and made active by turns in one slot. Timed is `activate_adapter`, after which a step can compute with the
adapter (`activate_ratio`): stock zeroes and fills the slot module by module, ours writes page tables that name pages in
host memory, since a CPU's kernels read those alike; a side thread copies the pages into the arena later, and
`ours_in_arena` is the time until they are there. Where the pages were copied before the step, as for a request that
waited for its load, what is left to it is `ours_staged` (`activate_staged_ratio`). Also timed: from its checkpoint into
host memory and a slot, of adapters that are read for the first time, with their files in the page cache (warm) and
dropped from it (cold).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 16, 1024, 2816, 16, 8


def make_model(folder: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": 1024,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(folder: Path, rank: int, seed: int) -> Path:
    import torch
    from safetensors.torch import save_file

    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, kv),
        "self_attn.v_proj": (HIDDEN, kv),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (HIDDEN, INNER),
        "mlp.up_proj": (HIDDEN, INNER),
        "mlp.down_proj": (INNER, HIDDEN),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for module, (n_in, n_out) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator).bfloat16()
            weights[f"{name}.lora_B.weight"] = torch.randn(n_out, rank, generator=generator).bfloat16()
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [m.split(".")[1] for m in shapes]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def start(model: Path, rank: int, held: int, **options: Any) -> tuple[Any, Any]:
    from vllm import LLM

    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        kv_cache_memory_bytes=16 << 20,
        enable_lora=True,
        max_loras=1,
        max_cpu_loras=held,
        max_lora_rank=rank,
        **options,
    )
    return llm, llm.collective_rpc(lambda worker: worker)[0].model_runner.lora_manager


def drop(path: Path) -> None:
    """Asks the system to forget the cached pages of an adapter's weights."""
    with (path / "adapter_model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Side:
    """One engine; `held`: adapters that its host memory holds."""

    def __init__(self, model: Path, rank: int, held: int, **options: Any) -> None:
        self.llm, self.worker_manager = start(model, rank, held, **options)
        self.manager = self.worker_manager._adapter_manager
        self.times: list[float] = []
        self.staged: list[float] = []
        self.in_arena: list[float] = []
        self.loads: dict[str, list[float]] = {"warm": [], "cold": []}

    def load(self, lora_id: int, path: Path) -> float:
        """Seconds from the checkpoint to the slot, as within a step: outside of one, ours only starts a load aside."""
        from vllm.lora.request import LoRARequest

        began = time.perf_counter()
        self.worker_manager.set_active_adapters({LoRARequest(f"a{lora_id}", lora_id, str(path))}, None)
        return time.perf_counter() - began

    def activate(self, lora_id: int, *, staged: bool = False) -> None:
        """`staged`: its pages are copied into the arena first, which is not timed."""
        if staged:
            assert self.worker_manager.stage(lora_id), "no room to stage the adapter"
        if hasattr(self.manager, "in_use"):
            self.manager.in_use = frozenset()
        assert lora_id in self.manager.list_adapters(), "the adapter must be in host memory"
        assert lora_id not in self.manager._active_adapters
        began = time.perf_counter()
        self.manager.activate_adapter(lora_id)
        (self.staged if staged else self.times).append(time.perf_counter() - began)
        if not staged and getattr(self.manager, "lent", None) is not None:
            assert self.manager.lent.settle(timeout=10.0), "the pages never came into the arena"
            self.in_arena.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--adapters", type=int, default=8, help="loads of each kind, every one of another adapter")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        count = options.adapters
        adapters = [make_adapter(Path(folder) / f"a{n}", options.rank, n) for n in range(2 * count + 1)]
        held = len(adapters)
        sides = [
            Side(model, options.rank, held),
            Side(model, options.rank, held, additional_config={"loraserve": {"arena_rank_rows": 3 * options.rank}}),
        ]
        stock, ours = sides
        # For each side its own: what the other one has mapped would stay in memory.
        copies = {
            (path, side): Path(shutil.copytree(path, Path(folder) / f"{path.name}-{at}"))
            for path in adapters
            for at, side in enumerate(sides)
        }
        for copy in copies.values():
            drop(copy)  # written by now, and not while something is timed
        for turn, path in enumerate(adapters):
            kind = "warm" if turn <= count else "cold"
            for side in sides if turn % 2 else reversed(sides):
                own = copies[path, side]
                if kind == "cold":
                    drop(own)
                else:
                    (own / "adapter_model.safetensors").read_bytes()
                seconds = side.load(turn + 1, own)
                if turn:  # the first one warms up
                    side.loads[kind].append(seconds)
        for turn in range(options.repeats):
            for side in sides if turn % 2 else reversed(sides):
                side.activate(turn % 2 + 1)
        for turn in range(options.repeats, 2 * options.repeats):
            ours.activate(turn % 2 + 1, staged=True)
        size = ours.manager.layout.size_bytes(ours.manager.adapter(1).pages)
    stock_s, ours_s, staged_s = (statistics.median(t) for t in (stock.times, ours.times, ours.staged))
    activate_ms = {"stock": stock_s * 1e3, "ours": ours_s * 1e3, "ours_staged": staged_s * 1e3}
    if ours.in_arena:  # not without the native kernels: they copy in `activate_adapter`
        activate_ms["ours_in_arena"] = statistics.median(ours.in_arena) * 1e3
    result = {
        "benchmark": "adapter_load",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/adapter_load.py", *sys.argv[1:]]),
        "device": f"CPU, {os.cpu_count()} cores",
        "model": f"Llama, {LAYERS} layers, hidden {HIDDEN}, bf16, dummy weights",
        "rank": options.rank,
        "adapter_mib": size / 2**20,
        "activate_ms": activate_ms,
        "activate_ratio": stock_s / ours_s,
        "activate_staged_ratio": stock_s / staged_s,
        "load_from_checkpoint_ms": {
            kind: {
                name: {"median": statistics.median(times) * 1e3, "min": min(times) * 1e3, "loads": len(times)}
                for name, times in (("stock", stock.loads[kind]), ("ours", ours.loads[kind]))
            }
            for kind in ("warm", "cold")
        },
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
