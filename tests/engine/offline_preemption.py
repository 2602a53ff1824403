"""Run as a program by test_lora_manager_vllm.py: chunked prefill and preemption change no token.

Three in-process engines of the same tiny Llama: one with room for everything, one whose token budget cuts every prompt
into chunks and whose KV cache is so small that running requests must give way (that they did is read from vLLM's own
counter), and stock vLLM. Argument: a directory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from offline_tensor_parallel import ADAPTERS, make_adapter, make_model

BLOCK, PROMPT, OUTPUT, ROUNDS = 32, 40, 32, 2
CHUNK = 20
"""Tokens of one step: less than a prompt."""
BLOCKS = 3 * 4
"""A request grows to three blocks; ten of them begin with two each."""
OURS: dict[str, Any] = {"additional_config": {"loraserve": {"arena_rank_rows": 64}}, "max_loras": len(ADAPTERS)}
# One slot more than adapters: stock's CPU kernels give the last slot's adapter to base requests.
STOCK: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 32, "max_loras": len(ADAPTERS) + 1}
TIGHT: dict[str, Any] = {"num_gpu_blocks_override": BLOCKS, "max_num_batched_tokens": CHUNK}


def serve(folder: Path, **options: Any) -> tuple[list[list[int]], int]:
    """Tokens of every request of a mixed batch, and how often vLLM preempted one."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(make_model(folder)),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=96,
        max_num_seqs=16,
        block_size=BLOCK,
        disable_log_stats=False,
        kv_cache_memory_bytes=16 << 20,
        **options,
    )
    requests = [None, *(LoRARequest(n, i, str(make_adapter(folder, n))) for i, n in enumerate(ADAPTERS, 1))]
    # All adapters are active before the batch, so that the steps of the batch do not depend on how long loads take.
    llm.generate(
        [{"prompt_token_ids": [1, 2]} for _ in requests],
        SamplingParams(temperature=0, max_tokens=1, detokenize=False),
        lora_request=requests,
        use_tqdm=False,
    )
    jobs = [(request, turn) for turn in range(ROUNDS) for request in requests]
    done = llm.generate(
        [{"prompt_token_ids": [(31 * n + 7 * turn) % 250 for n in range(PROMPT)]} for _, turn in jobs],
        SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False),
        lora_request=[request for request, _ in jobs],
        use_tqdm=False,
    )
    preemptions = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert len(preemptions) == 1, "vLLM counts them under another name"
    return [list(d.outputs[0].token_ids) for d in done], int(preemptions[0])


def main() -> None:
    folder = Path(sys.argv[1])
    roomy, none = serve(folder, **OURS)
    assert none == 0, none
    tight, preempted = serve(folder, **OURS, **TIGHT)
    assert preempted > 0, "the KV cache was not small enough"
    assert tight == roomy
    assert len({str(tokens) for tokens in roomy}) == len(roomy), "each adapter and each prompt tells"
    stock, _ = serve(folder, **STOCK)
    assert tight == stock
    print(f"PREEMPTION PASSED after {preempted} preemptions")


if __name__ == "__main__":
    main()
