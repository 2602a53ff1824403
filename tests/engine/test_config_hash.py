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
    "options",
    [
        {"max_rank": 64},
        {"page_rows": 16},
        {"arena_rank_rows": 64},
        {"arena_gib": 0.1},
        {"arena_share": 0.5},
        {"host_gib": 2},
    ],
)
def test_what_is_computed_from_is(hash_of: HashOf, options: dict[str, Any]) -> None:
    assert hash_of(**options) != hash_of()


def test_what_others_put_beside_it_is(hash_of: HashOf) -> None:
    assert hash_of(other=2) != hash_of(other=1)


def test_another_release_of_ours_has_another_hash(hash_of: HashOf, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hash_of()
    monkeypatch.setattr("vllm_loraserve.__version__", "99")
    assert hash_of() != before


NOT_COMPUTED_FROM = {
    *("adapter_roots", "page_cache_dir", "page_cache_gib", "coordinator", "instance", "advertise_url", "heartbeat_s"),
    *("transfer_key_file", "transfer_host", "transfer_advertise", "transfer_ways", "transfer_rdma", "transfer_gib_s"),
    *("transfer_deadline_s", "prefetch", "concurrent_loads", "load_timeout_s", "load_retries", "skip_window"),
    *("max_skip_s", "operating_points", "lora_cost_per_rank", "lora_share", "shares", "max_inflight_tokens"),
    *("limit_wait_s", "cpu_poll_s", "trace_schedule"),
}


def test_every_option_is_one_or_the_other() -> None:
    """A new option that changes what a worker allocates or computes has to be in the hash."""
    options = {field.name for field in msgspec.structs.fields(LoRAServeConfig)}
    assert set(COMPUTED_FROM) | NOT_COMPUTED_FROM == options
    assert not set(COMPUTED_FROM) & NOT_COMPUTED_FROM


def test_without_the_flag_it_is_vllms_own(model_dir: Path) -> None:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_loraserve import plugin

    plugin.register()
    made = EngineArgs(model=str(model_dir), additional_config={"other": 1}).create_engine_config()
    vllms_own = VllmConfig.compute_hash.__wrapped__  # type: ignore[attr-defined]
    assert made.compute_hash() == vllms_own(made)
    assert made.compute_hash(include_version=False) == vllms_own(made, include_version=False) != vllms_own(made)
