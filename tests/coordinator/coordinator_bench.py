"""Real checkpoints of a toy model, instances that are only messages, and a Controller under a clock of its own."""

import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from vllm_loraserve.cluster.placement import make_policy
from vllm_loraserve.coordinator.client import CoordinatorClient
from vllm_loraserve.coordinator.control import Controller, ControlOptions
from vllm_loraserve.coordinator.messages import (
    AdapterDemand,
    AdapterRecord,
    Capacity,
    Command,
    CommandResult,
    Heartbeat,
    HeartbeatReply,
    Load,
    Register,
    Registered,
    Residency,
)
from vllm_loraserve.coordinator.registry import Registry
from vllm_loraserve.launcher.processes import free_ports

HIDDEN = 16
SHAPES = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN, HIDDEN)}


PATIENCE_S = 120.0
"""For what is certain to come, on any machine: only a defect uses it up."""


def free_endpoint() -> str:
    """A TCP endpoint whose next port is free as well, seldom the one of a test before."""
    return f"tcp://127.0.0.1:{free_ports(2, random.randrange(10000, 30000), consecutive=True)[0]}"


def write_adapter(directory: Path, *, rank: int = 8, seed: int = 0, hidden: int = HIDDEN) -> Path:
    """A PEFT checkpoint of two modules with random weights."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module in ("q_proj", "v_proj"):
        prefix = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((rank, hidden)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((hidden, rank)).astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {rank}, "target_modules": ["q_proj", "v_proj"], '
        '"base_model_name_or_path": "toy", "bias": "none", "task_type": "CAUSAL_LM"}'
    )
    return directory


def record(name: str, *, rank: int = 8, sha256: str = "", source: str = "/a") -> AdapterRecord:
    return AdapterRecord(
        name=name, source=source, rank=rank, target_modules=("q_proj",), size_bytes=1000 * rank,
        sha256=sha256 or f"sha-{name}", base_model="toy", added_at=1.0,
    )  # fmt: skip


class FakeInstance:
    """What an instance says, without an engine: carries out commands when asked to."""

    def __init__(
        self,
        name: str,
        *,
        incarnation: str = "1",
        rank_rows: int = 1024,
        slots: int = 16,
        port: int = 0,
        max_rank: int = 256,
        host_bytes: int = 0,
        host_adapters: int = 0,
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.capacity = Capacity(
            slots=slots, rank_rows=rank_rows, max_rank=max_rank, host_bytes=host_bytes, host_adapters=host_adapters
        )
        self.url = f"http://127.0.0.1:{port or 8000 + sum(name.encode())}"
        self.resident: dict[str, Residency] = {}
        self.running: dict[str, int] = {}
        self.rates: dict[str, float] = {}
        self.arrivals: dict[str, float] = {}
        self.results: list[CommandResult] = []
        self.done: list[tuple[str, str]] = []
        self.broken: set[str] = set()
        self.waiting = 0
        self.draining = False
        self.transfer = ""
        self.told: list[Command] = []
        self.beat_s = 0.5

    def hello(self, base_model: str = "toy") -> Register:
        return Register(
            instance=self.name, incarnation=self.incarnation, url=self.url, base_model=base_model,
            capacity=self.capacity, modules={name: (sizes,) for name, sizes in SHAPES.items()},
            resident=tuple(self.resident.values()), transfer=self.transfer, draining=self.draining,
        )  # fmt: skip

    def beat(self) -> Heartbeat:
        names = self.running.keys() | self.rates.keys()
        results, self.results = tuple(self.results), []
        return Heartbeat(
            instance=self.name, incarnation=self.incarnation,
            load=Load(running=sum(self.running.values()), waiting=self.waiting),
            demand=tuple(
                AdapterDemand(name=n, tokens_per_s=self.rates.get(n, 0.0),
                    requests_per_s=self.arrivals.get(n, 0.0), running=self.running.get(n, 0),
                    tokens=round(self.rates.get(n, 0.0) * self.beat_s))
                for n in names
            ),
            resident=tuple(self.resident.values()), results=results, draining=self.draining,
        )  # fmt: skip

    def obey(self, commands) -> None:
        for c in commands:
            self.told.append(c)
            self.done.append((c.action, c.adapter.name))
            if c.adapter.name in self.broken and c.action == "prefetch":
                self.results.append(CommandResult(id=c.id, ok=False, error="no such file"))
                continue
            if c.action == "prefetch":
                self.resident[c.adapter.name] = Residency(name=c.adapter.name, sha256=c.adapter.sha256, generation=1)
            else:
                self.resident.pop(c.adapter.name, None)
            self.results.append(CommandResult(id=c.id, ok=True))


class Bench:
    """A Controller under a clock of its own."""

    def __init__(self, path: Path, policy: str = "rank-weighted", **options) -> None:
        self.path = path
        self.now = 1000.0
        self.policy = policy
        self.options = ControlOptions(**options)
        self.instances: dict[str, FakeInstance] = {}
        self.start()

    def start(self) -> None:
        self.registry = Registry(self.path)
        self.controller = Controller(self.registry, make_policy(self.policy), self.options, self.now)

    def restart(self) -> None:
        self.registry.close()
        self.start()

    def join(self, name: str, **kw) -> FakeInstance:
        transfer = kw.pop("transfer", "")
        instance = self.instances[name] = FakeInstance(name, **kw)
        instance.transfer = transfer
        self.controller.register(instance.hello(), self.now)
        return instance

    def beat(self, *names: str) -> None:
        for name in names or self.instances:
            instance = self.instances[name]
            instance.obey(self.controller.heartbeat(instance.beat(), self.now).commands)

    def run(self, seconds: float, *names: str) -> None:
        """Lets time pass, with a heartbeat of the named (default all) instances every half second."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.beat(*names)
            self.controller.tick(self.now)

    def routes(self) -> dict[str, dict[str, float]]:
        return {
            a.adapter.name: {r.instance: round(r.phi, 6) for r in a.routes}
            for a in self.controller.table(self.now).adapters
        }


def add(bench: Bench, *names: str, rank: int = 8) -> None:
    """Registers adapters of these names, of one rank."""
    for name in names:
        bench.controller.add(record(name, rank=rank), bench.now)


async def join(client: CoordinatorClient, name: str = "one") -> FakeInstance:
    """An instance that has registered over a real socket."""
    instance = FakeInstance(name)
    reply = await client.ask(instance.hello(), Registered)
    assert reply.expiry_s > 0
    return instance


async def beat(client: CoordinatorClient, instance: FakeInstance) -> None:
    """A heartbeat, and what it asks for is done."""
    instance.obey((await client.ask(instance.beat(), HeartbeatReply)).commands)
