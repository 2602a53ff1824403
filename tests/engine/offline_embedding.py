"""Run as a program by test_lora_manager_vllm.py: adapters on embedding, lm_head and attention, stock beside ours.

Two in-process engines of the same tiny dummy Llama. The log-probabilities of every token must agree; and they must
differ between adapters, so that agreement is no accident. Argument: a directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from manager_machine import HIDDEN, LAYERS, make_model
from safetensors.torch import save_file

VOCAB, RANK = 256, 8


def write_adapter(folder: Path, parts: tuple[str, ...], seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    files = {}
    if "q_proj" in parts:
        for layer in range(LAYERS):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            files[f"{name}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator)
            files[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, RANK, generator=generator)
    if "lm_head" in parts:
        files["base_model.model.lm_head.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator)
        files["base_model.model.lm_head.lora_B.weight"] = torch.randn(VOCAB, RANK, generator=generator)
    if "embed_tokens" in parts:
        name = "base_model.model.model.embed_tokens"
        files[f"{name}.lora_embedding_A"] = torch.randn(RANK, VOCAB, generator=generator)
        files[f"{name}.lora_embedding_B"] = torch.randn(HIDDEN, RANK, generator=generator)
    folder.mkdir(parents=True)
    save_file(files, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(parts)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def answers(model: Path, adapters: list[Path], **options: Any) -> list[list[tuple[int, float]]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=8,
        kv_cache_memory_bytes=16 << 20,
        enable_lora=True,
        # One slot more than adapters: stock's CPU kernels give the last slot's adapter to base requests.
        max_loras=len(adapters) + 1,
        max_lora_rank=RANK,
        **options,
    )
    requests = [None, *(LoRARequest(path.name, n, str(path)) for n, path in enumerate(adapters, 1))]
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": [7, 30, 200, 45, 11]} for _ in requests]
    done = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
    return [
        [
            (token, step[token].logprob)
            for token, step in zip(d.outputs[0].token_ids, d.outputs[0].logprobs, strict=True)
        ]
        for d in done
    ]


def main() -> None:
    folder = Path(sys.argv[1])
    model = make_model(folder)
    kinds = (("lm_head",), ("embed_tokens",), ("q_proj", "lm_head", "embed_tokens"), ("q_proj",))
    adapters = [write_adapter(folder / "-".join(parts), parts, seed) for seed, parts in enumerate(kinds)]
    stock = answers(model, adapters)
    ours = answers(model, adapters, additional_config={"loraserve": {}})
    for kind, want, got in zip(("base", *kinds), stock, ours, strict=True):
        assert [token for token, _ in got] == [token for token, _ in want], (kind, want, got)
        for (_, a), (_, b) in zip(want, got, strict=True):
            assert abs(a - b) < 1e-3, (kind, want, got)
    # All but the last: attention hardly matters in a model of tiny random weights.
    assert len({str(answer) for answer in ours[:-1]}) == len(ours) - 1
    print("EMBEDDING PASSED")


if __name__ == "__main__":
    main()
