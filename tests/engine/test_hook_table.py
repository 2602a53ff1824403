"""What the engine's modules replace on vLLM's objects is in the table of hooks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_loraserve
from vllm_loraserve import plugin

pytestmark = pytest.mark.vllm

PACKAGE = Path(vllm_loraserve.__file__).parent
STACKED = {"lora_a_stacked", "lora_b_stacked", "lora_a_stacked_2d"}
"""Attributes of a LoRA layer, which the rows on storage and slots stand for."""
NO_HOOKS = {
    # Options, as a command line or a user sets them.
    *("enable_lora", "max_loras", "max_cpu_loras", "additional_config", "self.dest", "default", "__class__"),
    # What a LoRA layer or its kernels have not without us.
    *("paged_linear", "occupied_slots"),
    # Fields of one request's output and of one adapter.
    *("output", "error", "is_3d_lora_weight"),
    # A thread's own socket and flag, and the meter's generate and encode, by a variable.
    *("socket", "daemon", "name"),
    # Of an engine core's own queue; the row of its wait checks that requests come by it.
    "put_nowait",
}
"""What is set on objects that are not ours and replaces nothing of theirs, or is in the table under its name."""


def trees(pattern: str) -> dict[str, ast.Module]:
    return {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in sorted(PACKAGE.glob(pattern))}


def ours(tree: ast.Module) -> Iterator[str]:
    """Attributes that our own classes declare, or set on themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            declared = (n.target for n in node.body if isinstance(n, ast.AnnAssign))
            yield from (target.id for target in declared if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def set_elsewhere(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, attribute) of all that is set on another object than `self`, and of patching by `unittest.mock`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) != "self":
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            yield node.lineno, ast.unparse(node.args[1])
        elif isinstance(node, ast.Import | ast.ImportFrom) and "mock" in ast.unparse(node):
            yield node.lineno, ast.unparse(node)


def test_what_is_replaced_is_in_the_table() -> None:
    table = {hook.target.rsplit(".", 1)[-1] for hook in plugin.hooks()}
    assert {"generate", "encode", "set_lora", "reset_lora", "create_lora_weights"} <= table
    known = table | STACKED | NO_HOOKS | {name for tree in trees("*/*.py").values() for name in ours(tree)}
    assert [
        f"{file}:{line} sets {name}"
        for file, tree in trees("engine/*.py").items()
        for line, name in set_elsewhere(tree)
        if name not in known
    ] == []


def test_a_patch_outside_the_table_is_seen() -> None:
    text = "from unittest.mock import patch\nlayer.apply = mine\nsetattr(layer, 'forward', mine)\nself.own = 1\n"
    seen = sorted(set_elsewhere(ast.parse(text)))
    assert seen == [(1, "from unittest.mock import patch"), (2, "apply"), (3, "'forward'")]
