"""adapters/module_patterns.py: what configs really name modules with is taken, what could take for ever is not."""

import re

import pytest
from adapter_files import edit_config, write_adapter

from vllm_loraserve.adapters.checkpoint import AdapterError, open_checkpoint
from vllm_loraserve.adapters.module_patterns import MAX_MODULE_CHARS, pattern_problem


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "q_proj",
        "model.layers.11.self_attn.q_proj",
        "^model.decoder.layers.0.encoder_attn.k_proj",
        r"model\.layers\.(0|1|27)\.self_attn\.(?:q|k|v)_proj",
        r".*layers\.\d+\.mlp\.(up|down)_proj",
        r".*?\.layers\.(1[0-9]|2[0-9])\..*_proj",
        "q_proj|k_proj",
        r"layers\.\d{1,2}\.[^.]+\.o_proj$",
    ],
)
def test_plain_patterns_are_taken(pattern: str) -> None:
    assert pattern_problem(pattern) == ""


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "*",
        "a{2,1}",
        r"([\w.]+)+x",
        "(a|a)*x",
        "((a))",
        "(a?){30}x",
        ".*.*.*.*x",
        "a?" * 30 + "a" * 30,
        "(a|a)" * 30 + "x",
        r"(a)\1\1x(?=.*)",
        "a" * 501,
        "(" * 5000 + ")" * 5000,
        "[a",
    ],
    ids=lambda pattern: pattern[:12],
)
def test_others_are_refused_in_one_line(pattern: str, tmp_path) -> None:
    assert pattern_problem(pattern)
    adapter = write_adapter(tmp_path / "a")
    edit_config(adapter, rank_pattern={pattern: 4})
    with pytest.raises(AdapterError) as refused:
        open_checkpoint(adapter)
    assert refused.value.kind == "invalid"
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_the_worst_that_is_taken_ends() -> None:
    """`.*` over and over is what backtracks most; the name is as long as one may be."""
    worst = ".*.*.*x"
    assert pattern_problem(worst) == ""
    assert re.match(rf"(.*\.)?({worst})$", "." * MAX_MODULE_CHARS) is None


def test_a_module_name_without_end_is_refused(tmp_path) -> None:
    name = "m" * MAX_MODULE_CHARS
    adapter = write_adapter(tmp_path / "a", modules=(name,), shapes={name: (8, 8)})
    with pytest.raises(AdapterError, match="over the limit of 200"):
        open_checkpoint(adapter)
