"""What the tests of this room share: the key, pages, and a holder process that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vllm_loraserve.transfer.pages import Wanted

PATIENCE_S = 120.0
"""For what is certain to come, on any machine: only a defect uses it up."""
KEY = b"the cluster key of the tests"
LAYOUT = "SmolLM2-135M/bfloat16/tp0of1/rows8"


def make_pages(seed: int, count: int = 12, size: int = 70_001) -> list[np.ndarray]:
    """Random pages of two sizes, as two module groups have."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size if i % 3 else size // 2, np.uint8) for i in range(count)]


def until(condition: Callable[[], object]) -> None:
    """Waits until it holds; fails when it never does."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def wanted(name: str = "a", layout: str = LAYOUT, digest: str = "") -> Wanted:
    return Wanted(name=name, layout=layout, digest=digest)


class Holder:
    """Another process that serves adapter "a" of `mib` MiB; it can be killed."""

    def __init__(self, mib: int = 8, name: str = "holder", *arguments: str) -> None:
        script = Path(__file__).with_name("holder.py")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(mib), name, *arguments],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._endpoint = ""

    @property
    def endpoint(self) -> str:
        """Where it serves; waits until it does."""
        if not self._endpoint:
            self._endpoint = self.answer()
        return self._endpoint

    def answer(self) -> str:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the holder process ended")
        return line

    def tell(self, command: str) -> str:
        """Sends "revoke", "replace" or "state"; the process's answer."""
        _ = self.endpoint
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
