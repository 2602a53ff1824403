"""The extension against numpy and against itself: allocation, copies, every hash variant, and life without
it."""

from __future__ import annotations

import logging
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vllm_loraserve.memory import extension
from vllm_loraserve.memory.checksum import CHUNK, checksum_of, checksums
from vllm_loraserve.memory.extension import ExtensionError, Segment
from vllm_loraserve.memory.slab import DeviceSlab, HostSlab

LENGTHS = (0, 1, 7, 8, 9, 63, 64, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 13, 9 * CHUNK, 300_001)


@pytest.fixture
def slab():
    with HostSlab(1 << 20) as made:
        array = made.array()
        array[:] = np.random.default_rng(7).integers(0, 256, array.size, np.uint8)
        yield made


def usable_variants(library: extension.Extension) -> list[str]:
    usable = []
    for name in ("avx512", "avx2", "scalar"):
        try:
            library.force_hash_variant(name)
        except ExtensionError:
            continue
        usable.append(name)
    return usable


def test_every_hash_variant_equals_numpy(library, slab):
    before = library.hash_variant
    try:
        variants = usable_variants(library)
        assert "scalar" in variants
        for variant in variants:
            library.force_hash_variant(variant)
            for start in (0, 3):  # aligned and not
                got = library.checksums([slab.address + start] * len(LENGTHS), LENGTHS)
                want = [checksum_of(slab.array()[start : start + n]) for n in LENGTHS]
                assert got == want, variant
    finally:
        library.force_hash_variant(before)


def test_the_hash_is_the_one_that_was_written_down():
    """A change of the algorithm would make old page caches and older peers look corrupt: it must be
    deliberate."""
    data = (np.arange(3 * CHUNK + 5, dtype=np.uint64) * 131 % 251).astype(np.uint8)
    assert checksum_of(data) == 0xBB9B8C89E9068FD
    assert checksum_of(b"") == 0


def test_a_flipped_bit_a_swap_and_a_cut_change_the_hash(slab):
    data = slab.array()[: 3 * CHUNK].copy()
    whole = checksum_of(data)
    for position in range(0, data.size, 97):
        for bit in (0, 7):
            data[position] ^= 1 << bit
            assert checksum_of(data) != whole
            data[position] ^= 1 << bit
    swapped = data.copy()
    swapped[:8], swapped[64:72] = data[64:72], data[:8]  # the same lane, another stripe
    assert checksum_of(swapped) != whole
    swapped = np.concatenate([data[CHUNK:], data[:CHUNK]])
    assert checksum_of(swapped) != whole
    assert checksum_of(data[:-1]) != whole
    assert checksum_of(np.concatenate([data, np.zeros(1, np.uint8)])) != whole


def test_sign_bits_flipped_in_pairs_are_seen(slab):
    """Flipping the top bit of two words cancels in a plain multiply-and-add; it must not here."""
    data = slab.array()[:CHUNK].copy()
    whole = checksum_of(data)
    for a in range(0, CHUNK, 64):
        for b in range(a + 64, CHUNK, 64):
            data[a + 7] ^= 0x80
            data[b + 7] ^= 0x80
            assert checksum_of(data) != whole
            data[a + 7] ^= 0x80
            data[b + 7] ^= 0x80


def test_copy_and_copy_checksums(library, slab):
    with HostSlab(1 << 20) as target:
        segments = [Segment(slab.address + 17, target.address + 5, n) for n in LENGTHS]
        for segment in segments:
            target.array()[:] = 0
            assert library.copy_checksums([segment]) == checksums([segment.source], [segment.length])
            assert bytes(target.view(5, segment.length)) == bytes(slab.view(17, segment.length))
            assert not target.array()[5 + segment.length :].any()
        target.array()[:] = 0
        library.copy([Segment(slab.address, target.address + 64, 100), Segment(slab.address + 500, target.address, 64)])
        assert bytes(target.view(0, 64)) == bytes(slab.view(500, 64))
        assert bytes(target.view(64, 100)) == bytes(slab.view(0, 100))


def test_large_copies_go_past_the_caches_and_arrive_as_well(library):
    """Above 4 MiB in one call the copy streams; every variant, aligned and not, with pages that end in the middle."""
    rng = np.random.default_rng(3)
    with HostSlab(6 << 20) as source, HostSlab(6 << 20) as target:
        source.array()[:] = rng.integers(0, 256, source.size, np.uint8)
        before = library.hash_variant
        try:
            for variant in usable_variants(library):
                library.force_hash_variant(variant)
                for shift, length in ((0, 1 << 20), (0, (1 << 20) - 777), (32, 1_000_000), (8, 1_000_001)):
                    target.array()[:] = 0
                    places = [shift + i * (1 << 20) for i in range(5)]
                    segments = [Segment(source.address + p, target.address + p, length) for p in places]
                    assert library.copy_checksums(segments) == library.checksums(
                        [source.address + p for p in places], [length] * 5
                    )
                    for p in places:
                        assert (target.array()[p : p + length] == source.array()[p : p + length]).all()
                    assert not target.array()[places[-1] + length :].any()
        finally:
            library.force_hash_variant(before)


