"""Run as a program by test_lora_manager_vllm.py: who hits the prefix cache, and that a hit changes no token.

One in-process engine of a tiny Llama with fewer rank rows than its adapters need together, so that an adapter whose
blocks are cached has left the arena meanwhile. Argument: a directory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from offline_tensor_parallel import make_adapter, make_model

BLOCK, PROMPT, OUTPUT = 32, 80, 8
CACHED = PROMPT // BLOCK * BLOCK
"""Tokens of the prompt in whole blocks."""
NAMES = ("all-4", "all-24", "mlp-13")


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folder = Path(sys.argv[1])
    llm = LLM(
        str(make_model(folder)),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=96,
        max_num_seqs=16,
        block_size=BLOCK,
        kv_cache_memory_bytes=16 << 20,
        enable_prefix_caching=True,
        max_loras=2,
        additional_config={"loraserve": {"arena_rank_rows": 32}},
    )
    requests: dict[str, Any] = {"base": None}
    requests |= {name: LoRARequest(name, i, str(make_adapter(folder, name))) for i, name in enumerate(NAMES, 1)}

    def ask(name: str, first: int = 0) -> tuple[int, list[int]]:
        """Tokens of the prompt that were in the cache, and the answer."""
        (done,) = llm.generate(
            {"prompt_token_ids": [first, *((31 * n) % 250 for n in range(1, PROMPT))]},
            SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False),
            lora_request=requests[name],
            use_tqdm=False,
        )
        return done.num_cached_tokens, list(done.outputs[0].token_ids)

    fresh = {name: ask(name) for name in requests}
    assert {name: cached for name, (cached, _) in fresh.items()} == dict.fromkeys(requests, 0), fresh
    assert len({str(tokens) for _, tokens in fresh.values()}) == len(requests), "each adapter tells"
    for _ in range(2):
        for name in reversed(requests):
            assert ask(name) == (CACHED, fresh[name][1]), name
    assert {ask(name, first=9)[0] for name in requests} == {0}, "another first token"
    again = LoRARequest("renamed", 9, str(make_adapter(folder, NAMES[0])))
    requests["renamed"] = again
    assert ask("renamed") == (0, fresh[NAMES[0]][1]), "the same weights under another name are another adapter"
    print("PREFIX CACHE PASSED")


if __name__ == "__main__":
    main()
