"""Instances that compute the same share vLLM's hash, whatever they are called; without the flag it is vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine.config_hash import COMPUTED_FROM

pytestmark = pytest.mark.vllm

HashOf = Callable[..., str]


@pytest.fixture(scope="module")
def hash_of(model_dir: Path) -> HashOf:
    """The hash of an engine with these options, and with `other` beside them in additional_config."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_loraserve import plugin

    plugin.register()

    def hash_of(other: Any = 1, **options: Any) -> str:
        additional = {"loraserve": options, "other": other}
        made = EngineArgs(model=str(model_dir), additional_config=additional).create_engine_config()
        before = str(made.additional_config)
        found: str = made.compute_hash()
        assert str(made.additional_config) == before
        return found

    return hash_of


def test_names_places_and_turns_are_not_in_the_hash(hash_of: HashOf, tmp_path: Path) -> None:
    one = hash_of(instance="a", coordinator="tcp://127.0.0.1:5700", adapter_roots=[str(tmp_path)], max_skip_s=1)
    assert one == hash_of(instance="b", coordinator="tcp://127.0.0.1:5800", shares={"x": 2.0}) == hash_of()


@pytest.mark.parametrize(
    "options", [{"max_rank": 64}, {"page_rows": 16}, {"arena_rank_rows": 64}, {"arena_gib": 0.1}, {"host_gib": 2}]
)
def test_what_is_computed_from_is(hash_of: HashOf, options: dict[str, Any]) -> None:
    assert hash_of(**options) != hash_of()


def test_what_others_put_beside_it_is(hash_of: HashOf) -> None:
    assert hash_of(other=2) != hash_of(other=1)


def test_they_are_options() -> None:
    assert set(COMPUTED_FROM) < {field.name for field in msgspec.structs.fields(LoRAServeConfig)}


def test_without_the_flag_it_is_vllms_own(model_dir: Path) -> None:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_loraserve import plugin

    plugin.register()
    made = EngineArgs(model=str(model_dir), additional_config={"other": 1}).create_engine_config()
    vllms_own = VllmConfig.compute_hash.__wrapped__  # type: ignore[attr-defined]
    assert made.compute_hash() == vllms_own(made)
    assert made.compute_hash(include_version=False) == vllms_own(made, include_version=False) != vllms_own(made)
