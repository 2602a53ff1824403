"""Run as a program by test_worker_extension_vllm.py: a real worker says what it holds, serves it to a peer, and takes
it back from there when the checkpoint is gone. Argument: a directory. Prints RESULT and a JSON object."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import manager_machine as machine
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from vllm_loraserve.adapters.checkpoint import inspect_checkpoint
from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine.peer_sources import PeerSources
from vllm_loraserve.memory.host_tier import HostTier
from vllm_loraserve.transfer.auth import generate_key

RANKS = {"self_attn.q_proj": 8, "mlp.down_proj": 16}


def main(folder: Path) -> dict[str, Any]:
    key = folder / "key"
    key.write_bytes(generate_key())
    key.chmod(0o600)
    options = {"transfer_key_file": str(key), "transfer_rdma": "off", "arena_rank_rows": 96, "host_gib": 0.05}
    llm = LLM(
        str(machine.make_model(folder)), skip_tokenizer_init=True, load_format="dummy", dtype="float32",
        enforce_eager=True, max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=16 << 20, max_loras=2,
        max_lora_rank=8, enable_prefix_caching=False, additional_config={"loraserve": options},
    )  # fmt: skip
    adapter, broken = folder / "a", folder / "broken"
    machine.write_adapter(adapter, RANKS, seed=1)
    machine.write_adapter(broken, RANKS, seed=2)
    weights = broken / "adapter_model.safetensors"
    # Nothing that a look at its header shows, so that it is the load aside that fails.
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, weights)

    def residency() -> Any:
        return llm.collective_rpc("loraserve_residency")[0]

    def until(condition: Any) -> Any:
        end = time.monotonic() + 300
        while not condition(seen := residency()):
            assert time.monotonic() < end, f"still {seen}"
            time.sleep(0.05)
        return seen

    def generate(request: LoRARequest) -> int:
        """Tokens of an answer; that they are right is for test_lora_manager_vllm.py, on a model that has weights."""
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": [1, 2, 3, 4, 5]}
        answer = llm.generate([prompt], params, lora_request=request, use_tqdm=False)[0].outputs[0]
        return len(answer.token_ids)

    worker = llm.collective_rpc(lambda worker: worker)[0]
    host = worker.model_runner.lora_manager.host

    def pages(lora_id: int) -> str:
        entry = host.get(lora_id)
        return hashlib.sha256(host.slab.view(entry.offset, entry.size)).hexdigest()

    out: dict[str, Any] = {"first": residency(), "shapes": llm.collective_rpc("loraserve_shapes")[0]}
    engine = llm.llm_engine
    one = LoRARequest("a", 1, str(adapter))
    engine.add_lora(one)
    out["aside"] = until(lambda seen: 1 in seen[1])
    out["listed_aside"] = sorted(engine.list_loras())
    engine.add_lora(LoRARequest("broken", 2, str(broken)))
    out["error"] = until(lambda seen: seen[2])[2]
    out["generated"] = generate(one)
    out["running"], out["pages"] = residency(), pages(1)
    out["generation"] = host.get(1).generation

    # A peer takes it from the worker ...
    tier = HostTier(host.layout, 16 << 20)
    peer = PeerSources(LoRAServeConfig(instance="peer", **options), tier, lambda _: True)
    digest = host.get(1).digest
    peer.locate("a", str(adapter), digest, [("engine", llm.collective_rpc("loraserve_transfer_endpoint")[0])])
    out["peer_got_it"] = peer.bring(LoRARequest("a", 7, str(adapter))) is not None
    # ... and the worker takes it back, its own copy and its checkpoint gone.
    engine.remove_lora(1)
    until(lambda seen: 1 not in seen[0] + seen[1])
    shutil.rmtree(adapter)
    llm.collective_rpc("loraserve_locate", args=([("a", str(adapter), digest, [("peer", peer.endpoint)])],))
    again = LoRARequest("a", 3, str(adapter))
    engine.add_lora(again)
    until(lambda seen: 3 in seen[1])
    out["pages_from_peer"], out["generated_again"] = pages(3), generate(again)
    peer.close()
    # Registered, and its directory overwritten since.
    trained = folder / "trained"
    machine.write_adapter(trained, RANKS, seed=3)
    llm.collective_rpc("loraserve_locate", args=([("t", str(trained), inspect_checkpoint(trained).sha256, [])],))
    machine.write_adapter(trained, RANKS, seed=4)
    engine.add_lora(LoRARequest("t", 4, str(trained)))
    out["overwritten"] = until(lambda seen: 4 in seen[2])[2]
    out["held"] = 4 in host
    return out


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(Path(sys.argv[1]))), flush=True)
