"""A real vLLM engine whose LoRA manager serves pages to the interpreted GPU kernels: tokens as from merged weights.

The engine runs on the CPU; its CPU Punica wrapper is replaced by the GPU one. Once with what vLLM takes on a CPU, once
as on a GPU: its V2 model runner, whose own Triton kernels are interpreted here too, and asynchronous scheduling. The
oracle is transformers with each adapter merged into the base weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
RANKS = {"small": 3, "large": 20}
PROMPTS = [[5, 9, 2, 77, 31], [8, 8, 40], [100, 3, 17, 64, 2, 9, 55]]
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 96),
    "mlp.up_proj": (64, 96),
    "mlp.down_proj": (96, 64),
}
# `small` lacks k, v and the gate: slices of rank 0 inside packed layers, a packed layer with one slice of two.
TARGETS = {"small": ["q_proj", "o_proj", "up_proj"], "large": [name.split(".")[1] for name in SHAPES]}

ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

asked = json.loads(sys.argv[1])
if asked["as_on_a_gpu"]:
    # vLLM schedules asynchronously everywhere but on a CPU.
    from vllm.platforms.cpu import CpuPlatform

    adapt = CpuPlatform.check_and_update_config

    def asynchronous(config):
        adapt(config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(asynchronous)
llm = LLM(asked["model"], skip_tokenizer_init=True, dtype="float16", max_model_len=32,
          max_num_seqs=8, max_num_batched_tokens=32, kv_cache_memory_bytes=32 << 20, max_loras=3, max_lora_rank=8,
          enable_prefix_caching=False, additional_config={"loraserve": {"max_rank": 32, "arena_rank_rows": 64}})
lora = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(asked["adapters"].items(), 1)}
lora["base"] = None
params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
jobs = [(name, p) for p in asked["prompts"] for name in lora]
done = llm.generate([{"prompt_token_ids": p} for _, p in jobs], params, lora_request=[lora[n] for n, _ in jobs],
                    use_tqdm=False)
wrappers = llm.collective_rpc(
    lambda worker: sorted(
        f"{type(w).__module__}.{type(w).__name__}"
        for w in worker.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
    )
)
tokens = [[name, p, list(d.outputs[0].token_ids)] for (name, p), d in zip(jobs, done)]
config = llm.llm_engine.vllm_config
used = {"v2": config.use_v2_model_runner, "scheduler": config.scheduler_config.scheduler_cls.rpartition(".")[2]}
print("RESULT " + json.dumps({"tokens": tokens, "wrappers": wrappers[0]} | used))
"""

REPLACE_WRAPPER = """
import vllm_loraserve.engine.worker_hooks as hooks
hooks.PUNICA_WRAPPERS["vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"] = "interpreted_wrapper.PunicaWrapperGPU"
"""

TRITON_ON_A_CPU = """
import types
import triton.backends
# vLLM takes V2 where Triton has a driver for the device; interpreted kernels need none.
driver = types.SimpleNamespace(is_active=lambda: True)
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
"""

WRAPPER = """
from vllm.lora.punica_wrapper import punica_gpu
from vllm_loraserve.kernels.stock_sources import configured, load_stock
stock = load_stock()
punica_gpu.LoRAKernelMeta = stock.LoRAKernelMeta
# Embedding and lm_head stay on vLLM's kernels; interpreted programs take milliseconds, so give it few of them.
punica_gpu.lora_shrink, punica_gpu.lora_expand = stock.lora_shrink, stock.lora_expand
few = configured(stock, lambda op, config: config | ({"split_k": 2} if op == "shrink" else {}))
few.__enter__()
from vllm_loraserve.kernels.punica_gpu import PunicaWrapperGPU
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def make_adapter(folder: Path, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(RANKS[name])
    weights = {}
    for layer in range(2):
        for module, (inputs, outputs) in SHAPES.items():
            if module.split(".")[1] in TARGETS[name]:
                key = f"base_model.model.model.layers.{layer}.{module}"
                weights[f"{key}.lora_A.weight"] = torch.randn(RANKS[name], inputs, generator=generator) / 8
                weights[f"{key}.lora_B.weight"] = torch.randn(outputs, RANKS[name], generator=generator) / 4
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANKS[name],
        "lora_alpha": 2 * RANKS[name],
        "target_modules": TARGETS[name],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return weights


def merged_tokens(model: Path, weights: dict[str, torch.Tensor], prompt: list[int]) -> list[int]:
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    parameters = dict(reference.named_parameters())
    for key in [key for key in weights if key.endswith("lora_A.weight")]:
        b = weights[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        parameters[name].data += 2.0 * b @ weights[key]
    tokens = list(prompt)
    for _ in range(3):
        with torch.inference_mode():
            tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_tokens_are_those_of_merged_weights(model, tmp_path, as_on_a_gpu):
    weights = {name: make_adapter(tmp_path / name, name) for name in RANKS}
    (tmp_path / "sitecustomize.py").write_text(REPLACE_WRAPPER + (TRITON_ON_A_CPU if as_on_a_gpu else ""))
    (tmp_path / "interpreted_wrapper.py").write_text(WRAPPER)
    (tmp_path / "engine.py").write_text(ENGINE)
    asked = {
        "model": str(model),
        "adapters": {name: str(tmp_path / name) for name in RANKS},
        "prompts": PROMPTS,
        "as_on_a_gpu": as_on_a_gpu,
    }
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(as_on_a_gpu)),
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, str(tmp_path / "engine.py"), json.dumps(asked)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800, check=False)
    line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line, run.stdout[-3000:] + run.stderr[-6000:]
    result = json.loads(line.removeprefix("RESULT "))
    assert result["wrappers"] == ["vllm_loraserve.kernels.punica_gpu.PunicaWrapperGPU"]
    assert result["v2"] is as_on_a_gpu
    assert result["scheduler"] == ("RankAwareAsyncScheduler" if as_on_a_gpu else "RankAwareScheduler")
    assert "The LoRA kernels are compiled:" in run.stdout + run.stderr
    expected = {
        (name, tuple(prompt)): merged_tokens(model, weights.get(name, {}), prompt)
        for name, prompt, _ in result["tokens"]
    }
    assert {(name, tuple(prompt)): tokens for name, prompt, tokens in result["tokens"]} == expected
    assert len({tuple(tokens) for tokens in expected.values()}) > len(PROMPTS), "adapters must change the answers"
