"""What holds for every room: every run draws the same examples and numbers, and no example is too slow.

A run thus fails for what has changed and not for what was drawn or for how busy the machine is. To look for new
examples: `pytest --hypothesis-profile=explore`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from vllm_loraserve.memory.extension import Extension

settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", parent=settings.get_profile("default"), deadline=None, max_examples=1000)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Random tensors are the same whichever tests ran before."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def library() -> Extension:
    """The pool extension; where it is missing the test is skipped, or fails if LORASERVE_REQUIRE_EXTENSION is set."""
    from vllm_loraserve.memory import extension

    found = extension.load()
    if found is None:
        if os.environ.get("LORASERVE_REQUIRE_EXTENSION"):
            pytest.fail(extension.missing_reason())
        pytest.skip(extension.missing_reason())
    return found
