"""One real `vllm serve` in a cluster of its own: registered adapters are served, removed ones are gone for good."""

import asyncio
import json
import os
import signal
import socket as sockets
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorUnavailable  # noqa: E402
from vllm_loraserve.coordinator.messages import (  # noqa: E402
    AddAdapter,
    GetStatus,
    GetTable,
    RemoveAdapter,
    RoutingTable,
    Status,
)

ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def free_ports() -> tuple[int, int]:
    """A port for HTTP, and one whose next is free too."""
    while True:
        with sockets.socket() as a, sockets.socket() as b, sockets.socket() as c:
            a.bind(("127.0.0.1", 0))
            b.bind(("127.0.0.1", 0))
            try:
                c.bind(("127.0.0.1", b.getsockname()[1] + 1))
            except (OSError, OverflowError):
                continue
            return a.getsockname()[1], b.getsockname()[1]


@pytest.fixture
def processes(tmp_path, model_dir):
    """start_coordinator(), and (HTTP port, endpoint) of one instance that is starting."""
    http, zmq_port = free_ports()
    endpoint = f"tcp://127.0.0.1:{zmq_port}"
    running = []

    def start(*command: str, log: str) -> subprocess.Popen:
        with (tmp_path / log).open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=out,
                stderr=out,
                env={**os.environ, **ENV},
                start_new_session=True,
            )
        running.append(process)
        return process

    def start_coordinator() -> subprocess.Popen:
        return start(
            "vllm_loraserve.cli", "coordinator", "--bind", endpoint, "--database", str(tmp_path / "r.sqlite"),
            "--adapter-root", str(tmp_path), log="coordinator.log",
        )  # fmt: skip

    config = {"coordinator": endpoint, "instance": "one", "heartbeat_s": 0.5}
    instance = start(
        "vllm.entrypoints.cli.main", "serve", str(model_dir), "--served-model-name", "base", "--port", str(http),
        "--host", "127.0.0.1", "--enable-loraserve", "--loraserve-config", json.dumps(config), "--enforce-eager",
        "--max-model-len", "256", "--max-num-seqs", "4", "--max-loras", "2", "--max-lora-rank", "16",
        "--dtype", "float32", log="instance.log",
    )  # fmt: skip
    yield start_coordinator, instance, http, endpoint
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in running:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if os.environ.get("LORASERVE_TEST_LOGS"):
        for log in ("coordinator.log", "instance.log"):
            print((tmp_path / log).read_text())


def complete(port: int, model: str) -> tuple[int, str]:
    """(HTTP status, text or error message) of a greedy completion."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


async def until(question, seconds: float):
    """The first true answer of an async question."""
    async with asyncio.timeout(seconds):
        while True:
            if (answer := await question()) is not None:
                return answer
            await asyncio.sleep(0.2)


async def test_a_real_instance_in_a_cluster(processes, make_adapter):
    start_coordinator, instance, port, endpoint = processes
    coordinator = start_coordinator()
    a, b = make_adapter("a", rank=8, seed=1), make_adapter("b", rank=16, seed=2)

    async def ask(model: str) -> tuple[int, str]:
        return await asyncio.to_thread(complete, port, model)

    async with CoordinatorClient(endpoint, timeout_s=2) as client:

        async def joined():
            assert instance.poll() is None, "the instance ended"
            try:
                table = await client.ask(GetTable(), RoutingTable)
            except CoordinatorUnavailable:
                return None
            return table if table.settled and table.instances else None

        async def resident(*names):
            table = await joined()
            return table if table and {r.name for r in table.instances[0].resident} == set(names) else None

        table = await until(joined, 300)
        assert table.base_model == "base"
        assert table.instances[0].capacity.slots == 2
        base = await ask("base")
        assert base[0] == 200

        await client.request(AddAdapter(name="a", source=str(a)))
        await until(lambda: resident("a"), 60)
        first = await ask("a")
        assert first[0] == 200
        assert first[1] != base[1], "the adapter changes the answer"
        await client.request(AddAdapter(name="b", source=str(b)))
        second = await ask("b")
        assert second[0] == 200
        assert second[1] not in (base[1], first[1]), "resolved, if it was not prefetched yet"
        assert (await ask("nobody"))[0] == 404
        assert await ask("base") == base

        status = await client.ask(GetStatus(), Status)
        assert {d.name for d in status.demand} >= {"", "a", "b"}
        assert not status.problems

        # Its coordinator gone: the instance serves; a new one knows everything again.
        coordinator.kill()
        await asyncio.to_thread(coordinator.wait)
        assert await ask("a") == first
        started = time.monotonic()
        start_coordinator()
        table = await until(joined, 30)
        assert time.monotonic() - started < 5.0
        assert [r.adapter.name for r in table.adapters if r.routes] == ["a", "b"]

        # Removed means gone, from the engine too; the same name with other content is other content.
        await client.request(RemoveAdapter(name="a", drain_s=20))
        await until(lambda: resident("b"), 30)
        assert (await ask("a"))[0] == 404
        for file in b.iterdir():
            (a / file.name).write_bytes(file.read_bytes())
        await client.request(AddAdapter(name="a", source=str(a)))
        await until(lambda: resident("a", "b"), 60)
        assert await ask("a") == second, "no block of the prefix cache is left of the old content"

        instance.send_signal(signal.SIGTERM)

        async def left():
            return True if not (await client.ask(GetTable(), RoutingTable)).instances else None

        await until(left, 30)
