"""Run as a program by test_lora_manager_vllm.py: adapters of a classifier, its head included, stock beside ours.

Two in-process engines of the same tiny Llama with a score head of three labels. Adapters: attention alone, A and B on
the head, a whole head of its own (PEFT's `modules_to_save`) of four labels beside attention. Scores must agree, and
differ between adapters. Argument: a directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from offline_tensor_parallel import HEAD, HEADS, HIDDEN, KV_HEADS, LAYERS, make_model
from safetensors.torch import load_file, save_file

LABELS, OWN_LABELS, RANK = 3, 4, 8
KINDS = ("attention", "head", "own-head")


def make_classifier(folder: Path) -> Path:
    model = make_model(folder)
    weights = load_file(model / "model.safetensors")
    weights.pop("lm_head.weight")
    weights["score.weight"] = torch.randn(LABELS, HIDDEN, generator=torch.Generator().manual_seed(5)) / HIDDEN**0.5
    save_file(weights, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    labels = {str(i): f"L{i}" for i in range(LABELS)}
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": labels, "num_labels": LABELS}
    (model / "config.json").write_text(json.dumps(config))
    return model


def write_adapter(folder: Path, kind: str, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)

    def pair(name: str, n_in: int, n_out: int) -> dict[str, torch.Tensor]:
        return {
            f"base_model.model.{name}.lora_A.weight": torch.randn(RANK, n_in, generator=generator) / n_in**0.5,
            f"base_model.model.{name}.lora_B.weight": torch.randn(n_out, RANK, generator=generator) / RANK**0.5,
        }

    tensors: dict[str, torch.Tensor] = {}
    targets = []
    if kind != "head":
        targets += ["q_proj", "v_proj"]
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}.self_attn"
            tensors |= pair(f"{prefix}.q_proj", HIDDEN, HEADS * HEAD) | pair(
                f"{prefix}.v_proj", HIDDEN, KV_HEADS * HEAD
            )
    if kind == "head":
        targets += ["score"]
        tensors |= pair("score", HIDDEN, LABELS)
    saved = ["score"] if kind == "own-head" else None
    if saved:
        tensors["base_model.model.score.weight"] = torch.randn(OWN_LABELS, HIDDEN, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": saved}))
    return folder


def scores(model: Path, adapters: list[Path], **options: Any) -> list[list[float]]:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(model),
        runner="pooling",
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=8,
        kv_cache_memory_bytes=16 << 20,
        enable_lora=True,
        # One slot more than adapters: stock's CPU kernels give the last slot's adapter to base requests.
        max_loras=len(adapters) + 1,
        max_lora_rank=RANK,
        max_lora_cls_labels=OWN_LABELS,
        **options,
    )
    requests = [None, *(LoRARequest(path.name, n, str(path)) for n, path in enumerate(adapters, 1))]
    prompts = [{"prompt_token_ids": [7, 30, 200, 45, 11]} for _ in requests]
    done = llm.encode(prompts, pooling_task="classify", lora_request=requests, use_tqdm=False)
    if options:
        # Whoever has no head of its own lies in pages alone.
        manager = llm.collective_rpc(lambda worker: worker)[0].model_runner.lora_manager._adapter_manager
        manager.check_integrity()
        assert {type(layer).__name__ for layer in manager.modules.values()} >= {"ClassificationHeadWithLoRA"}
        assert any(name.endswith("qkv_proj") for name in manager.paged_modules)
    return [d.outputs.data.tolist() for d in done]


def main() -> None:
    folder = Path(sys.argv[1])
    model = make_classifier(folder)
    adapters = [write_adapter(folder / kind, kind, seed) for seed, kind in enumerate(KINDS)]
    stock = scores(model, adapters)
    ours = scores(model, adapters, additional_config={"loraserve": {}})
    assert [len(row) for row in stock] == [LABELS, LABELS, LABELS, OWN_LABELS], stock
    for kind, want, got in zip(("base", *KINDS), stock, ours, strict=True):
        assert len(got) == len(want), (kind, want, got)
        assert max(abs(a - b) for a, b in zip(want, got, strict=True)) < 1e-4, (kind, want, got)
    for n, row in enumerate(ours):
        for other in ours[:n]:
            assert len(row) != len(other) or max(abs(a - b) for a, b in zip(row, other, strict=True)) > 1e-3, ours
    print("CLASSIFIER PASSED")


if __name__ == "__main__":
    main()
