"""Fixtures of the memory tests."""

import os

import pytest

from vllm_loraserve.memory import extension


@pytest.fixture(scope="session")
def library() -> extension.Extension:
    found = extension.load()
    if found is None:
        if os.environ.get("LORASERVE_REQUIRE_EXTENSION"):
            pytest.fail(extension.missing_reason())
        pytest.skip(extension.missing_reason())
    return found
