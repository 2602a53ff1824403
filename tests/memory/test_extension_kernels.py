"""The CUDA kernels: their source run on the CPU against the C++ twins, their compilation, themselves on a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vllm_loraserve.memory import extension
from vllm_loraserve.memory.checksum import CHUNK
from vllm_loraserve.memory.extension import Segment
from vllm_loraserve.memory.slab import DeviceSlab, HostSlab

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "pool"
LENGTHS = (0, 1, 7, 8, 1000, CHUNK, CHUNK + 1, 33 * CHUNK + 13, 64 * CHUNK, 300_001)
PAGE_BYTES = (16, 48, 4096, 65536 + 16)
GRIDS = ((1, 1), (3, 2), (7, 40))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    """The kernels' source as host code."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulator") / "kernels.so"
    source = Path(__file__).with_name("kernel_emulator.cpp")
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-fPIC",
            "-shared",
            f"-I{SOURCES}",
            "-Wno-unknown-pragmas",
            source,
            "-o",
            library,
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


@pytest.fixture
def data():
    with HostSlab(1 << 20) as slab:
        slab.array()[:] = np.random.default_rng(11).integers(0, 256, slab.size, np.uint8)
        yield slab


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
def test_gather_and_scatter_kernels_equal_their_twins(library, emulator, data, page_bytes, grid):
    pages = np.random.default_rng(page_bytes).permutation(data.size // page_bytes)[:11].astype(np.int64)
    count, size = ctypes.c_uint64(len(pages)), ctypes.c_uint64(page_bytes)
    table = pages.ctypes.data_as(ctypes.c_void_p)

    def pointer(slab: HostSlab) -> ctypes.c_void_p:
        return ctypes.c_void_p(slab.address)

    rows = len(pages) * page_bytes
    with HostSlab(rows) as ours, HostSlab(rows) as twin, HostSlab(data.size) as back, HostSlab(data.size) as twin_back:
        emulator.emulate_gather(*grid, pointer(data), table, count, size, pointer(ours))
        library.gather(data.address, pages, page_bytes, twin.address)
        assert (ours.array() == twin.array()).all()
        emulator.emulate_scatter(*grid, pointer(ours), table, count, size, pointer(back))
        library.scatter(twin.address, pages, page_bytes, twin_back.address)
        assert (back.array() == twin_back.array()).all()
        assert back.array().any()


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_checksum_kernel_equals_its_twin(library, emulator, data, start, grid):
    addresses = np.array([data.address + start] * len(LENGTHS), np.uint64)
    lengths, sums = np.array(LENGTHS, np.uint64), np.zeros(len(LENGTHS), np.uint64)
    emulator.emulate_checksums(
        *grid,
        *(ctypes.c_void_p(a.ctypes.data) for a in (addresses, lengths)),
        ctypes.c_uint64(len(LENGTHS)),
        ctypes.c_void_p(sums.ctypes.data),
    )
    assert [int(s) for s in sums] == library.checksums(list(addresses), LENGTHS)


def embedded_code(binary: bytes) -> set[tuple[str, int]]:
    """("elf" or "ptx", architecture) of every entry of the fat binary inside: header, then entry headers with sizes."""
    start = binary.find(struct.pack("<I", 0xBA55ED50))
    assert start >= 0, "no fat binary inside"
    _, _, header, size = struct.unpack_from("<IHHQ", binary, start)
    at, end, found = start + header, start + header + size, set()
    while at < end:
        kind, _, entry_header, padded = struct.unpack_from("<HHIQ", binary, at)
        found.add(({1: "ptx", 2: "elf"}[kind], struct.unpack_from("<I", binary, at + 28)[0]))
        at += entry_header + padded
    return found


def test_the_kernels_are_compiled_for_every_architecture_promised(library):
    if shutil.which("nvcc") is None and not library.probe().cuda_kernels:
        pytest.skip("built without nvcc")
    assert library.probe().cuda_kernels, "there is an nvcc, but the extension was built without it"
    promised = {("elf", 80), ("elf", 90), ("elf", 100), ("ptx", 80), ("ptx", 100)}
    assert embedded_code(library.path.read_bytes()) == promised


# ---- on a GPU ----


@pytest.fixture
def gpu(library):
    if not library.probe().cuda.devices:
        pytest.skip("no GPU")
    return 0


def upload(library: extension.Extension, source: HostSlab, target: DeviceSlab) -> None:
    library.copy([Segment(source.address, target.address, source.size)], target.device)


def download(library: extension.Extension, source: DeviceSlab, size: int) -> bytes:
    with HostSlab(size) as host:
        library.copy([Segment(source.address, host.address, size)], source.device)
        return bytes(host.view(0, size))


@pytest.mark.gpu
@pytest.mark.parametrize("vmm", [False, True])
def test_device_kernels_equal_their_twins(library, gpu, data, vmm):
    with DeviceSlab(data.size, gpu, vmm=vmm) as device, DeviceSlab(data.size, gpu) as rows:
        upload(library, data, device)
        for start in (0, 3):
            sums = library.checksums([device.address + start] * len(LENGTHS), LENGTHS, gpu)
            assert sums == library.checksums([data.address + start] * len(LENGTHS), LENGTHS)
        for page_bytes in PAGE_BYTES:
            pages = list(np.random.default_rng(page_bytes).permutation(data.size // page_bytes)[:11])
            library.gather(device.address, pages, page_bytes, rows.address, gpu)
            with HostSlab(len(pages) * page_bytes) as twin:
                library.gather(data.address, pages, page_bytes, twin.address)
                want = bytes(twin.view(0, len(pages) * page_bytes))
            assert download(library, rows, len(want)) == want
            library.scatter(rows.address, pages, page_bytes, device.address, gpu)
            assert download(library, device, data.size) == bytes(data.view())


@pytest.mark.gpu
def test_a_device_slab_exports_a_dma_buf_of_its_allocation(library, gpu):
    if not library.probe().cuda.devices[gpu].dma_buf:
        pytest.skip("this GPU or driver exports no dma-buf")
    with DeviceSlab(8 << 20, gpu) as slab:
        exported = library.export_dmabuf(gpu, slab.address + (1 << 20), 1 << 16)
        try:
            assert exported.base <= slab.address
            assert exported.base + exported.offset == slab.address + (1 << 20)
            assert exported.length >= 8 << 20
        finally:
            os.close(exported.fd)


@pytest.mark.gpu
def test_device_slabs_are_given_back(library, gpu):
    for _ in range(64):
        with DeviceSlab(1 << 30, gpu):
            pass
