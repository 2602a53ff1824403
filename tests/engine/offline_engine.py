"""Run as a program by tests: one offline engine, one JSON line about what it used and what it answered.

Arguments: a JSON object with `model`, `adapters` (name -> directory), `options` (arguments of vllm.LLM).
"""

from __future__ import annotations

import json
import sys
from typing import Any

PROMPTS = ["The capital of France is", "Water is made of", "One, two, three,"]


def main() -> None:
    """Serves base and adapters apart, then mixed in one batch."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(sys.argv[1])
    llm = LLM(asked["model"], **asked["options"])
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    requests: dict[str, Any] = {"base": None}
    if asked["options"].get("enable_lora") or "loraserve" in asked["options"].get("additional_config", {}):
        requests |= {n: LoRARequest(n, i, p) for i, (n, p) in enumerate(asked["adapters"].items(), 1)}

    def answers(jobs: list[tuple[str, str]]) -> list[str]:
        done = llm.generate([p for _, p in jobs], params, lora_request=[requests[n] for n, _ in jobs], use_tqdm=False)
        return [d.outputs[0].text for d in done]

    apart = {name: answers([(name, p) for p in PROMPTS]) for name in requests}
    jobs = [(name, p) for p in PROMPTS for name in requests]
    mixed: dict[str, list[str]] = {name: [] for name in requests}
    for (name, _), text in zip(jobs, answers(jobs), strict=True):
        mixed[name].append(text)
    print("RESULT " + json.dumps({"apart": apart, "mixed": mixed, "used": llm.collective_rpc(_classes)[0]}))


def _classes(worker: Any) -> dict[str, str]:
    """Runs in the worker: what the engine really uses."""
    runner = worker.model_runner
    vllm_config = worker.vllm_config
    manager = getattr(runner, "lora_manager", None)
    used = {
        "scheduler": str(vllm_config.scheduler_config.scheduler_cls),
        "loraserve": json.dumps(vllm_config.additional_config.get("loraserve")),
        "max_lora_rank": str(getattr(vllm_config.lora_config, "max_lora_rank", None)),
    }
    if manager is not None:
        used["manager"] = f"{type(manager).__module__}.{type(manager).__name__}"
        used["punica"] = ",".join(
            sorted(
                f"{type(w).__module__}.{type(w).__name__}"
                for w in manager._adapter_manager.punica_wrapper_mapping.values()
            )
        )
    return used


if __name__ == "__main__":
    main()