@pytest.mark.parametrize("threads", [2, 5])
def test_several_threads_copy_and_hash_the_same(library, threads):
    """8 MiB and more are shared, page by page; fewer pages than threads are as well."""
    rng = np.random.default_rng(threads)
    with HostSlab(16 << 20) as source, HostSlab(16 << 20) as target:
        source.array()[:] = rng.integers(0, 256, source.size, np.uint8)
        for count, length in ((100, 160_001), (3, 5 << 20), (1, 16 << 20)):
            target.array()[:] = 0
            places = [i * length for i in range(count)]
            segments = [Segment(source.address + p, target.address + p, length) for p in places]
            want = library.checksums([source.address + p for p in places], [length] * count)
            assert library.copy_checksums(segments, threads) == want
            assert (target.array()[: count * length] == source.array()[: count * length]).all()
            assert not target.array()[count * length :].any()


@pytest.mark.parametrize("page_bytes", [16, 48, 4096, 65536 + 16])
def test_gather_and_scatter_are_inverse(library, slab, page_bytes):
    pages = list(np.random.default_rng(page_bytes).permutation(slab.size // page_bytes)[:13])
    with HostSlab(len(pages) * page_bytes) as rows, HostSlab(slab.size) as back:
        library.gather(slab.address, pages, page_bytes, rows.address)
        for i, page in enumerate(pages):
            assert bytes(rows.view(i * page_bytes, page_bytes)) == bytes(slab.view(int(page) * page_bytes, page_bytes))
        library.scatter(rows.address, pages, page_bytes, back.address)
        touched = np.zeros(back.size, bool)
        for page in pages:
            at = slice(int(page) * page_bytes, (int(page) + 1) * page_bytes)
            touched[at] = True
            assert (back.array()[at] == slab.array()[at]).all()
        assert not back.array()[~touched].any()


def test_bad_pages_are_refused(library, slab):
    with pytest.raises(ExtensionError, match="multiple of 16"):
        library.gather(slab.address, [0], 24, slab.address)
    with pytest.raises(ExtensionError, match="negative"):
        library.gather(slab.address, [0, -1], 32, slab.address)
    for call in (library.gather, library.scatter):
        for one, other in ((8, 0), (0, 4)):
            with pytest.raises(ExtensionError, match="addresses of pages and rows must be multiples of 16"):
                call(slab.address + one, [0], 32, slab.address + 4096 + other)


def test_a_host_slab_is_a_memfd_that_another_mapping_sees(slab):
    with mmap.mmap(slab.fd, slab.size, prot=mmap.PROT_READ) as other:
        assert bytes(other[:4096]) == bytes(slab.view(0, 4096))
        slab.view(100, 3)[:] = b"abc"
        assert other[100:103] == b"abc"


@pytest.mark.parametrize("built", [True, False])
def test_a_host_slab_cannot_change_its_size_under_a_peer(built, library, monkeypatch):
    if not built:
        monkeypatch.setattr(extension, "load", lambda: None)
    with HostSlab(1 << 20) as slab:
        for size in (4096, 2 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(slab.fd, size)


def test_slabs_do_not_leak_descriptors_or_mappings(library):
    def state() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count("loraserve-pool")
        return len(os.listdir("/proc/self/fd")), maps

    before = state()
    for _ in range(200):
        with HostSlab(1 << 16):
            pass
    assert state() == before


def test_ranges_outside_a_slab_are_refused(slab):
    for offset, length in ((-1, 4), (0, slab.size + 1), (slab.size, 1), (5, -1)):
        with pytest.raises(ValueError, match="outside the slab"):
            slab.view(offset, length)
    with pytest.raises(ValueError, match="above 0"):
        HostSlab(0)


def test_device_memory_without_a_gpu_says_so(library):
    if library.probe().cuda.devices:
        pytest.skip("there is a GPU here")
    with pytest.raises(ExtensionError, match="CUDA"):
        DeviceSlab(1 << 20)


def test_probe_reads_back(library):
    report = library.probe()
    assert report.abi == extension.ABI
    assert report.hash == library.hash_variant
    assert report.cuda.loaded or report.cuda.error
    assert report.verbs.devices or report.verbs.error


def test_it_links_neither_cuda_nor_verbs_nor_torch(library):
    # vLLM preloads libraries into the processes that its importer starts, and ldd would list those.
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    listed = subprocess.run(["ldd", str(library.path)], capture_output=True, text=True, check=True, env=clean).stdout
    for name in ("cuda", "ibverbs", "torch", "python"):
        assert name not in listed


MISSING = """
import logging, sys
logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(levelname)s %(message)s")
from vllm_loraserve.memory import extension
from vllm_loraserve.memory.checksum import checksums, checksum_of
from vllm_loraserve.memory.slab import DeviceSlab, HostSlab
with HostSlab(5000, populate=True) as slab:
    view = slab.view(0, 5000)
    view[:] = bytes(i % 251 for i in range(5000))
    assert checksums([slab.address], [5000]) == [checksum_of(bytes(view))], "checksum"
    del view
try:
    DeviceSlab(1 << 20)
except extension.ExtensionError as error:
    print("refused:", error)
assert extension.load() is None
"""


def test_without_the_library_host_memory_still_works_with_one_warning(tmp_path):
    environment = {
        **os.environ,
        "LORASERVE_POOL_LIBRARY": str(tmp_path / "absent.so"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run([sys.executable, "-c", MISSING], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("WARNING") == 1
    assert "absent.so does not exist" in run.stdout
    assert "refused:" in run.stdout


def test_a_library_that_is_not_ours_is_refused(tmp_path, monkeypatch, caplog):
    other = tmp_path / "other.so"
    other.write_bytes(b"not a library")
    monkeypatch.setenv("LORASERVE_POOL_LIBRARY", str(other))
    monkeypatch.setattr(extension, "_warned", __import__("threading").Event())
    with caplog.at_level(logging.WARNING):
        assert extension.load() is None
    assert "cannot be loaded" in caplog.text
