"""One real `vllm serve` in a cluster of its own: registered adapters are served, removed ones are gone for good."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorUnavailable  # noqa: E402
from vllm_loraserve.coordinator.messages import (  # noqa: E402
    AddAdapter,
    GetStatus,
    GetTable,
    RemoveAdapter,
    RoutingTable,
    Status,
)
from vllm_loraserve.launcher.processes import free_ports  # noqa: E402
from vllm_loraserve.transfer.auth import generate_key  # noqa: E402

ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Two instances that vLLM binds to the same cores wait for each other's idle loops, all their threads included.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


PATIENT = ("--expiry", "1000", "--settle", "1000")
"""Of the coordinator: nobody is given up because the machine is busy."""


class Site:
    """Processes of one test: a coordinator at `endpoint`, instances on ports of their own; logs in `directory`."""

    def __init__(self, directory, model_dir) -> None:
        self.directory, self.model_dir = directory, model_dir
        # Below the range of outgoing connections, which could take a port before its server starts.
        coordinator, _, *self.ports = free_ports(10, random.randrange(10000, 30000), consecutive=True)
        self.endpoint = f"tcp://127.0.0.1:{coordinator}"
        self.running: list[subprocess.Popen] = []

    def start(self, *command: str, log: str) -> subprocess.Popen:
        with (self.directory / log).open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, **ENV},
            )  # fmt: skip
        self.running.append(process)
        return process

    def start_coordinator(self) -> subprocess.Popen:
        return self.start(
            "vllm_loraserve.cli", "coordinator", "--bind", self.endpoint, "--database",
            str(self.directory / "r.sqlite"), "--adapter-root", str(self.directory), *PATIENT, log="coordinator.log",
        )  # fmt: skip

    def start_instance(self, name: str, **options) -> tuple[subprocess.Popen, int]:
        """(process, HTTP port) of an instance that is starting."""
        port = self.ports.pop()
        config = {"coordinator": self.endpoint, "instance": name, "heartbeat_s": 0.5, **options}
        process = self.start(
            "vllm.entrypoints.cli.main", "serve", str(self.model_dir), "--served-model-name", "base", "--port",
            str(port), "--host", "127.0.0.1", "--enable-loraserve", "--loraserve-config", json.dumps(config),
            "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "--max-loras", "2",
            "--max-lora-rank", "16", "--dtype", "float32", log=f"{name}.log",
        )  # fmt: skip
        return process, port

    def stop(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.running:
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if os.environ.get("LORASERVE_TEST_LOGS"):
            for log in sorted(self.directory.glob("*.log")):
                print(f"== {log.name}", log.read_text(), sep="\n")


@pytest.fixture
def site(tmp_path, model_dir):
    """A Site that is stopped at the end."""
    made = Site(tmp_path, model_dir)
    yield made
    made.stop()


def complete(port: int, model: str) -> tuple[int, str]:
    """(HTTP status, text or error message) of a greedy completion."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.status, json.load(answer)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


async def until(question):
    """The first true answer of an async question."""
    async with asyncio.timeout(1200):
        while True:
            if (answer := await question()) is not None:
                return answer
            await asyncio.sleep(0.2)


async def test_a_real_instance_in_a_cluster(site, make_adapter):
    coordinator = site.start_coordinator()
    instance, port = site.start_instance("one")
    a, b = make_adapter("a", rank=8, seed=1), make_adapter("b", rank=16, seed=2)

    async def ask(model: str) -> tuple[int, str]:
        return await asyncio.to_thread(complete, port, model)

    async with CoordinatorClient(site.endpoint, timeout_s=10) as client:

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

        table = await until(joined)
        assert table.base_model == "base"
        assert table.instances[0].capacity.slots == 2
        base = await ask("base")
        assert base[0] == 200

        await client.request(AddAdapter(name="a", source=str(a)))
        await until(lambda: resident("a"))
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
        site.start_coordinator()
        table = await until(joined)
        assert [r.adapter.name for r in table.adapters if r.routes] == ["a", "b"]

        # Removed means gone, from the engine too; the same name with other content is other content.
        await client.request(RemoveAdapter(name="a", drain_s=20))
        await until(lambda: resident("b"))
        assert (await ask("a"))[0] == 404
        for file in b.iterdir():
            (a / file.name).write_bytes(file.read_bytes())
        await client.request(AddAdapter(name="a", source=str(a)))
        await until(lambda: resident("a", "b"))
        assert await ask("a") == second, "no block of the prefix cache is left of the old content"

        instance.send_signal(signal.SIGTERM)

        async def left():
            return True if not (await client.ask(GetTable(), RoutingTable)).instances else None

        await until(left)


async def test_an_adapter_whose_checkpoint_is_gone_comes_from_the_other_instance(site, make_adapter, tmp_path):
    key = tmp_path / "transfer.key"
    key.write_bytes(generate_key())
    key.chmod(0o600)
    site.start_coordinator()
    instances = {n: site.start_instance(n, transfer_key_file=str(key), transfer_rdma="off") for n in ("one", "two")}
    path = make_adapter("a", rank=8, seed=1)
    async with CoordinatorClient(site.endpoint, timeout_s=10) as client:

        async def table() -> RoutingTable | None:
            assert all(process.poll() is None for process, _ in instances.values()), "an instance ended"
            try:
                return await client.ask(GetTable(), RoutingTable)
            except CoordinatorUnavailable:
                return None

        async def both():
            t = await table()
            return t if t and len(t.instances) == 2 and all(i.transfer for i in t.instances) else None

        async def holder():
            t = await table()
            found = [i.name for i in t.instances if i.resident] if t else []
            return found[0] if found else None

        await until(both)
        await client.request(AddAdapter(name="a", source=str(path)))
        first = await until(holder)
        (second,) = instances.keys() - {first}
        base = await asyncio.to_thread(complete, instances[first][1], "base")
        right = await asyncio.to_thread(complete, instances[first][1], "a")
        assert right[0] == 200
        assert right[1] != base[1]
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        assert await asyncio.to_thread(complete, instances[second][1], "a") == right
        log = (tmp_path / f"{second}.log").read_text()
        assert "is read by memfd; cuda_ipc: " in log, "the choice of the way, and why no other"
        assert "came from peer memfd" in log

        # An adapter whose only holder dies, its checkpoint gone as well: a clear 503, and the engine goes on.
        lost = make_adapter("b", rank=8, seed=2)
        os.killpg(instances[second][0].pid, signal.SIGSTOP)  # so that it fetches nothing ahead
        await client.request(AddAdapter(name="b", source=str(lost)))
        assert (await asyncio.to_thread(complete, instances[first][1], "b"))[0] == 200
        shutil.rmtree(lost)
        os.killpg(instances[first][0].pid, signal.SIGKILL)
        os.killpg(instances[second][0].pid, signal.SIGCONT)
        status, message = await asyncio.to_thread(complete, instances[second][1], "b")
        assert status == 503, message
        assert "'b' cannot be brought in now" in message
        assert await asyncio.to_thread(complete, instances[second][1], "base") == base
        assert await asyncio.to_thread(complete, instances[second][1], "a") == right
