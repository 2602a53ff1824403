"""The extension's device half against a stand-in driver (`fake_cuda.cpp`): arguments, contexts, ranges, errors, leaks.

The library finds the driver when it is loaded, so each case is a process of its own. What a device would do is not
proved here; the tests marked gpu are the same ones that a real device runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_loraserve.memory import extension

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "pool"


@pytest.fixture(scope="module")
def driver(library, tmp_path_factory) -> dict[str, str]:
    """The environment of a process that finds the stand-in."""
    if library.probe().cuda.loaded:
        pytest.skip("there is a real driver")
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("driver")
    source, target = HERE / "fake_cuda.cpp", folder / "libcuda.so.1"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{SOURCES}", f"-I{HERE}"]
    subprocess.run([compiler, *flags, source, "-o", target], check=True, timeout=6000)
    path = os.pathsep.join(p for p in (str(folder), os.environ.get("LD_LIBRARY_PATH", "")) if p)
    return {**os.environ, "LD_LIBRARY_PATH": path, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def python(driver: dict[str, str], script: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**driver, **environment},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def kernels_built() -> bool:
    library = extension.load()
    return library is not None and library.probe().cuda_kernels


def test_the_gpu_tests_pass_on_it(driver):
    if not kernels_built():
        pytest.skip("built without nvcc")
    files = [str(HERE / "test_extension_kernels.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        timeout=6000,
        check=False,
        env=driver,
        cwd=HERE.parents[1],
    )
    assert run.returncode == 0, run.stdout
    assert "4 passed" in run.stdout


DEVICE = """
import os
from vllm_loraserve.memory import extension
from vllm_loraserve.memory.extension import ExtensionError
from vllm_loraserve.memory.slab import DeviceSlab, HostSlab
library = extension.load()
def refused(work, words):
    try:
        work()
    except ExtensionError as error:
        assert words in str(error), error
        return
    raise AssertionError(f"not refused: {words}")
"""


def test_probe_describes_the_device(driver):
    out = python(driver, DEVICE + "print(library.probe().cuda)")
    assert "name='stand-in'" in out
    assert "capability='9.0'" in out
    assert "driver=13000" in out


def test_errors_name_the_call_and_memory_comes_back(driver):
    python(
        driver,
        DEVICE
        + """
refused(lambda: DeviceSlab(1 << 20, 1), "no CUDA device 1; there are 1")
refused(lambda: DeviceSlab(80 << 20), "cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY")
refused(lambda: DeviceSlab(80 << 20, vmm=True), "cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY")
for vmm in (False, True):
    for _ in range(50):
        slab = DeviceSlab(33 << 20, vmm=vmm)
        assert slab.size == 34 << 20
        refused(lambda: DeviceSlab(40 << 20, vmm=vmm), "OUT_OF_MEMORY")
        slab.close()
        slab.close()
assert DeviceSlab(1).__cuda_array_interface__["shape"] == (2 << 20,)
with HostSlab(1 << 20) as host:
    assert host.granted & extension.PINNED
""",
        LORASERVE_FAKE_BYTES=str(64 << 20),
    )


def test_a_dma_buf_covers_the_allocation_or_the_callers_pages(driver):
    python(
        driver,
        DEVICE
        + """
plain = DeviceSlab(8 << 20)
for at, length in ((0, 1), (5000, 100), (3 << 20, 5 << 20)):
    found = library.export_dmabuf(0, plain.address + at, length)
    os.close(found.fd)
    assert (found.base, found.length, found.offset) == (plain.address, 8 << 20, at)
vmm = DeviceSlab(8 << 20, vmm=True)
inside = library.export_dmabuf(0, vmm.address + (2 << 20) + 4096, 8192)
os.close(inside.fd)
assert (inside.base, inside.length, inside.offset) == (vmm.address + (2 << 20), 2 << 20, 4096)
across = library.export_dmabuf(0, vmm.address + (1 << 20) + 100, 3 << 20)  # over two pieces
os.close(across.fd)
assert across.base == vmm.address + (1 << 20)
assert across.offset == 100
assert across.length == (3 << 20) + 4096
refused(lambda: library.export_dmabuf(0, 4096, 4096), "cuMemGetAddressRange failed")
""",
    )


def test_ipc_handles_are_of_the_allocation_and_vmm_memory_has_none(driver):
    python(
        driver,
        DEVICE
        + """
slab = DeviceSlab(4 << 20)
handle, offset = library.export_ipc(0, slab.address + 12345)
assert offset == 12345
base = library.open_ipc(0, handle)
assert base == slab.address
library.close_ipc(0, base)
refused(lambda: library.open_ipc(0, b"short"), "64 bytes")
vmm = DeviceSlab(4 << 20, vmm=True)
refused(lambda: library.export_ipc(0, vmm.address), "cuIpcGetMemHandle failed")
""",
    )


PAGES_OF = """
import ctypes
fake = ctypes.CDLL("libcuda.so.1")
fake.fake_copies_left.restype = ctypes.c_size_t
fake.fake_registered_on.argtypes = (ctypes.c_void_p,)
"""


def test_host_memory_is_page_locked_in_the_workers_context_and_no_other_is_made(driver):
    python(
        driver,
        DEVICE
        + PAGES_OF
        + """
