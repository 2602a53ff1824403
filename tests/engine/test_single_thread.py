"""engine/single_thread.py: the limit holds inside the block, on this thread only, and goes with it."""

from __future__ import annotations

import threading

import pytest
import torch

from vllm_loraserve.engine.single_thread import _openmp, single_thread


def test_only_this_thread_and_only_inside() -> None:
    if _openmp() is None:
        pytest.skip("torch's OpenMP run time is not visible in this process")
    before = torch.get_num_threads()
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    with single_thread():
        assert torch.get_num_threads() == 1
        other.start()
        other.join()
    assert torch.get_num_threads() == before
    unlimited: list[int] = []
    plain = threading.Thread(target=lambda: unlimited.append(torch.get_num_threads()))
    plain.start()
    plain.join()
    assert seen == unlimited
    with pytest.raises(RuntimeError), single_thread():
        raise RuntimeError
    assert torch.get_num_threads() == before
