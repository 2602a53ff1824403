"""Keys: who gets in, and that they show up nowhere."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vllm_loraserve.router.auth import Keys, load_keys

from .conftest import Serve


def test_only_a_bearer_of_a_key_is_admitted() -> None:
    keys = Keys(["secret", "other"])
    for good in ("Bearer secret", "bearer other", "Bearer  secret "):
        assert keys.admits(good)
    for bad in (
        None,
        "",
        "secret",
        "Basic secret",
        "Bearer",
        "Bearer ",
        "Bearer secre",
        "Bearer secret2",
        "Bearer \udcff",
    ):
        assert not keys.admits(bad)
    assert Keys().admits(None)
    assert "secret" not in repr(keys)


async def test_anthropics_header_carries_a_key_too(serve: Serve) -> None:
    served = await serve(1, keys=Keys(["secret"]))
    for headers, status in (
        ({"X-Api-Key": "secret"}, 200),
        ({"X-Api-Key": "wrong"}, 401),
        ({"X-Api-Key": "secret", "Authorization": "Bearer wrong"}, 401),
    ):
        async with served.client.post("/v1/messages", json={"model": "base"}, headers=headers) as r:
            assert r.status == status


def test_keys_come_from_environment_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none # first\n\ntwo\n")
    keys = load_keys({"K": "three, four"}, "K", file)
    assert all(keys.admits(f"Bearer {key}") for key in ("one", "two", "three", "four"))
    assert not keys.admits("Bearer # ours")
    assert not load_keys({}, "K", None)


def test_a_key_file_without_keys_does_not_open_the_router(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="readable file"):
        load_keys({}, "K", tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no key"):
        load_keys({}, "K", empty)


async def test_paths_ask_for_keys(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = await serve(1, keys=Keys(["user-key"]), admin_keys=Keys(["admin-key"]), upstream_key="inner-key")
    for method, path, key, status in (
        ("GET", "/v1/models", None, 401),
        ("GET", "/v1/models", "wrong", 401),
        ("GET", "/v1/models", "user-key", 200),
        ("POST", "/v1/completions", None, 401),
        ("POST", "/v1/completions", "user-key", 200),
        ("POST", "/v1/load_lora_adapter", "user-key", 401),
        ("POST", "/v1/load_lora_adapter", "admin-key", 400),
        ("GET", "/no/such/path", None, 401),
        ("GET", "/health", None, 200),
        ("GET", "/metrics", None, 200),
    ):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        data = b'{"model": "base"}' if method == "POST" else None
        async with served.client.request(method, path, data=data, headers=headers) as r:
            assert r.status == status, (method, path, key)
            if status == 401:
                assert (await r.json())["error"]["type"] == "AuthenticationError"
                assert r.headers["WWW-Authenticate"] == "Bearer"
    assert served.stubs[0].headers[0]["Authorization"] == "Bearer inner-key"  # the client's own stays here
    for key in ("user-key", "admin-key", "inner-key"):
        assert key not in caplog.text


async def test_without_keys_the_instances_ask(serve: Serve) -> None:
    served = await serve(1)
    async with served.client.post("/v1/completions", data=b"{}", headers={"Authorization": "Bearer theirs"}) as r:
        assert r.status == 200
    assert served.stubs[0].headers[0]["Authorization"] == "Bearer theirs"
