"""Run as a program by test_tensor_parallel_vllm.py: one engine over a tiny Llama, base and adapters in one batch.

Arguments: a directory (the model and the adapters are made there if need be), and a JSON object of arguments of
vllm.LLM. Prints tokens and log-probabilities of every request, and what each worker holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 2, 256
HEAD = 32
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD),
    "self_attn.o_proj": (HEADS * HEAD, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "all-4": (4, tuple(SHAPES)),
    "all-24": (24, tuple(SHAPES)),
    "attention-8": (8, ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")),
    "mlp-13": (13, ("mlp.gate_proj", "mlp.down_proj")),
}
"""Name -> (rank, targets). 13 does not divide by two."""


def make_model(folder: Path) -> Path:
    """Random weights on disk, large enough that every layer sways the answer; the same for every number of workers."""
    model = folder / "model"
    if model.exists():
        return model
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    tensors = {"model.embed_tokens.weight": weight(VOCAB, HIDDEN) * 8, "lm_head.weight": weight(VOCAB, HIDDEN) * 2}
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": weight(n_out, n_in) for name, (n_in, n_out) in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN)
    model.mkdir(parents=True)
    save_file(tensors, model / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }
    (model / "config.json").write_text(json.dumps(config))
    return model


def make_adapter(folder: Path, name: str) -> Path:
    path = folder / name
    if path.exists():
        return path
    rank, targets = ADAPTERS[name]
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in range(LAYERS):
        for module in targets:
            n_in, n_out = SHAPES[module]
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator) / n_in**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n_out, rank, generator=generator) / rank**0.5
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    leaves = [module.rsplit(".", 1)[-1] for module in targets]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": leaves}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    llm = LLM(
        str(make_model(folder)),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=16,
        kv_cache_memory_bytes=16 << 20,
        # One slot more than adapters: stock's CPU kernels give the last slot's adapter to base requests.
        max_loras=len(ADAPTERS) + 1,
        **options,
    )
    requests: dict[str, Any] = {"base": None}
    requests |= {name: LoRARequest(name, i, str(make_adapter(folder, name))) for i, name in enumerate(ADAPTERS, 1)}
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, detokenize=False)
    jobs = [(name, prompt) for prompt in ([7, 30, 200, 45, 11], [99, 3]) for name in requests]
    done = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in jobs],
        params,
        lora_request=[requests[name] for name, _ in jobs],
        use_tqdm=False,
    )
    answers: dict[str, list[list[tuple[int, float]]]] = {}
    for (name, _), output in zip(jobs, done, strict=True):
        best = output.outputs[0]
        steps = zip(best.token_ids, best.logprobs or [], strict=True)
        answers.setdefault(name, []).append([(token, step[token].logprob) for token, step in steps])
    print("RESULT " + json.dumps({"answers": answers, "workers": llm.collective_rpc(_worker)}))


def _worker(worker: Any) -> dict[str, Any]:
    """Runs in each worker: its share of the adapters."""
    from vllm_loraserve.engine.lora_shapes import lora_shapes

    manager = worker.model_runner.lora_manager._adapter_manager
    layout = getattr(manager, "layout", None)
    if layout is None:
        return {}
    manager.check_integrity()
    places = {place.module: place for group in layout.groups for place in group.places}
    return {
        "fingerprint": layout.fingerprint,
        "rows": manager.arena.rank_rows,
        "shapes": lora_shapes(manager),
        "paged": len(manager.paged_modules),
        "on_vllms_path": sorted({type(layer).__name__ for layer in manager.modules.values()}),
        "down_proj_in": next((place.in_size for name, place in places.items() if name.endswith("down_proj")), None),
    }


if __name__ == "__main__":
    main()
