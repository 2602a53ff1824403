"""What the loader reads, and what it knows already."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def test_a_file_that_was_not_touched_is_hashed_once(
    make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_loraserve.adapters.checkpoint import content_hash, open_checkpoint
    from vllm_loraserve.engine import adapter_loader

    hashed = []

    def counting(checkpoint: Any) -> str:
        hashed.append(checkpoint)
        return content_hash(checkpoint)

    monkeypatch.setattr(adapter_loader, "content_hash", counting)
    now = [0.0]
    monkeypatch.setattr(adapter_loader.time, "time", lambda: now[0])
    facts: Any = None
    loader = adapter_loader.AdapterLoader(facts, facts)
    folder = make_adapter("a", 8, 1)
    weights = folder / "adapter_model.safetensors"

    now[0] = weights.stat().st_ctime + 1
    fresh = loader._digest(open_checkpoint(folder))
    assert loader._digest(open_checkpoint(folder)) == fresh
    assert len(hashed) == 2, "a file written just now may be written again within its time stamp"

    now[0] += 3600
    assert {loader._digest(open_checkpoint(folder)) for _ in range(3)} == {fresh}
    assert len(hashed) == 3

    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = loader._digest(open_checkpoint(folder))
    assert changed != fresh, "other content of the same size and time"

    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert loader._digest(open_checkpoint(folder)) not in {fresh, changed}


def test_a_clone_is_the_same_adapter_under_another_id() -> None:
    """vLLM clones its first warm-up adapter for the other slots before it captures graphs."""
    from vllm_loraserve.engine.adapter_loader import ServedAdapter

    first = ServedAdapter(1, 8, {})
    first.ranks, first.pages, first.shared_pages = (8, 8), (1, 1), True
    second = first.clone(2)
    assert isinstance(second, ServedAdapter)
    assert (second.id, second.rank, second.ranks, second.pages, second.shared_pages) == (2, 8, (8, 8), (1, 1), True)
