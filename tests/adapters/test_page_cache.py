"""adapters/page_cache.py: what is found again is what was written, or nothing."""

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