with HostSlab(1 << 20) as slab:  # no context on this thread, and two devices: none is chosen
    assert not slab.granted & extension.PINNED
assert not fake.fake_has_context(0) and not fake.fake_has_context(1)
slab = HostSlab(1 << 20, gpu=1)
assert slab.granted & extension.PINNED
assert fake.fake_registered_on(slab.address) == 1
address = slab.address
slab.close()
assert fake.fake_registered_on(address) == -1
context = ctypes.c_void_p()
fake.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1)
fake.cuCtxPushCurrent_v2(context)
slab = HostSlab(1 << 20)  # a worker's thread has its device's context
assert fake.fake_registered_on(slab.address) == 1
fake.cuCtxPopCurrent_v2(ctypes.byref(context))
slab.close()  # at exit it may be another thread
assert not fake.fake_has_context(0)
refused(lambda: DeviceSlab(1, 2), "there are 2")
""",
        LORASERVE_FAKE_DEVICES="2",
    )


def test_a_failed_copy_leaves_none_under_way(driver):
    python(
        driver,
        DEVICE
        + PAGES_OF
        + """
from vllm_loraserve.memory.extension import Segment
with HostSlab(1 << 20) as host, DeviceSlab(1 << 20) as device:
    segments = [Segment(host.address, device.address, 4096), Segment(host.address, device.address, 48)]
    refused(lambda: library.copy(segments, 0), "cuMemcpyAsync failed")
    assert fake.fake_copies_left() == 0
    lengths = [1, 2, 3, 4, 5, 6]  # the tables of a launch: 48 bytes each
    refused(lambda: library.checksums([device.address] * 6, lengths, 0), "cuMemcpyAsync")
    refused(lambda: library.gather(device.address, lengths, 16, device.address + 4096, 0), "cuMemcpyAsync")
    assert fake.fake_copies_left() == 0
""",
        LORASERVE_FAKE_BAD_COPY="48",
    )


TRANSFER = """
import contextlib, sys
import numpy as np
from vllm_loraserve.memory import extension
from vllm_loraserve.memory.extension import Segment
from vllm_loraserve.memory.slab import DeviceSlab, HostSlab
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.pages import AdapterPages, Destination, Range, Wanted
from vllm_loraserve.transfer.peer import Peer
from vllm_loraserve.transfer.server import TransferServer
from vllm_loraserve.transfer.slab_store import SlabStore
library = extension.load()
key = b"the cluster key of the tests"

class OnDevice(SlabStore):
    def __init__(self, size):
        super().__init__(size)
        self.host, self.slab = self.slab, DeviceSlab(size)
        self.slab.size = self.host.size
    def content(self, name):
        with HostSlab(self.slab.size) as copy:
            library.copy([Segment(self.slab.address, copy.address, self.slab.size)], 0)
            return b"".join(bytes(copy.view(*r)) for r in self._held[name].ranges)

pages = [np.random.default_rng(i).integers(0, 256, 40_000 + i, np.uint8) for i in range(30)]
whole = b"".join(bytes(p) for p in pages)
host = SlabStore(4 << 20, max_range=300_000)
host.put("a", pages, layout="L")
device = OnDevice(4 << 20)
wanted = Wanted(name="a", layout="L")
with TransferServer([host], key, "one", verbs="off") as server:
    for rung in ("memfd", "tcp"):
        with Peer(server.endpoint, key, "two", order=(rung,)) as peer:
            assert peer.fetch(wanted, device, Flight(10), 0)[1] == rung
            assert device.content("a") == whole, rung
            if rung == "memfd":
                device.drop("a")
with TransferServer([device], key, "three", verbs="off") as server:
    for rung in ("cuda_ipc", "tcp"):
        for landing, number in ((SlabStore(4 << 20), -1), (OnDevice(4 << 20), 0)):
            with Peer(server.endpoint, key, "two", order=(rung,)) as peer:
                assert peer.reasons(number) == {rung: ""}, peer.reasons(number)
                assert peer.fetch(wanted, landing, Flight(10), number)[1] == rung
            assert (landing.content("a") if number == 0 else landing.bytes_of("a")) == whole, rung
    with Peer(server.endpoint, key, "two", order=("memfd", "verbs_gpudirect", "tcp")) as peer:
        assert peer.reasons()["memfd"] == "the peer serves device memory only"
# A byte that changes on the device is found by the device's checksum.
with HostSlab(4096) as one:
    one.array()[:] = 7
    library.copy([Segment(one.address, device.slab.address + device._held["a"].ranges[0].offset, 1)], 0)
with TransferServer([device], key, "three", verbs="off") as server:
    peer = Peer(server.endpoint, key, "two", order=("cuda_ipc",))
    try:
        peer.fetch(wanted, OnDevice(4 << 20), Flight(10), 0)
        raise SystemExit("not found")
    except Exception as error:
        assert type(error).__name__ == "CorruptPageError", error
    peer.close()
print("done")
"""


def test_pages_move_from_and_to_device_memory(driver):
    if not kernels_built():
        pytest.skip("built without nvcc")
    assert python(driver, TRANSFER).endswith("done\n")
