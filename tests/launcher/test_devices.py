"""Sharing a machine out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_loraserve import cgroup
from vllm_loraserve.launcher.devices import (
    MAX_KV_BYTES,
    MIN_KV_BYTES,
    Machine,
    lacks_bfloat16,
    share,
    this_machine,
    value_of,
    visible_gpus,
)
from vllm_loraserve.launcher.errors import StartError


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


@pytest.mark.parametrize(
    ("cpu_info", "lacks"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx avx2 fma\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512bw\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),  # ARM
        (None, False),
    ],
)
def test_x86_without_avx512_lacks_bfloat16(tmp_path: Path, cpu_info: str | None, lacks: bool) -> None:
    path = tmp_path / "cpuinfo"
    if cpu_info is not None:
        path.write_text(cpu_info)
    assert lacks_bfloat16(path) is lacks


def test_what_the_user_gives_is_not_overridden() -> None:
    given = ["--kv-cache-memory-bytes=1"]
    assert share(Machine(), 1, given)[0].options == ()


def test_each_instance_gets_its_own_gpu() -> None:
    shares = share(Machine(gpu_ids=tuple("0123")), 4)
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in shares] == ["0", "1", "2", "3"]
    assert all(value_of("--gpu-memory-utilization", s.options) is None for s in shares)


def test_tensor_parallel_instances_get_blocks_of_gpus() -> None:
    shares = share(Machine(gpu_ids=tuple("0123")), 2, ["--tensor-parallel-size", "2"])
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in shares] == ["0,1", "2,3"]


def test_instances_that_share_a_gpu_share_its_memory() -> None:
    shares = share(Machine(gpu_ids=("0",)), 2)
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in shares] == ["0", "0"]
    assert value_of("--gpu-memory-utilization", shares[0].options) == "0.45"


def test_instances_get_the_gpus_that_the_user_left_visible() -> None:
    shares = share(Machine(gpu_ids=("2", "GPU-8a1f")), 2)
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in shares] == ["2", "GPU-8a1f"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ("0", "1", "2", "3")),
        ("2,3", ("2", "3")),
        (" 3 , 1", ("3", "1")),
        ("GPU-8a1f,MIG-22", ("GPU-8a1f", "MIG-22")),
        ("1,-1,2", ("1",)),
        ("1,7,2", ("1",)),
        ("", ()),
    ],
)
def test_visible_gpus(visible: str | None, expected: tuple[str, ...]) -> None:
    assert visible_gpus(4, visible) == expected
    assert visible_gpus(0, visible) == ()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--tensor-parallel-size", "4"], "each instance is to run on 4 GPUs, and there are 2"),
        (["-tp", "2", "--pipeline-parallel-size=2"], "each instance is to run on 4 GPUs, and there are 2"),
        (["--tensor-parallel-size=two"], "--tensor-parallel-size 'two' is no whole number above 0"),
        (["-tp", "0"], "--tensor-parallel-size '0' is no whole number above 0"),
    ],
)
def test_what_no_instance_can_have_is_one_message(given: list[str], says: str) -> None:
    with pytest.raises(StartError, match=re.escape(says)):
        share(Machine(gpu_ids=("0", "1")), 1, given)


def group(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text + "\n")


def test_a_containers_limits_are_the_narrowest_of_its_cgroups(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("1:name=systemd:/x\n0::/pod/app\n")
    assert cgroup.limits(root, membership) == (None, None)
    group(root / "pod", cpu_max="350000 100000", memory_max=str(8 << 30), memory_current=str(1 << 30))
    group(root / "pod/app", cpu_max="max 100000", memory_max="max", memory_current="5")
    assert cgroup.limits(root, membership) == (3, 7 << 30)
    group(
        root / "pod/app",
        cpu_max="50000 100000",
        memory_max=str(2 << 30),
        memory_current=str(1 << 30),
        memory_stat=f"anon 7\ninactive_file {1 << 29}",
    )
    assert cgroup.limits(root, membership) == (1, 3 << 29)
    membership.write_text("0::/\n")  # a cgroup namespace: the container's own group is the root
    group(root, cpu_max="200000 100000", memory_max="100", memory_current="300")
    assert cgroup.limits(root, membership) == (2, 0)


def test_a_containers_limits_bound_what_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "limits", lambda: cgroup.Limits(1, 123 << 20))
    machine = this_machine()
    assert (machine.cores, machine.memory_bytes) == (1, 123 << 20)


def test_this_machine_is_looked_at() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes > 64 << 20
