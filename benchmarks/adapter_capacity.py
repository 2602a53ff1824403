"""How many adapters of mixed ranks fit the bytes in which stock vLLM holds sixteen; measured from the allocations.

In-process engines of a dummy Llama on a CPU: stock with --max-loras 16 --max-lora-rank 128, whose stacked tensors are
added up; and ours with an arena of at most as many bytes and 64 slots, into which 64 adapters of ranks 8..128 are
activated one after another, without evicting any. Afterwards each must be found in the arena, to its last rank row.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import adapter_load

MIX = Counter({8: 38, 16: 13, 32: 7, 64: 4, 128: 2})
STOCK_SLOTS, STOCK_RANK = 16, 128


def main() -> None:
    import torch
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument(
        "--layers", type=int, default=4, help="layers of the dummy model; the ratio does not depend on it"
    )
    options = parser.parse_args()
    adapter_load.LAYERS = options.layers
    ranks = list(MIX.elements())
    random.Random(0).shuffle(ranks)
    common = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "enforce_eager": True,
        "max_model_len": 128,
        "kv_cache_memory_bytes": 16 << 20,
        "enable_lora": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        model = adapter_load.make_model(Path(folder) / "model")
        paths = [adapter_load.make_adapter(Path(folder) / f"a{n}", rank, n) for n, rank in enumerate(ranks)]
        stock = LLM(str(model), max_loras=STOCK_SLOTS, max_lora_rank=STOCK_RANK, max_num_seqs=16, **common)
        worker = stock.collective_rpc(lambda worker: worker)[0]
        layers = worker.model_runner.lora_manager._adapter_manager.modules
        stock_bytes = sum(
            tensor.untyped_storage().nbytes()
            for layer in layers.values()
            if isinstance(layer.lora_a_stacked, tuple)
            for tensor in (*layer.lora_a_stacked, *layer.lora_b_stacked)
        )
        ours = LLM(
            str(model),
            max_loras=len(ranks),
            max_lora_rank=8,
            max_num_seqs=len(ranks),
            additional_config={"loraserve": {"arena_gib": stock_bytes / 2**30, "host_gib": 2.0}},
            **common,
        )
        worker = ours.collective_rpc(lambda worker: worker)[0]
        worker_manager = worker.model_runner.lora_manager
        requests = [LoRARequest(f"a{n}", n + 1, str(path)) for n, path in enumerate(paths)]
        worker_manager.set_active_adapters(set(), None)
        for request in requests:
            worker_manager.set_active_adapters({request}, None)
        manager = worker_manager._adapter_manager
        manager.check_integrity()
        resident = [lora for lora in manager.lora_index_to_id if lora is not None]
        arena_bytes = manager.arena.flat.untyped_storage().nbytes()
        free_rows = min(manager.arena.free_pages()) * manager.layout.page_rows
        from safetensors.torch import load_file

        name, layer = next((n, m) for n, m in manager.paged_modules.items() if n.endswith("0.self_attn.o_proj"))
        slots, page = manager.lora_index_to_id, manager.layout.page_rows
        for request, rank in zip(requests, ranks, strict=True):
            wanted = load_file(Path(request.lora_path) / "adapter_model.safetensors")
            linear = layer.paged_linear
            slot = slots.index(request.lora_int_id)
            assert int(linear.ranks[0, slot]) == rank
            last = rank - 1
            start = int(linear.page_table[slot, last // page]) * linear.page_stride + linear.a_offsets[0]
            start += last % page * linear.in_size
            row = linear.arena[start : start + linear.in_size]
            assert torch.equal(row, wanted[f"base_model.model.{name}.lora_A.weight"][last])
    result = {
        "benchmark": "adapter_capacity",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/adapter_capacity.py", *sys.argv[1:]]),
        "device": f"CPU, {os.cpu_count()} cores",
        "mix": {str(rank): count for rank, count in sorted(MIX.items())},
        "stock": {"adapters": STOCK_SLOTS, "bytes": stock_bytes},
        "ours": {"adapters": len(resident), "bytes": arena_bytes, "free_rank_rows": free_rows},
        "adapters_ratio": len(resident) / STOCK_SLOTS * (stock_bytes / arena_bytes if arena_bytes > stock_bytes else 1),
    }
    print(json.dumps(result, indent=1))
    if len(resident) != len(ranks) or arena_bytes > stock_bytes:
        raise SystemExit("not all adapters fit the bytes that stock takes")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
