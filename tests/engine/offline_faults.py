"""Run as a program by test_faults_vllm.py: one engine with two workers over a tiny Llama, to which bad things happen.

Arguments: a directory (the model and the adapters are made there), and a JSON object of arguments of AsyncEngineArgs.
With the flag: the checkpoint of an adapter is truncated after the engine has taken it, and the engine sleeps while an
adapter loads. In the end one worker is killed with a request under way. Prints what every request was told.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from offline_tensor_parallel import make_adapter, make_model
from offline_upstream import hold_loads, let_go, loads

PROMPT = [7, 30, 200, 45, 11]


def pid(worker: Any) -> int:
    """Runs in a worker."""
    return os.getpid()


class Engine:
    """vLLM's engine, and the adapters by name."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        names = ("all-4", "all-24", "attention-8")
        self.requests = {name: LoRARequest(name, i, str(make_adapter(folder, name))) for i, name in enumerate(names, 1)}
        self.count = 0
        self.vllm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                str(make_model(folder)),
                skip_tokenizer_init=True,
                dtype="float32",
                enforce_eager=True,
                max_model_len=128,
                max_num_seqs=8,
                kv_cache_memory_bytes=16 << 20,
                max_loras=4,
                tensor_parallel_size=2,
                **options,
            )
        )

    async def stream(self, name: str, tokens: int) -> AsyncIterator[Any]:
        """vLLM's output after every step."""
        from vllm import SamplingParams

        self.count += 1
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": PROMPT}
        async for output in self.vllm.generate(prompt, params, f"r{self.count}", lora_request=self.requests[name]):
            yield output.outputs[0]

    async def told(self, name: str, tokens: int = 4) -> list[Any]:
        """(number of tokens, why it ended, the error) of one request."""
        count, why, reason = 0, None, None
        try:
            async for output in self.stream(name, tokens):
                count, why, reason = len(output.token_ids), output.finish_reason, output.stop_reason
        except Exception as error:
            return [count, type(error).__name__, str(error)]
        return [count, why, reason]

    async def loading(self, name: str, *, ended: bool) -> None:
        """Waits until the adapter's load has begun, or ended, on every worker."""
        adapter = self.requests[name].lora_int_id
        while True:
            answers = await self.vllm.collective_rpc(loads, args=(adapter,))
            if all((loaded or adapter in errors) if ended else name in begun for begun, loaded, errors in answers):
                return
            await asyncio.sleep(0.02)


async def truncated(engine: Engine) -> dict[str, Any]:
    """The load endpoint has looked at the files; then half of the weights is gone."""
    vllm, request = engine.vllm, engine.requests["all-24"]
    weights = Path(request.lora_path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    await vllm.collective_rpc(hold_loads)
    taken = await vllm.add_lora(request)
    await engine.loading("all-24", ended=False)
    weights.write_bytes(whole[: len(whole) // 2])
    bad, good = asyncio.create_task(engine.told("all-24")), asyncio.create_task(engine.told("all-4"))
    await engine.loading("all-4", ended=False)
    await vllm.collective_rpc(let_go)
    result = {"taken": taken, "bad": await bad, "good": await good}
    weights.write_bytes(whole)
    return {**result, "repaired": await engine.told("all-24")}


async def asleep(engine: Engine) -> dict[str, Any]:
    """A load begins, the engine goes to sleep, the load ends, the engine wakes."""
    vllm = engine.vllm
    await vllm.collective_rpc(hold_loads)
    waits = asyncio.create_task(engine.told("attention-8"))
    await engine.loading("attention-8", ended=False)
    await vllm.sleep(1, mode="keep")
    await vllm.collective_rpc(let_go)
    await engine.loading("attention-8", ended=True)
    result = {"in_sleep": [await vllm.is_sleeping(), waits.done()]}
    await vllm.wake_up()
    return {**result, "woken": await waits}


async def killed(engine: Engine) -> dict[str, Any]:
    """One of two workers dies with a request under way."""
    victim = (await engine.vllm.collective_rpc(pid))[1]
    count = 0
    try:
        async for _ in engine.stream("all-4", 100):
            count += 1
            if count == 2:
                os.kill(victim, signal.SIGKILL)
        ended = "it went on"
    except Exception as error:
        ended = type(error).__name__
    return {"ended": ended, "errored": engine.vllm.errored, "next": (await engine.told("all-4"))[1]}


async def main() -> None:
    options = json.loads(sys.argv[2])
    engine = Engine(Path(sys.argv[1]), options)
    result: dict[str, Any] = {}
    if "additional_config" in options:
        result |= {"truncated": await truncated(engine), "asleep": await asleep(engine)}
    result["killed"] = await killed(engine)
    engine.vllm.shutdown()
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
