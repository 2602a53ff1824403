"""A whole cluster on one machine: one coordinator, one router and N vLLM instances, all children of this process.

`Cluster` is what `up`, `demo` and the end-to-end tests share. It starts the parts in the order in which they need each
other, tells `on_change` what is going on, and knows how each part is asked whether it is ready.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from vllm_loraserve.config import ARENA_RANK_ROWS, ARENA_SHARE
from vllm_loraserve.coordinator.client import ANSWER_S, INSPECTION_S, REPLACE_S
from vllm_loraserve.launcher.devices import Machine, share, this_machine, value_of, values_of
from vllm_loraserve.launcher.errors import AdapterRefused, StartError
from vllm_loraserve.launcher.processes import Server, free_ports, healthy, listen_error, stop_all

COORDINATOR_PORT = 5700
POLL_S = 0.2
JOIN_S = 60.0
"""Longest time between the health of all instances and their presence in the routing table."""
CLIENT_KEYS, ADMIN_KEYS = "LORASERVE_API_KEY", "LORASERVE_ADMIN_API_KEY"
"""Environment variables of the router: what clients must send, and what loading and unloading needs instead."""
UPSTREAM_KEY = "LORASERVE_UPSTREAM_API_KEY"
"""Environment variable of the router: what it sends to instances."""
INSTANCE_KEY = "VLLM_API_KEY"
"""Environment variable of vLLM: what an instance asks for, unless `--api-key` says."""

LISTEN_OPTIONS = ("--host", "--port", "--uds")
"""Of `vllm serve`: the launcher says where its instances listen."""
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""What we ask is on this machine, whatever http_proxy says of others."""


def api_key(environment: Mapping[str, str] | None = None, *, admin: bool = False) -> str | None:
    """A key that the router of a cluster started in `environment` (default: this process's) asks for; None: none."""
    environment = os.environ if environment is None else environment
    for variable in (*((ADMIN_KEYS,) if admin else ()), CLIENT_KEYS, INSTANCE_KEY):
        keys = [key.strip() for key in environment.get(variable, "").split(",")]
        if found := next(filter(None, keys), None):
            return found
    return None


@dataclass(frozen=True)
class Programs:
    """The command lines of the parts, without options; tests put others in their place."""

    coordinator: tuple[str, ...] = (sys.executable, "-m", "vllm_loraserve.cli", "coordinator")
    router: tuple[str, ...] = (sys.executable, "-m", "vllm_loraserve.cli", "router")
    instance: tuple[str, ...] = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")


@dataclass(frozen=True)
class Plan:
    """What to start."""

    model: str
    """Directory or hub id."""
    state: Path
    """Directory of the adapter registry and the logs; made when missing."""
    instances: int = 2
    host: str = "127.0.0.1"
    """Where the router listens; everything else stays on the loopback address."""
    port: int = 8000
    """The router's port; the instances take the next free ones."""
    max_rank: int | None = None
    """Largest adapter rank accepted; None: the option's default."""
    adapter_roots: tuple[str, ...] = ()
    vllm_options: tuple[str, ...] = ()
    """Options for every `vllm serve`, as the user gave them."""
    coordinator_options: tuple[str, ...] = ()
    router_options: tuple[str, ...] = ()
    start_timeout_s: float = 900.0
    """Longest time for one instance to load and answer."""
    machine: Machine = field(default_factory=this_machine)
    programs: Programs = Programs()

    @property
    def model_name(self) -> str:
        """The name that clients give as `model`: the user's choice, a hub id, or a directory's last part."""
        chosen = value_of("--served-model-name", self.vllm_options)
        return chosen or (Path(self.model).resolve().name if os.path.isdir(self.model) else self.model)


Event = Callable[[str, str], None]
"""Called with (part, state): part is a server's name, state `starting`, `ready`, `ended (status N)` or free text."""


