"""One real server with the flag: adapters loaded aside serve, what can't be loaded is told, limits give 429."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vllm_loraserve.launcher.processes import free_ports

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


def post(url: str, path: str, body: dict[str, Any], timeout: float = 600) -> tuple[int, Any]:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read().decode()
            return answer.status, json.loads(text) if text.startswith("{") else text
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def complete(url: str, model: str, tokens: int = 6) -> tuple[int, Any]:
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": tokens, "temperature": 0}
    return post(url, "/v1/completions", body | {"ignore_eos": True})


def stream(url: str, model: str, tokens: int) -> list[str]:
    """The data of every event."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": tokens, "temperature": 0}
    text = json.dumps(body | {"ignore_eos": True, "stream": True}).encode()
    request = urllib.request.Request(url + "/v1/completions", text, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        lines = answer.read().decode().splitlines()
    return [line.removeprefix("data: ") for line in lines if line]


@pytest.fixture
def server(model_dir: Path, tmp_path: Path) -> Iterator[str]:
    (port,) = free_ports(1, random.randrange(10000, 30000))
    log = tmp_path / "server.log"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base", "--enforce-eager"]
    flags += ["--max-model-len", "512", "--kv-cache-memory-bytes", str(128 << 20), "--max-loras", "2"]
    options = {"max_inflight_tokens": {"limited": 60}, "limit_wait_s": 0.05, "trace_schedule": str(tmp_path / "trace")}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_dir), *flags]
    command += ["--enable-loraserve", "--loraserve-config", json.dumps(options)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # One thread, bound to no core: several wait for each other in every small step when another process runs.
    env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 1200
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(url + "/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def test_loads_aside_and_tells_why_not(server: str, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """One server, started once: four adapters through two slots, then what can't be served, then a limit."""
    for number in range(4):
        path = make_adapter(f"a{number}", 8 * (number + 1), number + 1)
        assert post(server, "/v1/load_lora_adapter", {"lora_name": f"a{number}", "lora_path": str(path)})[0] == 200
    apart = {name: complete(server, name) for name in ("base", "a0", "a1", "a2", "a3")}
    assert {status for status, _ in apart.values()} == {200}
    texts = {name: answer["choices"][0]["text"] for name, (_, answer) in apart.items()}
    assert len(set(texts.values())) == 5
    with ThreadPoolExecutor(10) as pool:
        names = list(texts) * 4
        together = list(pool.map(lambda name: complete(server, name), names))
    assert [answer["choices"][0]["text"] for _, answer in together] == [texts[name] for name in names]

    # Four adapters through two slots: some had to leave the arena.
    for _ in range(100):
        with urllib.request.urlopen(server + "/metrics", timeout=60) as page:
            shown = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if "{tier=" in line)
        if float(shown['loraserve:resident_adapters{tier="host",worker="0"}']) == 4:
            break
        complete(server, "base")
    values = {key.removeprefix("loraserve:").replace(',worker="0"', ""): float(value) for key, value in shown.items()}
    assert values['resident_adapters{tier="host"}'] == 4
    assert 1 <= values['resident_adapters{tier="arena"}'] <= 2
    assert values['evictions_total{tier="arena"}'] >= 2
    assert values['evictions_total{tier="host"}'] == 0
    for tier in ("arena", "host"):
        key = f'_bytes{{tier="{tier}"}}'
        assert 0 < values["memory_used" + key] <= values["memory_size" + key]

    # Seen at a look: refused when it is registered.
    broken = make_adapter("broken", 8, 9)
    weights = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    status, answer = post(server, "/v1/load_lora_adapter", {"lora_name": "broken", "lora_path": str(broken)})
    assert status >= 400, answer
    status, answer = post(server, "/v1/load_lora_adapter", {"lora_name": "none", "lora_path": str(tmp_path / "none")})
    assert status >= 400, answer

    # Gone between registration and use: the request says why, the others go on.
    gone = make_adapter("gone", 8, 10)
    assert post(server, "/v1/load_lora_adapter", {"lora_name": "gone", "lora_path": str(gone)})[0] == 200
    for file in gone.iterdir():
        file.unlink()
    for name in list(texts) * 2:
        assert complete(server, name)[0] == 200
    status, answer = complete(server, "gone")
    if status != 200:  # it may have been read before its files went
        assert 400 <= status < 500
        assert "gone" in answer["error"]["message"]

    # Over its limit: queued for a while, then 429.
    limited = make_adapter("limited", 8, 11)
    assert post(server, "/v1/load_lora_adapter", {"lora_name": "limited", "lora_path": str(limited)})[0] == 200
    assert complete(server, "limited")[0] == 200
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda _: complete(server, "limited", 250), range(4)))
    codes = sorted(status for status, _ in statuses)
    assert codes[0] == 200
    assert codes[-1] == 429, codes
    # Streams have begun by then: the status is in an event.
    with ThreadPoolExecutor(3) as pool:
        streams = list(pool.map(lambda _: stream(server, "limited", 250), range(3)))
    assert all(events[-1] == "[DONE]" for events in streams)
    errors = [event["error"] for events in streams for event in map(json.loads, events[:-1]) if "error" in event]
    assert [error["code"] for error in errors] in ([429], [429, 429])
    assert "limited" in errors[0]["message"]
    assert complete(server, "base")[1]["choices"][0]["text"] == texts["base"]
    trace = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert any(len(line["lora_tokens"]) == 2 for line in trace)
    assert max(len(line["lora_tokens"]) for line in trace) == 2
