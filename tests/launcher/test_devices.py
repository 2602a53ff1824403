"""Sharing a machine out."""

from __future__ import annotations

import pytest

from vllm_loraserve.launcher.devices import MAX_KV_BYTES, MIN_KV_BYTES, Machine, share, this_machine, value_of


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max-loras", "4"], "4"),
        (["--max-loras=4"], "4"),
        (["--max_loras=4"], "4"),
        (["--max-loras-more", "4"], None),
        (["--max-loras"], ""),
        ([], None),
    ],
)
def test_value_of(options: list[str], expected: str | None) -> None:
    assert value_of("--max-loras", options) == expected


@pytest.mark.parametrize(("cores", "instances", "threads"), [(2, 2, "1"), (8, 2, "4"), (1, 3, "1"), (7, 2, "3")])
def test_cores_are_divided(cores: int, instances: int, threads: str) -> None:
    shares = share(Machine(cores=cores), instances)
    assert [s.env["OMP_NUM_THREADS"] for s in shares] == [threads] * instances
    assert all(s.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind" for s in shares)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(1 << 30, MIN_KV_BYTES), (20 << 30, 1 << 30), (1 << 40, MAX_KV_BYTES)],
)
def test_the_kv_cache_leaves_room(memory: int, expected: int) -> None:
    options = share(Machine(memory_bytes=memory), 2)[0].options
    assert value_of("--kv-cache-memory-bytes", options) == str(expected)


def test_what_the_user_gives_is_not_overridden() -> None:
    given = ["--kv-cache-memory-bytes=1", "--max-loras", "2"]
    assert share(Machine(), 1, given)[0].options == ()


def test_each_instance_gets_its_own_gpu() -> None:
    shares = share(Machine(gpus=4), 4)
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in shares] == ["0", "1", "2", "3"]
    assert all(value_of("--gpu-memory-utilization", s.options) is None for s in shares)


def test_tensor_parallel_instances_get_blocks_of_gpus() -> None:
    shares = share(Machine(gpus=4), 2, ["--tensor-parallel-size", "2"])
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in shares] == ["0,1", "2,3"]


def test_instances_that_share_a_gpu_share_its_memory() -> None:
    shares = share(Machine(gpus=1), 2)
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in shares] == ["0", "0"]
    assert value_of("--gpu-memory-utilization", shares[0].options) == "0.45"


def test_this_machine_is_looked_at() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes > 64 << 20
