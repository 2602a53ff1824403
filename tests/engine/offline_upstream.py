"""Run as a program by test_upstream_vllm.py: vLLM's own features with the flag on, on two engines; one JSON line.

The first decodes speculatively and in prescribed forms, by priority and with too little KV cache, in this process, so
that all requests are there before its first step. The second one, in a process of its own as it is when serving, keeps
KV blocks in a connector, is paused, put to sleep and asked to abort, each while a load is held or a request is under
way: loads begin and end when this program says so. Both answer the same questions.
Arguments: a JSON object with `model`, `adapters` (name -> directory), `folder`, `prompts`, `whole` (name -> prompt).
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

TOKENS = 16
REGEX = "(yes|no)-[0-9]{3}"
KV_BLOCK = 32
"""Tokens: more than a prompt of `prompts`, less than a prompt and its answer."""
RUNNING, KV_BLOCKS = 5, 6
"""So many requests begin with a block each (one block is vLLM's own), and none can have a second but by preemption."""
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "block_size": KV_BLOCK,
    "kv_cache_memory_bytes": 64 << 20,
    "max_loras": 2,
    "max_lora_rank": 16,
    "disable_log_stats": False,
    # Held loads are not to run out of time on a slow machine.
    "additional_config": {"loraserve": {"load_timeout_s": 600}},
}


def counter(name: str) -> float:
    """The sum of one of vLLM's counters in this process."""
    from prometheus_client import REGISTRY

    samples = [s for family in REGISTRY.collect() for s in family.samples if s.name == f"vllm:{name}_total"]
    assert samples, f"vLLM counts {name} under another name"
    return sum(s.value for s in samples)


def speculative(asked: dict[str, Any], requests: dict[str, Any]) -> dict[str, Any]:
    """The first engine."""
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
        scheduling_policy="priority",
        num_gpu_blocks_override=KV_BLOCKS,
        max_num_seqs=RUNNING,
        **COMMON,
    )
    free = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    formed = SamplingParams(temperature=0, max_tokens=TOKENS, structured_outputs=StructuredOutputsParams(regex=REGEX))

    begun: list[list[float]] = []

    def generate(jobs: list[tuple[str, str]], params: list[Any]) -> list[Any]:
        done = llm.generate(
            [prompt for _, prompt in jobs],
            params,
            lora_request=[requests[name] for name, _ in jobs],
            # Those that come last go first.
            priority=list(range(len(jobs), 0, -1)),
            use_tqdm=False,
        )
        begun.append([each.metrics.scheduled_ts for each in done])
        return [each.outputs[0] for each in done]

    prompt = asked["prompts"][1]
    # The adapters of the batch come last, and are in their slots when it begins.
    alone = {name: list(generate([(name, prompt)], [free])[0].token_ids) for name in ("late", "gone", "one", "two")}
    names = ["base", "one", "two"]
    jobs = [(name, each) for each in asked["prompts"] for name in names]
    done = generate([*((name, prompt) for name in names), *jobs], [formed] * len(names) + [free] * len(jobs))
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    result = {
        "alone": alone,
        "tokens": [[*job, list(output.token_ids)] for job, output in zip(jobs, done[len(names) :], strict=True)],
        "formed": [output.text for output in done[: len(names)]],
        "begun": begun[-1][len(names) :],
        "accepted": metrics["vllm:spec_decode_num_accepted_tokens"],
        "preempted": metrics["vllm:num_preemptions"],
    }
    llm.llm_engine.engine_core.shutdown()
    return result


# What the second engine's worker is asked to do, beside the engine's steps.


def hold_loads(worker: Any) -> None:
    """From now on a load of an adapter waits until `let_go`."""
    import threading

    manager = worker.model_runner.lora_manager
    manager.begun, gate, prepare = [], threading.Event(), manager.prepare

    def held(request: Any) -> Any:
        manager.begun.append(request.lora_name)
        gate.wait()
        return prepare(request)

    manager.prepare, manager.let_go = held, gate.set


def loads(worker: Any, adapter: int) -> tuple[list[str], bool, dict[int, str]]:
    """Names of the adapters whose load has begun since `hold_loads`, whether `adapter` is loaded, and what failed."""
    manager = worker.model_runner.lora_manager
    return manager.begun, manager.is_prepared(adapter), manager.load_errors


def let_go(worker: Any) -> None:
    """Ends `hold_loads`."""
    manager = worker.model_runner.lora_manager
    manager.let_go()
    del manager.prepare


def waits_for_a_step(worker: Any, adapter: int) -> bool:
    """Whether a load has ended whose content no step has used yet."""
    return adapter in worker.model_runner.lora_manager._prepared


