"""Run as a program by test_lora_manager_vllm.py: one offline engine, one mixed batch, tokens and log-probabilities.

Arguments: a JSON object with `model`, `adapters` (name -> directory, in slot order), `options` (arguments of vllm.LLM),
`prompts` (chat questions), `max_tokens`, `rounds` (how often the batch is run; adapters in reverse order every other
time). Every question is asked of every adapter and of the base model, all in one call.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(sys.argv[1])
    llm = LLM(asked["model"], **asked["options"])
    requests = {"base": None}
    if asked["adapters"] and ("additional_config" in asked["options"] or asked["options"].get("enable_lora")):
        requests |= {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(asked["adapters"].items(), 1)}
    else:
        requests |= dict.fromkeys(asked["adapters"])
    params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], logprobs=1, ignore_eos=asked["ignore_eos"])
    answers: list[dict[str, list[list[object]]]] = []
    for turn in range(asked["rounds"]):
        names = list(requests) if turn % 2 == 0 else list(reversed(requests))
        jobs = [(name, prompt) for prompt in asked["prompts"] for name in names]
        done = llm.chat(
            [[{"role": "user", "content": prompt}] for _, prompt in jobs],
            params,
            lora_request=[requests[name] for name, _ in jobs],
            use_tqdm=False,
        )
        answers.append({})
        for (name, _), output in zip(jobs, done, strict=True):
            best = output.outputs[0]
            chosen = [step[token].logprob for token, step in zip(best.token_ids, best.logprobs or [], strict=True)]
            answers[-1].setdefault(name, []).append([list(best.token_ids), chosen, best.text])
    print("RESULT " + json.dumps(answers))


if __name__ == "__main__":
    main()
