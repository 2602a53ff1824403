"""`vllm-loraserve router` as a process: starts, serves, drains, says what is wrong."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest
from aiohttp import ClientSession

from vllm_loraserve.cli import main

from .conftest import PATIENCE_S
from .stub import Stub


async def test_serves_and_finishes_running_requests_before_it_stops() -> None:
    stub = await Stub("a", ["headers", "event", "hold", "event", "done"]).start()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm_loraserve.cli", "router", "--port", "0", "--instances", stub.url),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            while b"listens on" not in (line := await process.stderr.readline()):
                assert line, "the router ended"
            url = line.decode().split("listens on ")[1].strip()
            async with ClientSession() as client, client.post(url + "/v1/completions", json={"model": "base"}) as r:
                await r.content.readuntil(b"\n\n")
                process.send_signal(signal.SIGTERM)
                while b"stops" not in await process.stderr.readline():
                    pass
                stub.release()
                assert await r.content.read() == b'data: {"choices": [{"text": "a-1"}]}\n\ndata: [DONE]\n\n'
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await stub.stop()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of the arguments --coordinator --instances is required"),
        (["--instances", "http://x", "--max-queue", "-1"], "-1 is below 0 requests"),
        (["--instances", "http://x", "--max-concurrency", "many"], "'many' is no number of requests"),
        (["--instances", "http://x", "--idle-timeout-s", "nan"], "nan is below"),
        (["--instances", "http://x", "--port", "70000"], "70000 is above 65535 port"),
    ],
)
def test_wrong_options_are_told_in_a_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["router", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_key_file_keeps_the_router_from_starting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["router", "--instances", "http://x", "--api-key-file", "/nowhere/keys"]) == 2
    assert "API key file /nowhere/keys" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--coordinator", "localhost:5700"], "'localhost:5700' has no transport; give tcp://HOST:PORT"),
        (["--coordinator", "tcp://localhost"], "'tcp://localhost' has no usable port; give tcp://HOST:PORT"),
        (["--instances", "http://x:1", "localhost:8001"], "'localhost:8001' is none; give http://HOST:PORT"),
    ],
)
def test_an_unusable_address_is_told_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["router", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


async def test_a_taken_port_is_told_in_a_line() -> None:
    stub = await Stub("a").start()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm_loraserve.cli", "router", "--instances", stub.url, "--port", str(stub.port)),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 1
    assert f"can't listen on 127.0.0.1:{stub.port}: ".encode() in said
    await stub.stop()


def test_keys_that_can_not_be_read_are_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORASERVE_KEYS", str(tmp_path))
    assert main(["router", "--coordinator", "tcp://127.0.0.1:5799", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-loraserve router: The key file '{tmp_path}/member.key_secret' can't be read")
