"""adapters/convert.py: an adapter is converted one module at a time, so that it is in memory once, as its pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from adapter_files import write_adapter

LAYERS, FEATURES, RANK = 24, 4096, 128
TENSOR_BYTES = FEATURES * RANK * 4
"""One A or B in fp32, in which B is scaled."""


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_memory_taken_is_that_of_the_pages(tmp_path: Path, dtype: type) -> None:
    folder = write_adapter(
        tmp_path, rank=RANK, alpha=16, modules=("q_proj",), layers=LAYERS,
        shapes={"q_proj": (FEATURES, FEATURES)}, dtype=dtype,
    )  # fmt: skip
    program = Path(__file__).with_name("convert_in_steps.py")
    done = subprocess.run(
        [sys.executable, str(program), str(folder), str(LAYERS), str(FEATURES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["pages"] == LAYERS * 2 * FEATURES * RANK * 2
    assert told["pages"] <= told["grown"] <= 1.3 * told["pages"] + TENSOR_BYTES, told
