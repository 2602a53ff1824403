"""The commands as processes: kill -9 and restart, one database for one coordinator, status, keygen."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest
from coordinator_bench import PATIENCE_S, FakeInstance, free_endpoint, write_adapter

from vllm_loraserve.cluster.operating_points import OperatingPoints, StepCost, save
from vllm_loraserve.coordinator.client import (
    CoordinatorClient,
    CoordinatorError,
    CoordinatorUnavailable,
    TableSubscriber,
)
from vllm_loraserve.coordinator.messages import (
    AddAdapter,
    GetStatus,
    GetTable,
    HeartbeatReply,
    Prediction,
    RoutingTable,
)

COMMAND = [sys.executable, "-m", "vllm_loraserve.cli"]


@pytest.fixture
def start(tmp_path):
    """Starts `vllm-loraserve coordinator` on one database and endpoint; kills what is left."""
    endpoint = free_endpoint()
    processes = []

    def run(*extra: str) -> subprocess.Popen:
        arguments = ["coordinator", "--bind", endpoint, "--database", str(tmp_path / "r.sqlite"),
                     "--adapter-root", str(tmp_path / "adapters"), *extra]  # fmt: skip
        processes.append(subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True))
        return processes[-1]

    run.endpoint = endpoint
    yield run
    for p in processes:
        if p.poll() is None:
            p.kill()
        p.communicate()


async def up(client: CoordinatorClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await client.request(GetStatus(), timeout_s=2)
                return
            except CoordinatorUnavailable:
                continue


async def live(client: CoordinatorClient, instance: FakeInstance) -> None:
    """An instance's loop: heartbeats, and registration whenever it is unknown."""
    while True:
        try:
            reply = await client.ask(instance.beat(), HeartbeatReply, timeout_s=2)
            instance.obey(reply.commands)
        except CoordinatorUnavailable:
            pass
        except CoordinatorError as error:
            if error.code != "unknown_instance":
                raise
            await client.request(instance.hello(), timeout_s=2)
        await asyncio.sleep(0.3)


async def test_kill_9_and_restart_has_every_adapter_and_instance_as_soon_as_they_are_heard(start, tmp_path):
    """No timer is waited for: what ends a membership, and what ends the wait for members, come much later than this
    test's patience. (Under a clock of its own, test_control.py bounds the seconds.)"""
    patient = ("--expiry", "1000", "--settle", "1000")
    process = start(*patient)
    tables = []
    instances = [FakeInstance(n) for n in ("one", "two")]
    clients = [CoordinatorClient(start.endpoint) for _ in instances]
    subscriber = TableSubscriber(start.endpoint, tables.append)
    async with CoordinatorClient(start.endpoint, timeout_s=PATIENCE_S) as client:
        await up(client)
        subscriber.start()
        lives = [asyncio.create_task(live(c, i)) for c, i in zip(clients, instances, strict=True)]
        for i in range(5):
            write_adapter(tmp_path / "adapters" / f"a{i}", seed=i)
            await client.request(AddAdapter(name=f"a{i}", source=f"a{i}"))
        async with asyncio.timeout(PATIENCE_S):
            while sum(len(i.resident) for i in instances) < 5 or len(subscriber.table.instances) < 2:
                await asyncio.sleep(0.05)
        before = await client.ask(GetTable(), RoutingTable)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed = len(tables)
        await asyncio.sleep(1.0)
        assert subscriber.table.epoch == before.epoch, "the last table stays"
        start(*patient)
        async with asyncio.timeout(PATIENCE_S):
            while subscriber.table.epoch == before.epoch:
                await asyncio.sleep(0.02)
        for task in lives:
            assert not task.done()
            task.cancel()
        await subscriber.stop()
        for c in clients:
            await c.close()

    def places(table: RoutingTable) -> dict:
        return {a.adapter.name: a.routes for a in table.adapters}

    assert len(before.adapters) == 5
    for table in tables[killed:]:
        assert [i.name for i in table.instances] == ["one", "two"], "never a table with holes"
        assert places(table) == places(before)


HUNG = """
import os, sys, threading
from vllm_loraserve.cli import main
from vllm_loraserve.coordinator import server
def look(*args, **kw):
    os.write(1, b"looking\\n")  # of two threads: in one piece, as print() is not
    threading.Event().wait()
server.inspect_source = look
sys.exit(main(sys.argv[1:]))
"""