class Engine:
    """The second engine, and what is asked of it more than once."""

    def __init__(self, asked: dict[str, Any], requests: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.requests, self.count = requests, 0
        self.vllm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                asked["model"],
                # What a prompt is answered from is the connector's blocks alone.
                enable_prefix_caching=False,
                kv_transfer_config={
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": asked["folder"]},
                },
                **COMMON,
            )
        )

    async def stream(self, name: str, prompt: str) -> AsyncIterator[list[int]]:
        """All tokens so far, after every step."""
        from vllm import SamplingParams

        self.count += 1
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        async for output in self.vllm.generate(prompt, params, f"r{self.count}", lora_request=self.requests[name]):
            yield list(output.outputs[0].token_ids)

    async def answer(self, name: str, prompt: str) -> list[int]:
        return [tokens async for tokens in self.stream(name, prompt)][-1]

    async def until(self, name: str, *, loaded: bool) -> None:
        """Waits until the adapter's load has begun, or ended; what never comes ends with the test's own timeout."""
        while True:
            adapter = self.requests[name].lora_int_id
            begun, is_loaded, errors = (await self.vllm.collective_rpc(loads, args=(adapter,)))[0]
            assert not errors, errors
            assert loaded or not is_loaded, "the load was not held"
            if is_loaded if loaded else name in begun:
                return
            await asyncio.sleep(0.01)


async def replaced(engine: Engine, folder: Path, prompt: str) -> list[list[int]]:
    """An active adapter gets other content in place, from another path and then at the same one; vLLM's server keeps
    the request with `load_inplace` for all that come later."""
    from vllm.lora.request import LoRARequest

    paths = {name: request.lora_path for name, request in engine.requests.items() if request is not None}
    shutil.copytree(paths["gone"], folder)
    answers = []
    for path in (paths["late"], str(folder)):
        engine.requests["changing"] = LoRARequest("changing", 9, path, load_inplace=True)
        await engine.vllm.add_lora(engine.requests["changing"])
        answers += [await engine.answer("changing", prompt) for _ in range(2)]
    shutil.copytree(paths["two"], folder, dirs_exist_ok=True)
    await engine.vllm.add_lora(engine.requests["changing"])
    while not (await engine.vllm.collective_rpc(waits_for_a_step, args=(9,)))[0]:
        await asyncio.sleep(0.01)
    return [*answers, await engine.answer("changing", prompt)]


async def interrupted(asked: dict[str, Any], requests: dict[str, Any]) -> dict[str, Any]:
    """The second engine."""
    engine = Engine(asked, requests)
    vllm, prompt = engine.vllm, asked["prompts"][1]
    jobs = [(name, each) for each in asked["prompts"] for name in ("base", "one", "two")]
    answers = await asyncio.gather(*(engine.answer(*job) for job in jobs))
    result: dict[str, Any] = {"tokens": [[*job, tokens] for job, tokens in zip(jobs, answers, strict=True)]}

    # Paused while one request is under way and the adapter of another one is loading; the load ends in the pause.
    await vllm.collective_rpc(hold_loads)
    late = asyncio.create_task(engine.answer("late", prompt))
    await engine.until("late", loaded=False)
    running = engine.stream("one", prompt)
    begin = await anext(running)
    await vllm.pause_generation(mode="keep")
    await vllm.collective_rpc(let_go)
    await engine.until("late", loaded=True)
    result["in_pause"] = [late.done(), await vllm.is_paused()]
    await vllm.resume_generation()
    result["around_pause"] = {"late": await late, "one": [begin, *[tokens async for tokens in running]][-1]}

    # The only request of an adapter is aborted while that is loading; the next one finds all as it should be.
    await vllm.collective_rpc(hold_loads)
    gone = asyncio.create_task(engine.answer("gone", prompt))
    await engine.until("gone", loaded=False)
    gone.cancel()
    result["cancelled"] = isinstance((await asyncio.gather(gone, return_exceptions=True))[0], asyncio.CancelledError)
    again = asyncio.create_task(engine.answer("gone", prompt))
    result["others"] = await engine.answer("two", prompt)
    await vllm.collective_rpc(let_go)
    result["again"] = await again

    # Asleep with a request under way: vLLM takes its KV blocks and computes them again.
    running = engine.stream("two", prompt)
    begin = await anext(running)
    await vllm.sleep(1, mode="keep")
    result["asleep"] = [await vllm.is_sleeping()]
    await vllm.wake_up()
    result["asleep"].append(await vllm.is_sleeping())
    result["slept"] = [begin, *[tokens async for tokens in running]][-1]

    result["replaced"] = await replaced(engine, Path(asked["folder"]) / "changing", prompt)

    # Blocks that the connector kept. This one's know no adapter, so that each adapter has a prompt of its own.
    before = counter("external_prefix_cache_hits")
    result["kept"] = [await engine.answer(name, prompt) for name, prompt in asked["whole"].items()]
    middle = counter("external_prefix_cache_hits")
    result["given"] = [await engine.answer(name, prompt) for name, prompt in asked["whole"].items()]
    result["hits"] = [middle - before, counter("external_prefix_cache_hits") - middle]
    vllm.shutdown()
    return result


def main() -> None:
    from vllm.lora.request import LoRARequest

    asked = json.loads(sys.argv[1])
    requests: dict[str, Any] = {"base": None}
    requests |= {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(asked["adapters"].items(), 1)}
    result = {"speculative": speculative(asked, requests), "interrupted": asyncio.run(interrupted(asked, requests))}
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
