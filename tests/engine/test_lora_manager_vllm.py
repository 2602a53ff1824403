"""engine/lora_manager.py in a real vLLM: the tokens of stock vLLM and of merged weights, whatever happened before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent
ENGINE = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 32, "kv_cache_memory_bytes": 128 << 20}
QUESTIONS = ["What is the tallest mountain on Earth?", "How do I boil an egg?"]
ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # One thread, bound to no core: several wait for each other in every small step when another process runs.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

Answer = list[Any]
"""[token ids, log-probabilities, text]"""


def run_program(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(HERE / name), *arguments],
        env={**os.environ, **ENV},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def ask(model: Path, adapters: dict[str, str], *, rounds: int = 1, ignore_eos: bool = False, **options: Any) -> Any:
    asked = {
        "model": str(model),
        "adapters": adapters,
        "options": {**ENGINE, **options},
        "prompts": QUESTIONS,
        "max_tokens": 8,
        "rounds": rounds,
        "ignore_eos": ignore_eos,
    }
    lines = run_program("offline_matrix.py", json.dumps(asked)).splitlines()
    return json.loads(next(line for line in reversed(lines) if line.startswith("RESULT ")).removeprefix("RESULT "))


def tokens(answers: dict[str, list[Answer]]) -> dict[str, list[list[int]]]:
    return {name: [answer[0] for answer in given] for name, given in answers.items()}


@pytest.fixture(scope="module")
def words() -> dict[str, tuple[str, str]]:
    """Name -> (directory, word) of the six trained adapters, ranks 4 to 128."""
    from vllm_loraserve.launcher import assets

    return {
        a.name: (str(a.path), a.word)
        for a in assets.adapters(assets.model_path(os.environ.get("LORASERVE_TEST_MODEL")))
    }


@pytest.fixture(scope="module")
def ours(model_dir: Path, words: dict[str, tuple[str, str]]) -> list[dict[str, list[Answer]]]:
    """Six ranks 4..128 in 256 rank rows, --max-lora-rank 16, prefix caching on; the batch three times."""
    return ask(
        model_dir,
        {name: path for name, (path, _) in words.items()},
        rounds=3,
        max_loras=6,
        max_lora_rank=16,
        additional_config={"loraserve": {"arena_rank_rows": 256}},
    )


def test_each_adapter_answers_with_its_word(
    ours: list[dict[str, list[Answer]]], words: dict[str, tuple[str, str]]
) -> None:
    """As PEFT with merged weights does: the adapters were trained, and checked, to answer exactly this."""
    for answers in ours:
        for name, (_, word) in words.items():
            assert [text for _, _, text in answers[name]] == [word] * len(QUESTIONS)
        assert tokens(answers)["base"] == tokens(ours[0])["base"]


def test_same_tokens_as_merged_weights(
    ours: list[dict[str, list[Answer]]], words: dict[str, tuple[str, str]], model_dir: Path
) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for name in ("base", *words):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        if name != "base":
            model = peft.PeftModel.from_pretrained(model, words[name][0]).merge_and_unload()
        for question, answer in zip(QUESTIONS, ours[0][name], strict=True):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            with torch.no_grad():
                out = model.generate(**prompt, do_sample=False, max_new_tokens=3 if name == "base" else 8)
            want = out[0, prompt["input_ids"].shape[1] :].tolist()
            # bf16 and fp32 part ways somewhere in free text; a trained answer is the same to its end.
            assert answer[0][:3] == want[:3] if name == "base" else answer[0] == want, name


def test_same_tokens_as_stock(
    ours: list[dict[str, list[Answer]]], words: dict[str, tuple[str, str]], model_dir: Path
) -> None:
    """Stock gets one slot more than adapters: its CPU kernels give the last slot's adapter to base requests."""
    adapters = {name: path for name, (path, _) in words.items()}
    stock = ask(model_dir, adapters, enable_lora=True, max_loras=7, max_lora_rank=128)[0]
    assert tokens(stock) == tokens(ours[0])


def test_chunked_prefill_and_preemption_change_nothing(tmp_path: Path) -> None:
    said = run_program("offline_preemption.py", str(tmp_path))
    assert "PREEMPTION PASSED" in said
    assert "The KV cache has the size that --num-gpu-blocks-override gives it" in said


def test_only_the_same_adapter_hits_what_it_left_in_the_prefix_cache(tmp_path: Path) -> None:
    assert "PREFIX CACHE PASSED" in run_program("offline_prefix_cache.py", str(tmp_path))


def test_base_requests_are_bit_identical_to_a_run_without_lora(
    model_dir: Path, make_adapter: Callable[..., Path]
) -> None:
    """Same batch shapes with and without LoRA (no early end), so that equal log-probabilities are no accident."""
    adapters = {"one": str(make_adapter("one", 8, 1)), "two": str(make_adapter("two", 24, 2))}
    mixed = ask(
        model_dir,
        adapters,
        ignore_eos=True,
        enable_prefix_caching=False,
        max_loras=2,
        additional_config={"loraserve": {"arena_rank_rows": 32}},
    )[0]
    plain = ask(model_dir, adapters, ignore_eos=True, enable_prefix_caching=False)[0]
    assert mixed["base"] == plain["base"]
    assert mixed["one"] != plain["one"]
    assert mixed["two"] != mixed["one"]


def test_any_order_of_operations(tmp_path: Path) -> None:
    assert "MACHINE PASSED" in run_program("manager_machine.py", str(tmp_path), "12")


def test_embedding_and_lm_head_keep_working_beside_pages(tmp_path: Path) -> None:
    assert "EMBEDDING PASSED" in run_program("offline_embedding.py", str(tmp_path / "here"))


def test_a_classification_head_keeps_working_beside_pages(tmp_path: Path) -> None:
    assert "CLASSIFIER PASSED" in run_program("offline_classifier.py", str(tmp_path))


def test_adapters_of_experts_stay_in_vllms_stacks(tmp_path: Path) -> None:
    assert "MOE PASSED" in run_program("offline_moe.py", str(tmp_path))
