"""Processes that are killed: an instance under load, an instance in a stream, the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.messages import (
    Capacity,
    Command,
    CommandResult,
    Heartbeat,
    HeartbeatReply,
    Load,
    Register,
    Residency,
)
from vllm_loraserve.launcher.processes import free_ports
from vllm_loraserve.router.app import RouterConfig

from .conftest import PATIENCE_S, Serve, entry, routes, table
from .stub import Stub

STUB = Path(__file__).with_name("stub.py")
SHAPES = {"q_proj": (16, 16), "v_proj": (16, 16)}


class Process:
    """A stub in a process of its own, which can be killed."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    async def arrivals(self, count: int) -> None:
        """Waits until so many more requests have arrived."""
        assert self.process.stdout is not None
        for _ in range(count):
            assert await self.process.stdout.readline() == b"arrived\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)


@contextlib.asynccontextmanager
async def stub_process(*script: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, str(STUB), *script, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield Process(process, json.loads(await process.stdout.readline())["port"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_kill_9_under_16_concurrent_requests_fails_none(serve: Serve) -> None:
    """All 16 are inside the instance when it dies."""
    served = await serve(1)
    survivor = served.stubs[0]
    async with stub_process("hold") as victim, asyncio.timeout(PATIENCE_S):
        both = [entry("victim", victim.url), entry("a", survivor.url)]
        served.router.directory.apply(table(both, [routes("one", victim=1.0)], version=5))

        async def ask() -> tuple[int, str]:
            async with served.client.post("/v1/completions", json={"model": "one"}) as r:
                return r.status, (await r.json())["served_by"]

        requests = [asyncio.ensure_future(ask()) for _ in range(16)]
        await victim.arrivals(16)
        victim.kill()
        assert await asyncio.gather(*requests) == [(200, "a")] * 16
    assert served.idle()


@pytest.mark.parametrize("script", [("headers", "hold"), ("headers", "half", "hold"), ("hold",)])
async def test_kill_9_before_the_first_event_is_not_seen(serve: Serve, script: tuple[str, ...]) -> None:
    served = await serve(1)
    survivor = served.stubs[0]
    survivor.script = ["headers", "event", "done"]
    async with stub_process(*script) as victim, asyncio.timeout(PATIENCE_S):
        both = [entry("victim", victim.url), entry("a", survivor.url)]
        served.router.directory.apply(table(both, [routes("one", victim=1.0)], version=5))
        answer = asyncio.ensure_future(served.client.post("/v1/completions", json={"model": "one", "stream": True}))
        await victim.arrivals(1)
        victim.kill()
        async with await answer as r:
            assert r.status == 200
            assert (await r.content.read()).count(b"data: ") == 2
    assert served.idle()


async def test_kill_9_within_a_stream_ends_it_with_an_error_event(serve: Serve) -> None:
    served = await serve(1)
    async with stub_process("headers", "event", "event", "half", "hold") as victim, asyncio.timeout(PATIENCE_S):
        both = [entry("victim", victim.url), entry("a", served.stubs[0].url)]
        served.router.directory.apply(table(both, [routes("one", victim=1.0)], version=5))
        async with served.client.post("/v1/completions", json={"model": "one", "stream": True}) as r:
            for _ in range(2):
                await r.content.readuntil(b"\n\n")
            victim.kill()
            events = (await r.content.read()).split(b"\n\n")
    assert json.loads(events[0].removeprefix(b"data: "))["error"]["type"] == "BadGatewayError"
    assert events[1:] == [b"data: [DONE]", b""]
    assert served.stubs[0].bodies == []
    assert served.idle()


class Agent:
    """What the plugin does in an instance, as far as membership goes: registers, and heartbeats until it is stopped."""

    def __init__(self, endpoint: str, stub: Stub) -> None:
        self._client = CoordinatorClient(endpoint, timeout_s=2.0)
        self._stub = stub
        self._resident: dict[str, Residency] = {}
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._client.close()

    async def _run(self) -> None:
        name = self._stub.name
        hello = Register(
            instance=name,
            incarnation=name,
            url=self._stub.url,
            base_model="toy",
            capacity=Capacity(slots=8, rank_rows=512),
            modules={name: (sizes,) for name, sizes in SHAPES.items()},
        )
        while True:
            with contextlib.suppress(CoordinatorUnavailable, CoordinatorError):
                await self._client.request(hello)
                results: tuple[CommandResult, ...] = ()
                while True:
                    await asyncio.sleep(0.2)
                    beat = Heartbeat(
                        instance=name,
                        incarnation=name,
                        load=Load(),
                        resident=tuple(self._resident.values()),
                        results=results,
                    )
                    reply = await self._client.ask(beat, HeartbeatReply)
                    results = tuple(self._obey(command) for command in reply.commands)

    def _obey(self, command: Command) -> CommandResult:
        adapter = command.adapter
        if command.action == "prefetch":
            self._resident[adapter.name] = Residency(name=adapter.name, sha256=adapter.sha256)
        else:
            self._resident.pop(adapter.name, None)
        return CommandResult(id=command.id, ok=True)


@contextlib.asynccontextmanager
async def coordinator(endpoint: str, directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm_loraserve.cli", "coordinator", "--bind", endpoint),
        *("--database", str(directory / "registry.sqlite"), "--adapter-root", str(directory / "adapters")),
        # No instance is given up because the machine is busy.
        *("--expiry", "1000", "--settle", "1000"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_traffic_goes_on_without_the_coordinator_and_it_finds_everything_again(
    serve: Serve, tmp_path: Path
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_ports(2, random.randrange(10000, 30000), consecutive=True)[0]}"
    source = _write_adapter(tmp_path / "adapters" / "one", rank=8)
    other = _write_adapter(tmp_path / "adapters" / "other", rank=16)
    stubs = [await Stub(name).start() for name in ("a", "b")]
    agents = []
    served = await serve(0, config=RouterConfig(coordinator=endpoint, unload_drain_s=1.0))

    async def ask(model: str) -> int:
        async with served.client.post("/v1/completions", json={"model": model}) as r:
            return r.status

    async def load(name: str, path: Path) -> int:
        async with served.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)}) as r:
            return r.status

    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            async with coordinator(endpoint, tmp_path) as first:
                agents = [Agent(endpoint, stub) for stub in stubs]
                while len(served.router.directory.upstreams) < 2:
                    await asyncio.sleep(0.05)
                assert await load("one", source) == 200
                assert await load("one", source) == 200  # the same content again
                assert await load("one", other) == 409
                assert await load("evil", Path("/etc")) == 403
                assert await load("none", tmp_path / "adapters" / "missing") == 404
                assert [await ask("one"), await ask("toy"), await ask("nobody")] == [200, 200, 404]
                first.send_signal(signal.SIGKILL)
                await first.wait()
                assert {await ask("one") for _ in range(20)} == {200}
                assert await ask("toy") == 200
            async with coordinator(endpoint, tmp_path):
                while served.router.directory.table is None or served.router.directory.table.epoch < 2:
                    assert {await ask("one"), await ask("toy")} == {200}
                    await asyncio.sleep(0.05)
                found = served.router.directory.table
                assert {i.name for i in found.instances} == {"a", "b"}
                assert [r.adapter.name for r in found.adapters] == ["one"]
                assert await ask("one") == 200
                async with served.client.post("/v1/unload_lora_adapter", json={"lora_name": "one"}) as r:
                    assert r.status == 200
                assert await ask("one") == 404
    finally:
        for agent in agents:
            await agent.stop()
        for stub in stubs:
            await stub.stop()


def _write_adapter(directory: Path, rank: int) -> Path:
    """A small real PEFT checkpoint for SHAPES."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(rank)
    tensors = {}
    for module, (n_in, n_out) in SHAPES.items():
        prefix = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((rank, n_in)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((n_out, rank)).astype(np.float32)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(SHAPES), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "toy"}))
    return directory
