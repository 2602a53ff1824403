"""Fixtures of the coordinator's tests."""

import time

import pytest
from coordinator_bench import PATIENCE_S, Bench, free_endpoint

from vllm_loraserve.cluster.placement import make_policy
from vllm_loraserve.coordinator.client import CoordinatorClient
from vllm_loraserve.coordinator.control import Controller, ControlOptions
from vllm_loraserve.coordinator.registry import Registry
from vllm_loraserve.coordinator.server import CoordinatorServer, ServerOptions


@pytest.fixture
def bench(tmp_path):
    """A factory of Benches on one database."""
    made = []

    def make(**options) -> Bench:
        made.append(Bench(tmp_path / "registry.sqlite", **options))
        return made[-1]

    yield make
    for b in made:
        b.registry.close()


@pytest.fixture
async def running(tmp_path):
    """(server, client) over real sockets; adapters may be read from tmp_path/adapters."""
    registry = Registry(tmp_path / "registry.sqlite")
    # Nobody's membership ends because the machine is busy.
    patient = ControlOptions(expiry_s=PATIENCE_S)
    controller = Controller(registry, make_policy("rank-weighted"), patient, time.monotonic())
    options = ServerOptions(bind=free_endpoint(), adapter_roots=(str(tmp_path / "adapters"),))
    server = CoordinatorServer(controller, options)
    await server.start()
    async with CoordinatorClient(options.bind, timeout_s=PATIENCE_S) as client:
        yield server, client
    await server.stop()
    registry.close()
