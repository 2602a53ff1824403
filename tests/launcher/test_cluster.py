"""Starting, failing and stopping a cluster, with stubs in place of the servers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from stubs import PATIENCE_S, STUB, wait_until_dead

from vllm_loraserve.cluster.operating_points import OperatingPoints, save
from vllm_loraserve.launcher import traffic
from vllm_loraserve.launcher.cluster import Cluster, Plan, api_key
from vllm_loraserve.launcher.errors import StartError
from vllm_loraserve.launcher.processes import Server, healthy, is_free, listen_error
from vllm_loraserve.launcher.traffic import client_for


def test_everything_starts_in_order_and_stops(plan: Plan) -> None:
    events: list[tuple[str, str]] = []
    cluster = Cluster(plan, lambda part, state: events.append((part, state)))
    with cluster.running():
        assert healthy(cluster.url)
        pids = [pid for server in cluster.servers for pid in server.pids()]
        assert len(pids) == 3 * 4  # guard, server and its child, of four parts
    assert wait_until_dead(pids, 0.0) == []
    started = [part for part, state in events if state == "starting"]
    assert started == ["coordinator", "router", "instance-0", "instance-1"]
    assert sorted(part for part, state in events if state == "ready") == sorted(started)


def test_the_parts_are_told_of_each_other(plan: Plan) -> None:
    plan = dataclasses.replace(
        plan, max_rank=64, adapter_roots=("/adapters",), vllm_options=("--max-loras=3", "--dtype", "bfloat16")
    )
    cluster = Cluster(plan)
    command = cluster.instances[1].command
    config = json.loads(command[command.index("--loraserve-config") + 1])
    assert config == {
        "coordinator": cluster.coordinator_endpoint,
        "instance": "instance-1",
        "max_rank": 64,
        "adapter_roots": ["/adapters"],
        "arena_rank_rows": 512,
        "transfer_key_file": str(plan.state / "transfer.key"),
    }
    key = plan.state / "transfer.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_text()) == 64
    before = key.read_text()
    Cluster(plan)
    assert key.read_text() == before
    assert "--enable-loraserve" in command
    assert command[command.index("--served-model-name") + 1] == "model"
    assert command[-3:] == ["--max-loras=3", "--dtype", "bfloat16"]
    assert "--max-loras" not in command
    assert cluster.coordinator_endpoint in cluster.coordinator.command
    assert cluster.coordinator_endpoint in cluster.router.command
    assert len({cluster.plan.port, *cluster.instance_ports}) == 3


def test_an_arena_that_the_user_gives_is_not_overridden(plan: Plan) -> None:
    plan = dataclasses.replace(plan, vllm_options=("--loraserve-config.arena_gib", "2"))
    command = Cluster(plan).instances[0].command
    assert "arena_rank_rows" not in command[command.index("--loraserve-config") + 1]
    assert command[-2:] == ["--loraserve-config.arena_gib", "2"]


def test_a_part_that_ends_stops_the_start_and_shows_its_log(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_FAILS", "instance")
    cluster = Cluster(plan)
    with pytest.raises(StartError, match=r"instance-\d ended with status 3(.|\n)*can't find its thing"):
        cluster.start()
    assert all(server.pids() == [] for server in cluster.servers)


def test_a_port_that_is_taken_is_said_at_once(plan: Plan) -> None:
    with Cluster(plan).running(), pytest.raises(StartError, match=f"port {plan.port} is taken"):
        Cluster(plan)


def test_an_address_that_is_not_this_machines_is_said_at_once(plan: Plan) -> None:
    with pytest.raises(StartError, match=r"can't listen on 192\.0\.2\.1:.*choose another --host"):
        Cluster(dataclasses.replace(plan, host="192.0.2.1"))


@pytest.mark.skipif(listen_error("::1", 0) is not None, reason="this machine has no IPv6 loopback address")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_ipv6_host(plan: Plan, host: str) -> None:
    cluster = Cluster(dataclasses.replace(plan, host=host))
    assert cluster.url == f"http://[::1]:{plan.port}"
    assert cluster.router.command[cluster.router.command.index("--host") + 1] == host


def test_keys_of_the_environment(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORASERVE_API_KEY", "LORASERVE_ADMIN_API_KEY", "LORASERVE_UPSTREAM_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert api_key() is None
    assert not {"LORASERVE_UPSTREAM_API_KEY", "LORASERVE_API_KEY"} & Cluster(plan).router.env.keys()
    monkeypatch.setenv("LORASERVE_API_KEY", ", one, two")
    assert (api_key(), api_key(admin=True), client_for("http://x").api_key) == ("one", "one", "one")
    monkeypatch.setenv("LORASERVE_ADMIN_API_KEY", "root")
    assert (api_key(), api_key(admin=True)) == ("one", "root")
    monkeypatch.setenv("VLLM_API_KEY", "inner")  # the instances will ask for it
    assert Cluster(plan).router.env["LORASERVE_UPSTREAM_API_KEY"] == "inner"
    given = dataclasses.replace(plan, vllm_options=("--api-key", "given"))
    assert Cluster(given).router.env["LORASERVE_UPSTREAM_API_KEY"] == "given"
    assert Cluster(given).router.env["LORASERVE_API_KEY"] == ", one, two"  # the user's own


def test_what_instances_keep_closed_the_router_does_not_open(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORASERVE_API_KEY", "LORASERVE_ADMIN_API_KEY", "LORASERVE_UPSTREAM_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    given = Cluster(dataclasses.replace(plan, vllm_options=("--api-key", "a", "b", "--max-model-len", "64")))
    assert (given.router.env["LORASERVE_UPSTREAM_API_KEY"], given.router.env["LORASERVE_API_KEY"]) == ("a", "a,b")
    assert api_key(given.router.env, admin=True) == "a"  # our own calls have it too
    monkeypatch.setenv("VLLM_API_KEY", "inner")
    assert Cluster(plan).router.env["LORASERVE_API_KEY"] == "inner"
    assert client_for("http://x").api_key == "inner"
    sent: list[Any] = []

    def answer(request: Any, timeout: float) -> BytesIO:
        sent.append(request.get_header("Authorization"))
        return BytesIO(b"{}")

    monkeypatch.setattr("vllm_loraserve.launcher.cluster._direct.open", answer)
    assert given.get("/v1/models") == b"{}"
    assert sent == ["Bearer a"]


def test_instances_that_never_join_are_an_error(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_INSTANCES", "1")
    cluster = Cluster(plan)
    cluster.coordinator.start()
    cluster.router.start()
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not healthy(cluster.url):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(StartError, match="sees 1 instances"):
            cluster.wait_for_instances(2, 1.0)
    finally:
        cluster.stop()


def test_a_refused_adapter_is_reported_in_the_servers_words(plan: Plan) -> None:
    with Cluster(plan).running() as cluster:
        cluster.add_adapter("good", "/adapters/good")
        with pytest.raises(StartError, match=r"bad was not accepted: The adapter 'bad' is broken\."):
            cluster.add_adapter("bad", "/adapters/bad")


def test_a_proxy_for_other_machines_is_not_asked(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    async def ask(url: str) -> traffic.Answer:
        async with client_for(url) as client:
            return await traffic.ask(client, traffic.Request("apple", "?", False))

    with Cluster(plan).running() as cluster:
        cluster.add_adapter("good", "/adapters/good")
        answer = asyncio.run(ask(cluster.url))
        assert (answer.text, answer.error) == ("Apple", "")


@pytest.mark.parametrize("option", ["--port=9000", "--host", "--uds"])
def test_where_instances_listen_is_not_for_the_user(plan: Plan, option: str) -> None:
    plan = dataclasses.replace(plan, vllm_options=("--dtype", "bfloat16", option, "x"))
    with pytest.raises(StartError, match=f"{option.partition('=')[0]} is not for `vllm serve` here"):
        Cluster(plan)


def test_kill_takes_everything_of_one_part(plan: Plan) -> None:
    with Cluster(plan).running() as cluster:
        pids = cluster.instances[0].pids()
        cluster.instances[0].kill()
        assert wait_until_dead(pids) == []
        assert not healthy(cluster.instance_url(0))
        assert healthy(cluster.instance_url(1))
        cluster.instances[0].start()
        deadline = time.monotonic() + PATIENCE_S
        while not healthy(cluster.instance_url(0)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


UP = """
import functools, os, pathlib, sys
from stubs import stub_programs
from vllm_loraserve.cli import main
from vllm_loraserve.launcher import devices, up
devices.visible_gpus = lambda *given: ()
devices.CPU_INFO = pathlib.Path(os.environ["STUB_CPU_INFO"])
up.Plan = functools.partial(up.Plan, programs=stub_programs())
up.check_vllm = lambda: None
sys.exit(main(sys.argv[1:]))
"""


def start_up(plan: Plan, tmp_path: Path, *options: str, flags: str = "avx2 avx512f") -> subprocess.Popen[str]:
    """`vllm-loraserve up` with stubs, in a process of its own, on a CPU with these flags."""
    cpu_info = tmp_path / "cpuinfo"
    cpu_info.write_text(f"flags\t\t: {flags}\n")
    env = {**os.environ, "STUB_PIDS": str(tmp_path / "pids"), "STUB_CPU_INFO": str(cpu_info), "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(STUB).parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", UP, "up", plan.model, "--port", str(plan.port), "--state", str(plan.state)]
    return subprocess.Popen(
        [*command, *options],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended without {text!r}:\n{seen}")


def pids_of(tmp_path: Path) -> list[int]:
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_says_where_and_stops_all_on_a_signal(plan: Plan, tmp_path: Path, number: signal.Signals) -> None:
    process = start_up(plan, tmp_path)
    seen = read_until(process, "Ctrl-C stops everything")
    assert f"http://127.0.0.1:{plan.port}/v1" in seen
    assert "instance-1 ready" in seen
    pids = pids_of(tmp_path)
    assert len(pids) == 8
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 0
    assert wait_until_dead(pids, 0.0) == []
    assert is_free(plan.port)


def test_up_leaves_no_orphan_after_kill_9(plan: Plan, tmp_path: Path) -> None:
    process = start_up(plan, tmp_path)
    read_until(process, "Ctrl-C stops everything")
    pids = pids_of(tmp_path)
    process.kill()
    process.wait(PATIENCE_S)
    assert wait_until_dead(pids) == []


def directory_of(tmp_path: Path, *names: str) -> str:
    for name in names:
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text("{}")
    return str(tmp_path / "adapters")


def test_up_registers_the_adapters_of_a_directory(plan: Plan, tmp_path: Path) -> None:
    """One that is refused, and one that has changed since an earlier start, keep nobody from being served."""
    process = start_up(plan, tmp_path, "--adapters", directory_of(tmp_path, "bad", "changed", "good"))
    seen = read_until(process, "Ctrl-C stops everything")
    assert "adapter bad was not accepted: The adapter 'bad' is broken." in seen
    assert "adapter changed has changed since it was registered, and was registered anew" in seen
    assert "and 2 adapters given here" in seen
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("allow", [True, False])
def test_up_lets_hub_ids_be_downloaded_when_told(allow: bool, plan: Plan, tmp_path: Path) -> None:
    process = start_up(plan, tmp_path, *(["--allow-download"] if allow else []))
    read_until(process, "Ctrl-C stops everything")
    assert ("--allow-download" in (plan.state / "logs/coordinator.log").read_text()) is allow
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("flags", "options", "says"),
    [
        ("avx2", (), True),
        ("avx2 avx512f", (), False),
        ("avx2", ("--", "--dtype", "float32"), False),
        ("avx2", ("--", "--dtype=bfloat16"), False),
    ],
)
def test_up_says_where_another_dtype_is_faster(
    flags: str, options: tuple[str, ...], says: bool, plan: Plan, tmp_path: Path
) -> None:
    process = start_up(plan, tmp_path, *options, flags=flags)
    seen = read_until(process, "Ctrl-C stops everything")
    assert ("-- --dtype float32" in seen) is says
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0


def test_up_gives_operating_points_to_the_coordinator(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "points.json"
    process = start_up(plan, tmp_path, "--operating-points", str(file))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert f"no file {file}" in output
    save(OperatingPoints(points={8: 100.0}), file)
    process = start_up(plan, tmp_path, "--operating-points", str(file))
    read_until(process, "Ctrl-C stops everything")
    assert f"'--operating-points', '{file}'" in (plan.state / "logs/coordinator.log").read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0


def test_up_ends_when_no_adapter_of_a_directory_is_accepted(plan: Plan, tmp_path: Path) -> None:
    process = start_up(plan, tmp_path, "--adapters", directory_of(tmp_path, "bad"))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "adapter bad was not accepted: The adapter 'bad' is broken." in output
    assert "none of the adapters in" in output
    assert wait_until_dead(pids_of(tmp_path), 0.0) == []


def test_up_reports_a_part_that_ends_and_goes_on_until_nobody_is_left(plan: Plan, tmp_path: Path) -> None:
    process = start_up(plan, tmp_path, "--instances", "2")
    read_until(process, "Ctrl-C stops everything")
    pids = pids_of(tmp_path)
    by_role = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in pids[::2]}
    instances = [pid for pid, line in by_role.items() if "\0instance\0" in line]
    os.kill(instances[0], signal.SIGKILL)
    read_until(process, "ended with status 137")
    os.kill(instances[1], signal.SIGKILL)
    assert process.wait(PATIENCE_S) == 1
    assert wait_until_dead(pids, 0.0) == []


def test_up_names_a_directory_without_adapters(plan: Plan, tmp_path: Path) -> None:
    process = start_up(plan, tmp_path, "--adapters", str(tmp_path / "nothing"))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "no such directory" in output


def test_a_log_keeps_only_its_tail(tmp_path: Path) -> None:
    server = Server("x", ["true"], tmp_path / "x.log")
    assert server.tail() == ""
    (tmp_path / "x.log").write_text("".join(f"line {i}\n" for i in range(100)))
    assert server.tail(2) == "line 98\nline 99"
