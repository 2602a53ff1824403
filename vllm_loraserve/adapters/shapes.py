"""Whether an adapter's modules are those of the base model, by name and size; without the model itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from vllm_loraserve.adapters.errors import AdapterError

if TYPE_CHECKING:
    from vllm_loraserve.adapters.checkpoint import Checkpoint

OTHERS = "*"
"""As a module's name in `ModuleShapes`: there may be more modules than are named."""

ModuleShapes = Mapping[str, Collection[tuple[int, int]]]
"""Suffix of a module as adapters name it (`q_proj`) -> the unsharded (in, out) features that the base model's modules
of that name have; none: an adapter may target it, and its sizes are looked at by whoever loads it."""


def check_shapes(checkpoint: Checkpoint, module_shapes: ModuleShapes) -> None:
    """Raise AdapterError `mismatch` unless every module is one of `module_shapes` and has sizes that it names.

    The sizes of embeddings and MoE experts are left to vLLM, which serves them on its own path.
    """
    with_experts = any(name.endswith("experts") for name in module_shapes)
    for module in checkpoint.modules:
        of_expert = ".experts" in module.name
        expected = module_shapes.get(module.suffix)
        if not (with_experts if of_expert else expected is not None) and OTHERS not in module_shapes:
            raise AdapterError(
                "mismatch",
                f"'{checkpoint.directory}' targets '{module.name}', but the base model's modules are "
                f"{', '.join(sorted(module_shapes))}; train the adapter on this base model.",
            )
        if of_expert or module.is_embedding:
            continue
        found = (module.a.shape[1], module.b.shape[0])
        if expected and found not in expected:
            raise AdapterError(
                "mismatch",
                f"'{checkpoint.directory}' has '{module.name}' of (in, out) {found}, but the base model's is "
                f"{' or '.join(map(str, sorted(expected)))}; train the adapter on this base model.",
            )


def merged(tables: Iterable[ModuleShapes]) -> dict[str, tuple[tuple[int, int], ...]]:
    """What workers, or instances, together know of one base model."""
    found: dict[str, set[tuple[int, int]]] = {}
    for table in tables:
        for name, sizes in table.items():
            found.setdefault(name, set()).update((n_in, n_out) for n_in, n_out in sizes)
    return {name: tuple(sorted(sizes)) for name, sizes in sorted(found.items())}
