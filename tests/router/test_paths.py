"""Every path that the installed vLLM serves is either the router's, forwarded, or refused with a reason."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from vllm_loraserve.router.paths import FORWARDED_PATHS, OWN_PATHS, why_not_forwarded


@pytest.mark.vllm
def test_every_path_of_vllm_is_decided_upon() -> None:
    import vllm.entrypoints
    from fastapi.routing import APIRouter

    served: dict[str, str] = {}
    for module in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        if module.name.rpartition(".")[2] in ("api_router", "basic", "health"):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, APIRouter):
                    served |= {route.path: module.name for route in value.routes}  # type: ignore[attr-defined]
    assert served.keys() >= {"/v1/completions", "/v1/embeddings", "/v1/audio/transcriptions", "/sleep", "/tokenize"}
    undecided = {
        path: where
        for path, where in served.items()
        if path not in FORWARDED_PATHS and path not in OWN_PATHS and why_not_forwarded(path) is None
    }
    assert undecided == {}


def test_a_path_is_decided_upon_once() -> None:
    assert not set(FORWARDED_PATHS) & set(OWN_PATHS)
    assert all(why_not_forwarded(path) is None for path in (*FORWARDED_PATHS, *OWN_PATHS, "/v1/nothing"))
    assert "on the instance that answered" in (why_not_forwarded("/v1/responses/resp_1/cancel") or "")