async def test_sources_that_hang_do_not_keep_it_from_ending(tmp_path):
    endpoint = free_endpoint()
    command = [sys.executable, "-c", HUNG, "coordinator", "--bind", endpoint, "--database", str(tmp_path / "r.sqlite")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            async with CoordinatorClient(endpoint) as client:
                await up(client)
                adding = [asyncio.create_task(client.request(AddAdapter(name=n, source=n))) for n in "ab"]
                for _ in adding:
                    assert await asyncio.to_thread(process.stdout.readline) == "looking\n"
                process.terminate()
                assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0
                for task in adding:
                    task.cancel()
        finally:
            process.kill()


async def test_operating_points_of_a_file_are_in_the_table(start, tmp_path):
    cost = StepCost(base=0.25)
    save(OperatingPoints(points={8: 100.0}, step_cost=cost, measured=True), tmp_path / "points.json")
    start("--operating-points", str(tmp_path / "points.json"))
    async with CoordinatorClient(start.endpoint, timeout_s=PATIENCE_S) as client:
        await up(client)
        table = await client.ask(GetTable(), RoutingTable)
    assert table.prediction == Prediction(step_cost=cost, measured=True)


async def test_second_coordinator_on_one_database_is_refused_in_one_line(start, tmp_path):
    start()
    async with CoordinatorClient(start.endpoint, timeout_s=PATIENCE_S) as client:
        await up(client)
        second = start("--publish", "tcp://127.0.0.1:0")
        _, error = await asyncio.to_thread(second.communicate, timeout=PATIENCE_S)
        assert second.returncode == 1
        assert error.count("\n") == 1
        assert "in use by another coordinator" in error


async def test_sigterm_ends_it_in_good_order_and_status_shows_the_cluster(start, tmp_path):
    process = start("--expiry", "1000")  # the instance says nothing after its registration
    write_adapter(tmp_path / "adapters" / "a", rank=32)
    async with CoordinatorClient(start.endpoint, timeout_s=PATIENCE_S) as client:
        await up(client)
        await client.request(FakeInstance("one").hello())
        await client.request(AddAdapter(name="word-a", source="a"))
    status = [*COMMAND, "status", "--coordinator", start.endpoint]
    shown = await asyncio.to_thread(
        subprocess.run, status, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert shown.returncode == 0
    assert "word-a" in shown.stdout
    assert "one 100%" in shown.stdout
    as_json = await asyncio.to_thread(subprocess.run, [*status, "--json"], capture_output=True, text=True)
    assert json.loads(as_json.stdout)["table"]["adapters"][0]["adapter"]["rank"] == 32
    for command, says in ((["plan"], "would move nothing"), (["explain", "word-a"], "Placed on 'one' for 100%")):
        arguments = [*COMMAND, *command, "--coordinator", start.endpoint]
        told = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        assert says in told.stdout
    unknown = [*COMMAND, "explain", "nobody", "--coordinator", start.endpoint]
    told = await asyncio.to_thread(subprocess.run, unknown, capture_output=True, text=True)
    assert told.returncode == 1
    assert "no adapter 'nobody'" in told.stderr
    process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0
    gone = await asyncio.to_thread(subprocess.run, [*status, "--timeout", "0.3"], capture_output=True, text=True)
    assert gone.returncode == 1
    assert "is it running" in gone.stderr


def test_unusable_options_are_one_line(tmp_path):
    database = ["--database", str(tmp_path / "r.sqlite")]
    for extra, says in (
        (["--bind", "tcp://0.0.0.0:45871"], "--insecure"),
        (["--policy", "wishful"], "unknown placement policy"),
        (["--keys", str(tmp_path)], "keygen"),
        (["--bind", "tcp://127.0.0.1"], "no usable port"),
        (["--metrics-port", "70000"], "0-65535"),
    ):
        done = subprocess.run(
            [*COMMAND, "coordinator", *database, *extra], capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 1
        assert says in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_keygen(tmp_path):
    made = subprocess.run([*COMMAND, "keygen", str(tmp_path / "k")], capture_output=True, text=True)
    assert made.returncode == 0
    assert "LORASERVE_KEYS" in made.stdout
    again = subprocess.run([*COMMAND, "keygen", str(tmp_path / "k")], capture_output=True, text=True)
    assert again.returncode == 1
    assert "already has keys" in again.stderr
