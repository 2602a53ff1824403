"""Which registered adapter goes when --max-cpu-loras is reached; all else of the manager runs in a real vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def cache(*adapters: int, pinned: tuple[int, ...] = ()) -> Any:
    return SimpleNamespace(cache={a: SimpleNamespace(pages=(1,)) for a in adapters}, pinned_items=set(pinned))


@pytest.mark.parametrize(
    ("in_use", "pinned", "last_copies", "gone"),
    [
        ((), (), (), 1),
        ((1,), (), (), 2),
        ((1,), (2,), (), 3),
        ((), (), (1, 2), 3),
        ((3,), (), (1, 2), 1),
        ((1, 2), (3,), (), None),
    ],
)
def test_last_copies_go_last_and_what_is_in_use_or_pinned_never(
    in_use: tuple[int, ...], pinned: tuple[int, ...], last_copies: tuple[int, ...], gone: int | None
) -> None:
    from vllm_loraserve.engine.model_manager import PagedLoRAModelManager

    removed: list[int] = []
    manager: Any = SimpleNamespace(
        _registered_adapters=cache(1, 2, 3, pinned=pinned),
        _active_adapters=cache(),
        in_use=frozenset(in_use),
        layout=SimpleNamespace(size_bytes=lambda pages: 4096),
        _demand=SimpleNamespace(of=lambda adapter, now: float(adapter)),
        host=SimpleNamespace(may_evict=lambda adapter: adapter not in last_copies),
        remove_adapter=removed.append,
    )
    assert PagedLoRAModelManager.remove_oldest_adapter(manager) == (gone is not None)
    assert removed == ([gone] if gone is not None else [])
