"""A plan for a cluster of stubs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from stubs import PATIENCE_S, stub_programs

from vllm_loraserve.launcher.cluster import Plan
from vllm_loraserve.launcher.devices import Machine
from vllm_loraserve.launcher.processes import free_ports


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    model = tmp_path / "model"
    model.mkdir()
    return Plan(
        model=str(model),
        state=tmp_path / "state",
        port=free_ports(1, random.randrange(10000, 30000))[0],
        programs=stub_programs(),
        machine=Machine(cores=2),
        start_timeout_s=PATIENCE_S,
    )
