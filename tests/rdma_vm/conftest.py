"""RDMA tests: inside the virtual machine no device is a failure, elsewhere these tests are skipped."""

from __future__ import annotations

import os

import pytest

from vllm_loraserve.transfer.rungs.verbs_device import open_device


@pytest.fixture(scope="session")
def device():
    """The RDMA device of this machine, open."""
    found, reason = open_device()
    if found is None:
        if os.environ.get("REQUIRE_RDMA"):
            pytest.fail(f"no RDMA device: {reason}")
        pytest.skip(f"no RDMA device: {reason}")
    yield found
    found.close()