class Cluster:
    """Started by `start`, stopped by `stop`; `running()` does both around a with block."""

    def __init__(self, plan: Plan, on_change: Event | None = None) -> None:
        self.plan = plan
        self._on_change = on_change or (lambda part, state: None)
        self.logs = plan.state / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        for option in LISTEN_OPTIONS:
            if value_of(option, plan.vllm_options) is not None:
                raise StartError(
                    f"{option} is not for `vllm serve` here, instances get free ports; see up --host, --port"
                )
        if error := listen_error(plan.host, plan.port):
            taken = error.errno == errno.EADDRINUSE
            raise StartError(
                f"port {plan.port} is taken; choose another with --port"
                if taken
                else f"can't listen on {plan.host}:{plan.port}: {error.strerror}; choose another --host or --port"
            )
        coordinator_port = free_ports(2, COORDINATOR_PORT, consecutive=True, besides=(plan.port,))[0]
        self.coordinator_endpoint = f"tcp://127.0.0.1:{coordinator_port}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(plan.host, plan.host)
        self.url = f"http://[{host}]:{plan.port}" if ":" in host else f"http://{host}:{plan.port}"
        self.instance_ports = free_ports(
            plan.instances, plan.port + 1, besides=(coordinator_port, coordinator_port + 1)
        )
        self.coordinator = self._server("coordinator", self._coordinator_command())
        self.router = self._server("router", self._router_command(), self._router_env())
        shares = share(plan.machine, plan.instances, plan.vllm_options)
        self.instances = [
            self._server(f"instance-{i}", self._instance_command(i, shares[i].options), shares[i].env)
            for i in range(plan.instances)
        ]

    @property
    def servers(self) -> list[Server]:
        """All parts, in the order in which they are started."""
        return [self.coordinator, self.router, *self.instances]

    def instance_url(self, index: int) -> str:
        """Base URL of one instance itself, past the router."""
        return f"http://127.0.0.1:{self.instance_ports[index]}"

    def start(self) -> None:
        """Starts everything and returns when every instance can be reached through the router.

        Raises StartError when a part ends or takes too long; what was started is stopped then.
        """
        try:
            for server in self.servers:
                self._on_change(server.name, "starting")
                server.start()
            waiting = list(enumerate(self.instances))
            while waiting:
                self._check_alive()
                for index, server in list(waiting):
                    if healthy(self.instance_url(index)):
                        waiting.remove((index, server))
                        self._on_change(server.name, "ready")
                    elif time.monotonic() - server.started_at > self.plan.start_timeout_s:
                        self._fail(server, f"did not answer within {self.plan.start_timeout_s:g} s")
                time.sleep(POLL_S)
            self.wait_for_instances(self.plan.instances)
            self._on_change("router", "ready")
            self._on_change("coordinator", "ready")
        except BaseException:
            self.stop()
            raise

    def wait_for_instances(self, count: int, timeout_s: float = JOIN_S) -> None:
        """Returns when the router knows exactly `count` instances it can send to; raises StartError after a while."""
        deadline = time.monotonic() + timeout_s
        seen = "nothing"
        while time.monotonic() < deadline:
            self._check_alive(self.coordinator, self.router)
            try:
                health = json.loads(self.get("/health"))
                seen = f"{health['available']} instances"
                if health["available"] == health["instances"] == count:
                    return
            except (OSError, ValueError, KeyError):
                pass
            time.sleep(POLL_S)
        raise StartError(
            f"the router sees {seen} after {timeout_s:g} s, not {count}; the logs are in {self.logs}\n"
            + self.coordinator.tail(10)
        )

    def stop(self) -> None:
        """Stops everything; returns when no process is left."""
        try:
            stop_all([self.router, *self.instances])
        finally:
            stop_all([self.coordinator])  # to whom the instances say that they go

    @contextmanager
    def running(self) -> Iterator[Cluster]:
        """Starts, yields, and stops whatever happens."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def get(self, path: str, timeout_s: float = 5.0) -> bytes:
        """Body of a GET from the router, whatever its status; raises OSError when there is no answer."""
        request = urllib.request.Request(self.url + path, headers=self._authorization())
        try:
            with _direct.open(request, timeout=timeout_s) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            return error.read()

    def post(
        self, path: str, body: object, timeout_s: float = INSPECTION_S + REPLACE_S + 3 * ANSWER_S
    ) -> tuple[int, str]:
        """(status, body) of a JSON POST to the router; raises OSError when there is no answer.

        By default it waits longer than the router waits for the coordinator.
        """
        headers = {"Content-Type": "application/json"} | self._authorization(admin=path.endswith("_lora_adapter"))
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with _direct.open(request, timeout=timeout_s) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def add_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Registers an adapter cluster-wide through the router; raises AdapterRefused with the server's sentence."""
        self._change("accepted", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    def remove_adapter(self, name: str) -> None:
        """Unregisters an adapter cluster-wide, after its running requests; raises AdapterRefused."""
        self._change("removed", "/v1/unload_lora_adapter", {"lora_name": name})

    def _change(self, what: str, path: str, body: dict[str, str]) -> None:
        status, answer = self.post(path, body)
        if status != 200:
            with suppress(ValueError, KeyError, TypeError):
                answer = json.loads(answer)["error"]["message"]
            raise AdapterRefused(f"adapter {body['lora_name']} was not {what}: {answer}", status)

    def _authorization(self, *, admin: bool = False) -> dict[str, str]:
        key = api_key(self.router.env, admin=admin)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _server(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> Server:
        return Server(name, list(command), self.logs / f"{name}.log", env)

    def _coordinator_command(self) -> list[str]:
        plan = self.plan
        command = [*plan.programs.coordinator, "--bind", self.coordinator_endpoint]
        command += ["--database", str(plan.state / "registry.sqlite")]
        for root in plan.adapter_roots:
            command += ["--adapter-root", root]
        if plan.max_rank is not None:
            command += ["--max-rank", str(plan.max_rank)]
        return [*command, *plan.coordinator_options]

    def _router_command(self) -> list[str]:
        plan = self.plan
        command = [*plan.programs.router, "--coordinator", self.coordinator_endpoint]
        return [*command, "--host", plan.host, "--port", str(plan.port), *plan.router_options]

    def _router_env(self) -> dict[str, str]:
        """Where the user has given the instances keys: one for the router to send, where it has none, and all to be
        asked of clients, where it asks for none. It must not open to everybody what the instances keep closed."""
        keys = values_of("--api-key", self.plan.vllm_options) or [os.environ.get(INSTANCE_KEY, "")]
        own = {UPSTREAM_KEY: keys[0], CLIENT_KEYS: ",".join(keys)}
        return {name: value for name, value in own.items() if value and not os.environ.get(name)}

    def _instance_command(self, index: int, options: Sequence[str]) -> list[str]:
        plan = self.plan
        config: dict[str, object] = {"coordinator": self.coordinator_endpoint, "instance": f"instance-{index}"}
        if not any("transfer_key_file" in option for option in plan.vllm_options):
            config["transfer_key_file"] = str(self._transfer_key())
        if plan.max_rank is not None:
            config["max_rank"] = plan.max_rank
        if plan.adapter_roots:
            config["adapter_roots"] = list(plan.adapter_roots)
        if not any("arena_" in option for option in plan.vllm_options):
            config["arena_rank_rows"] = max(ARENA_RANK_ROWS, plan.max_rank or 0)
            if plan.max_rank is None:
                config["arena_share"] = ARENA_SHARE
        command = [*plan.programs.instance, plan.model, "--enable-loraserve"]
        command += ["--loraserve-config", json.dumps(config)]
        command += ["--host", "127.0.0.1", "--port", str(self.instance_ports[index])]
        if value_of("--served-model-name", plan.vllm_options) is None:
            command += ["--served-model-name", plan.model_name]
        return [*command, *options, *plan.vllm_options]

    def _transfer_key(self) -> Path:
        """The secret by which the instances let each other read adapters; made once per state directory."""
        path = self.plan.state / "transfer.key"
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
        return path

    def _check_alive(self, *servers: Server) -> None:
        for server in servers or self.servers:
            if server.status is not None:
                self._fail(server, f"ended with status {server.status}")

    def _fail(self, server: Server, what: str) -> None:
        raise StartError(f"{server.name} {what}; the end of {server.log}:\n{server.tail()}")
