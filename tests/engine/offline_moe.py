"""Run as a program by test_lora_manager_vllm.py: adapters on the experts of a mixture of experts, stock beside ours.

With LoRA vLLM runs experts on GPUs alone. So the experts' LoRA layer is made without its kernel and passes its input
on, in both engines; all else is real: the adapters are loaded, packed, activated, evicted and activated again. What
then lies in the experts' stacks must be what stock puts there, bit for bit, beside attention layers in pages. Argument:
a directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, EXPERTS, LAYERS, RANK = 64, 48, 2, 4, 2, 8
KINDS = {"both": ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "attention": ("q_proj", "o_proj")}
KINDS["experts"] = KINDS["both"][2:]
ORDER = ("both", "attention", "experts", "attention", "both")
"""Over two slots: every adapter is evicted and comes back, into a slot that held another kind."""


def make_model(folder: Path) -> Path:
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }
    (model / "config.json").write_text(json.dumps(config))
    return model


def write_adapter(folder: Path, kind: str, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        prefix = f"base_model.model.model.layers.{layer}"
        places = {f"self_attn.{name}": (HIDDEN, HIDDEN) for name in ("q_proj", "o_proj") if name in KINDS[kind]}
        if "up_proj" in KINDS[kind]:
            for expert in range(EXPERTS):
                places |= {f"mlp.experts.{expert}.{name}_proj": (HIDDEN, INNER) for name in ("gate", "up")}
                places[f"mlp.experts.{expert}.down_proj"] = (INNER, HIDDEN)
        for name, (n_in, n_out) in places.items():
            tensors[f"{prefix}.{name}.lora_A.weight"] = torch.randn(RANK, n_in, generator=generator)
            tensors[f"{prefix}.{name}.lora_B.weight"] = torch.randn(n_out, RANK, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(KINDS[kind])}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def without_kernel(layer: Any, base_layer: Any) -> None:
    """In place of FusedMoEWithLoRA.__init__, which asks for a kernel that CPUs have not."""
    torch.nn.Module.__init__(layer)
    layer.base_layer, layer.moe_config = base_layer, base_layer.moe_config
    layer._shared_experts = base_layer._shared_experts
    layer.tp_size, layer.tp_rank, layer.device = 1, 0, torch.device("cpu")
    layer._w13_slices = 2
    layer.enable_moe_shared_loras = False
    layer.n_slices = layer.local_num_experts * 3
    layer.forward = lambda hidden_states, router_logits: hidden_states


def serve(model: Path, adapters: dict[str, Path], **options: Any) -> list[dict[str, Any]]:
    """After each request: its log-probabilities, and what its slot holds in the experts' stacks."""
    from vllm import LLM, SamplingParams
    from vllm.lora.layers import FusedMoEWithLoRA
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.lora.request import LoRARequest

    with (
        patch.object(FusedMoEWithLoRA, "__init__", without_kernel),
        patch.object(FusedMoEWithLoRA, "set_mapping", BaseLayerWithLoRA.set_mapping),
    ):
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
            max_loras=2,
            max_cpu_loras=3,
            max_lora_rank=RANK,
            **options,
        )
    from vllm_loraserve.engine.lora_shapes import lora_shapes

    worker = llm.collective_rpc(lambda worker: worker)[0]
    manager = worker.model_runner.lora_manager._adapter_manager
    experts = {n: layer for n, layer in manager.modules.items() if isinstance(layer, FusedMoEWithLoRA)}
    assert len(experts) == LAYERS, sorted(manager.modules)
    if "additional_config" in options:
        assert {name.rsplit(".", 1)[-1] for name in manager.paged_modules} >= {"qkv_proj", "o_proj"}
        assert not set(experts) & set(manager.paged_modules)
        told = {name: sizes for name, sizes in lora_shapes(manager).items() if sizes}
        assert all(told[name] == [(HIDDEN, HIDDEN)] for name in ("q_proj", "k_proj", "v_proj", "o_proj")), told
        assert not set(told) & set(KINDS["experts"]), "experts are left to the load"
        assert "experts" in lora_shapes(manager)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0, detokenize=False)
    seen = []
    for turn, kind in enumerate(ORDER):
        lora_id = list(adapters).index(kind) + 1
        request = LoRARequest(kind, lora_id, str(adapters[kind]))
        done = llm.generate([{"prompt_token_ids": [7, 30, 200 - turn]}], params, lora_request=request, use_tqdm=False)
        slot = manager.lora_index_to_id.index(lora_id)
        best = done[0].outputs[0]
        seen.append(
            {
                "kind": kind,
                "logprobs": [step[t].logprob for t, step in zip(best.token_ids, best.logprobs, strict=True)],
                "experts": {
                    name: [
                        stack[slot].clone()
                        for stacks in (
                            layer.w13_lora_a_stacked,
                            layer.w13_lora_b_stacked,
                            layer.w2_lora_a_stacked,
                            layer.w2_lora_b_stacked,
                        )
                        for stack in stacks
                    ]
                    for name, layer in experts.items()
                },
                "enabled": [int(layer.adapter_enabled[slot]) for layer in experts.values()],
            }
        )
    return seen


def main() -> None:
    folder = Path(sys.argv[1])
    model = make_model(folder)
    adapters = {kind: write_adapter(folder / kind, kind, seed) for seed, kind in enumerate(KINDS)}
    stock = serve(model, adapters)
    ours = serve(model, adapters, additional_config={"loraserve": {}})
    for want, got in zip(stock, ours, strict=True):
        kind = want["kind"]
        assert got["enabled"] == want["enabled"] == [int(kind != "attention")] * LAYERS, (kind, got["enabled"])
        assert max(abs(a - b) for a, b in zip(want["logprobs"], got["logprobs"], strict=True)) < 1e-4, kind
        for name, stacks in want["experts"].items():
            assert stacks[0].any() == (kind != "attention"), (kind, name)
            for index, (theirs, mine) in enumerate(zip(stacks, got["experts"][name], strict=True)):
                assert torch.equal(theirs, mine), (kind, name, index)
    print("MOE PASSED")


if __name__ == "__main__":
    main()
