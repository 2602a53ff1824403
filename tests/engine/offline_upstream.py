"""Run as a program by test_upstream_vllm.py: vLLM's own features with the flag on, on two engines; one JSON line.

Engine A decodes speculatively and answers in prescribed forms; engine B schedules by priority with too little KV cache,
keeps KV blocks in a connector, is paused, put to sleep and asked to abort. Both answer the same questions.
Arguments: a JSON object with `model`, `adapters` (name -> directory), `folder`, `prompts`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

TOKENS = 24
REGEX = "(yes|no)-[0-9]{3}"
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_loras": 1,
    "max_lora_rank": 16,
    "disable_log_stats": False,
}


def counter(name: str) -> float:
    """The sum of one of vLLM's counters in this process."""
    from prometheus_client import REGISTRY

    samples = [s for family in REGISTRY.collect() for s in family.samples]
    return sum(s.value for s in samples if s.name == f"vllm:{name}_total")


def speculative(asked: dict[str, Any], requests: dict[str, Any]) -> dict[str, Any]:
    """Engine A."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(
        asked["model"],
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        },
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=4,
        additional_config={"loraserve": {}},
        **COMMON,
    )
    jobs = [(name, prompt) for prompt in asked["prompts"] for name in requests]
    free = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    formed = SamplingParams(temperature=0, max_tokens=TOKENS, structured_outputs=StructuredOutputsParams(regex=REGEX))
    params = [free] * len(jobs) + [formed] * len(requests)
    jobs += [(name, asked["prompts"][0]) for name in requests]
    done = llm.generate([p for _, p in jobs], params, lora_request=[requests[n] for n, _ in jobs], use_tqdm=False)
    texts = [list(d.outputs[0].token_ids) for d in done]
    accepted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    count = len(jobs) - len(requests)
    llm.llm_engine.engine_core.shutdown()
    return {
        "tokens": [[name, *tokens] for (name, _), tokens in zip(jobs[:count], texts[:count], strict=True)],
        "formed": [d.outputs[0].text for d in done[count:]],
        "accepted": accepted,
    }


async def interrupted(asked: dict[str, Any], requests: dict[str, Any]) -> dict[str, Any]:
    """Engine B."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            asked["model"],
            scheduling_policy="priority",
            num_gpu_blocks_override=12,
            kv_cache_memory_bytes=64 << 20,
            block_size=32,
            max_num_seqs=8,
            kv_transfer_config={
                "kv_connector": "ExampleConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"shared_storage_path": asked["folder"]},
            },
            additional_config={"loraserve": {}},
            **COMMON,
        )
    )
    free = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    numbers = iter(range(10**6))

    async def answer(name: str, prompt: str, priority: int = 0, params: Any = free) -> list[int]:
        tokens: list[int] = []
        async for output in engine.generate(
            prompt, params, f"r{next(numbers)}", lora_request=requests[name], priority=priority
        ):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    warm = [name for name in requests if name not in ("paused", "aborted")]
    result: dict[str, Any] = {}
    jobs = [(name, prompt) for prompt in asked["prompts"] for name in warm]
    answers = await asyncio.gather(
        *(answer(name, prompt, priority=len(jobs) - at) for at, (name, prompt) in enumerate(jobs))
    )
    result["tokens"] = [[name, *tokens] for (name, _), tokens in zip(jobs, answers, strict=True)]
    long = SamplingParams(temperature=0, max_tokens=180, ignore_eos=True)
    before = counter("num_preemptions")
    lengths = await asyncio.gather(
        *(answer("one", f"{n} {asked['prompts'][0]}", priority=-n, params=long) for n in range(6))
    )
    result |= {"lengths": list(map(len, lengths)), "preempted": counter("num_preemptions") - before}

    # Paused with a load under way.
    loading = asyncio.create_task(answer("paused", asked["prompts"][0]))
    await asyncio.sleep(0)
    await engine.pause_generation(mode="keep", clear_cache=False)
    await asyncio.sleep(0.5)
    result["while_paused"] = loading.done()
    await engine.resume_generation()
    result["paused"] = await loading

    # Aborted with a load under way; the next request finds everything as it should be.
    gone = asyncio.create_task(answer("aborted", asked["prompts"][0]))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    result["aborted"] = await answer("aborted", asked["prompts"][0])

    # Asleep (on a CPU only the scheduling sleeps), with a request that came before.
    asleep = asyncio.create_task(answer("one", asked["prompts"][0]))
    await asyncio.sleep(0)
    await engine.sleep(0, mode="keep")
    await engine.wake_up()
    result["slept"] = await asleep

    # Blocks that the connector kept, of a prompt that fills some (its blocks know no adapter: the base model's).
    whole = " ".join(asked["prompts"])
    result["kept"] = [await answer("base", whole)]
    await engine.reset_prefix_cache()
    hits = counter("external_prefix_cache_hits")
    result["kept"].append(await answer("base", whole))
    result["hits"] = counter("external_prefix_cache_hits") - hits
    engine.shutdown()
    return result


def main() -> None:
    from vllm.lora.request import LoRARequest

    asked = json.loads(sys.argv[1])
    requests: dict[str, Any] = {"base": None}
    requests |= {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(asked["adapters"].items(), 1)}
    result = {"a": speculative(asked, requests), "b": asyncio.run(interrupted(asked, requests))}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
