"""adapters/page_cache.py: what is found again is what was written, or nothing."""

import contextlib
import os
from pathlib import Path

from vllm_loraserve.adapters.page_cache import PageCache


def test_round_trip_and_damage(tmp_path: Path) -> None:
    cache = PageCache(tmp_path / "cache")
    assert cache.find("digest", "print") is None
    pages = memoryview(bytes(range(256)) * 10)
    cache.write("digest", "print", (8, 0), (1, 2, 3), pages)
    head = cache.find("digest", "print")
    assert head is not None
    assert (head.ranks, head.checksums, head.size) == ((8, 0), (1, 2, 3), 2560)
    target = memoryview(bytearray(2560))
    assert cache.read_into(head, target)
    assert target == pages
    assert cache.find("digest", "other") is None
    assert cache.find("other", "print") is None
    path = cache.path("digest", "print")
    path.write_bytes(path.read_bytes()[:-1])
    assert not cache.read_into(head, target)
    path.write_bytes(b"{broken")
    assert cache.find("digest", "print") is None
    path.unlink()
    assert not cache.read_into(head, target)
    assert [p.name for p in cache.directory.iterdir()] == []


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    cache = PageCache(tmp_path / "cache")
    cache.directory.rmdir()
    cache.write("digest", "print", (), (), memoryview(b"x"))
    assert cache.find("digest", "print") is None


def keep(cache: PageCache, digest: str, used: int, size: int = 1000) -> None:
    """Writes a file of about `size` bytes, last used at `used` seconds."""
    cache.write(digest, "print", (8,), (1,), memoryview(bytes(size)))
    with contextlib.suppress(FileNotFoundError):
        os.utime(cache.path(digest, "print"), (used, used))


def names(cache: PageCache) -> set[str]:
    return {path.name.split("-")[0] for path in cache.directory.iterdir()}


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    cache = PageCache(tmp_path, 3500)
    foreign = tmp_path / "foreign"
    foreign.write_bytes(bytes(5000))
    for used, digest in enumerate(("first", "second", "third"), 1):
        keep(cache, digest, used)
    assert names(cache) == {"foreign", "first", "second", "third"}
    head = cache.find("first", "print")
    assert head is not None
    assert cache.read_into(head, memoryview(bytearray(1000)))
    keep(cache, "fourth", 4)
    assert names(cache) == {"foreign", "first", "third", "fourth"}
    keep(cache, "third", 5, size=1100)
    assert names(cache) == {"foreign", "first", "third", "fourth"}, "in place of itself"
    keep(cache, "huge", 6, size=3500)
    assert names(cache) == {"foreign", "first", "third", "fourth"}, "larger than the limit: not kept, and nobody leaves"
    keep(cache, "large", 7, size=3000)
    assert names(cache) == {"foreign", "large"}
    unlimited = PageCache(tmp_path)
    keep(unlimited, "more", 8, size=10000)
    assert names(cache) == {"foreign", "large", "more"}


def test_what_is_being_written_stays_and_what_a_dead_process_left_goes(tmp_path: Path) -> None:
    cache = PageCache(tmp_path, 2500)
    writing, left = tmp_path / "writing.partial", tmp_path / "left.partial"
    for path in (writing, left):
        path.write_bytes(bytes(1000))
    os.utime(left, (1, 1))
    keep(cache, "first", 2)
    assert names(cache) == {"first", "writing.partial"}
    keep(cache, "second", 3)
    assert names(cache) == {"second", "writing.partial"}
    keep(cache, "wide", 4, size=2000)
    assert "writing.partial" in names(cache)
    assert cache.find("wide", "print") is None
