"""These checks need the interpreter from the first import of Triton on: `test_triton_interpreted.py` sees to
it."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def interpreter():
    assert os.environ.get("TRITON_INTERPRET") == "1", "run these checks through test_triton_interpreted.py"
