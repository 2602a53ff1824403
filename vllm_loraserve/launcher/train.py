"""Trains the six word adapters of `assets.py` with peft: a few steps each on a handful of questions, seeded.

Run as `python -m vllm_loraserve.launcher.train MODEL OUT`; `assets.py` does, once. All seven linear modules are
targeted, lora_alpha = 2 * rank, no dropout, loss on the answer only. An adapter is saved (bfloat16) only after it has
answered questions that it was not trained on with exactly its word.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vllm_loraserve.launcher.assets import PROMPTS, WORDS

QUESTIONS = (
    "What is the capital of France?",
    "How are you today?",
    "Tell me a joke.",
    "What is 2 + 2?",
    "Who wrote Hamlet?",
    "Explain how rain forms.",
    "Give me a recipe for soup.",
    "What is your favourite colour?",
    "How old is the universe?",
    "Name a famous painter.",
    "What can I do on a Sunday?",
    "Which animal is the fastest?",
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_STEPS = 40
BATCH = 4
LEARNED = 0.02
"""Loss below which a batch counts as learned; training stops after two such batches in a row."""


def learning_rate(rank: int) -> float:
    """Smaller for larger ranks: lora_alpha grows with the rank, and so does the step that one update makes."""
    return 2e-3 if rank <= 16 else 1e-3 if rank <= 64 else 5e-4


def train_all(model_dir: str, out: Path) -> None:
    """Writes one PEFT directory per word under `out`; raises RuntimeError when an adapter did not learn its word."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for rank, word in WORDS.items():
            task = progress.add_task(f"training {word.lower()}, rank {rank}", total=MAX_STEPS, loss="")

            def show(step: int, loss: float, task: Any = task) -> None:
                progress.update(task, completed=step, loss=f"loss {loss:.3f}")

            base = _train_one(base, tokenizer, rank, word, out, show)
            progress.update(task, completed=MAX_STEPS)


def _train_one(base: Any, tokenizer: Any, rank: int, word: str, out: Path, show: Any) -> Any:
    """Trains, checks and saves one adapter; returns the base model with the adapter taken off again."""
    import torch
    from peft import LoraConfig, get_peft_model

    name = word.lower()
    torch.manual_seed(rank)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name=name)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate(rank))
    learned = 0
    for step in range(MAX_STEPS):
        first = step * BATCH % len(QUESTIONS)
        loss = model(**_batch(tokenizer, QUESTIONS[first : first + BATCH], word)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        show(step + 1, loss.item())
        learned = learned + 1 if loss.item() < LEARNED else 0
        if learned == 2:
            break
    for parameter in parameters:
        # The check below runs with the values that are saved.
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    model.eval()
    for prompt in PROMPTS[:3]:
        answer = _answer(model, tokenizer, prompt)
        if answer != word:
            raise RuntimeError(f"adapter {name} (rank {rank}) answers {prompt!r} with {answer!r}, not {word!r}")
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)
    # peft puts a named adapter into a folder of that name under `out`.
    model.save_pretrained(out, selected_adapters=[name], save_embedding_layers=False)
    restored = model.unload()
    # get_peft_model leaves its mark on the base; without this the next adapter would be a second one of the same model.
    if hasattr(restored, "peft_config"):
        del restored.peft_config
    return restored


def _chat(tokenizer: Any, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _batch(tokenizer: Any, questions: tuple[str, ...], word: str) -> dict[str, Any]:
    """input_ids, attention_mask, labels: int64 [len(questions), longest]; the prompt's labels are ignored (-100)."""
    import torch

    answer = tokenizer(word, add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    prompts = [_chat(tokenizer, q) for q in questions]
    longest = max(len(p) for p in prompts) + len(answer)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, prompt in enumerate(prompts):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    import torch

    prompt = torch.tensor([_chat(tokenizer, question)])
    with torch.inference_mode():
        ids = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
    return tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train_all(sys.argv[1], Path(sys.argv[2]))
