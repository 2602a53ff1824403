"""Optional on-disk cache of converted pages: the same bytes as in memory, keyed by content and layout.

A file is a JSON line (digest, fingerprint, ranks, checksums) and then the pages. It is written aside and
renamed, so that a reader sees all of it or nothing; a file that does not match is ignored and replaced. The
directory may be shared by workers and instances: each keeps it within its own limit, and a file's time of
modification, which a read renews, says how recently any of them used it.
"""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

logger = logging.getLogger(__name__)


class CachedPages(msgspec.Struct, frozen=True):
    """The head of a cache file: what its pages are. `ranks` per slice; `checksums` per page."""

    digest: str
    fingerprint: str
    ranks: tuple[int, ...]
    checksums: tuple[int, ...]
    size: int


_SUFFIX, _PARTIAL = ".pages", ".partial"
_ABANDONED_S = 3600.0
"""A file that has not been renamed for so long was left behind by a process that died."""


class PageCache:
    """Converted adapters in `directory`, made if need be, in at most `limit_bytes` (None: no limit)."""

    def __init__(self, directory: Path, limit_bytes: int | None = None) -> None:
        self.directory, self.limit_bytes = directory, limit_bytes
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str, fingerprint: str) -> Path:
        return self.directory / f"{digest[:32]}-{fingerprint[:32]}{_SUFFIX}"

    def find(self, digest: str, fingerprint: str) -> CachedPages | None:
        """What is cached for this content and layout, or None."""
        try:
            with self.path(digest, fingerprint).open("rb") as file:
                head = msgspec.json.decode(file.readline(), type=CachedPages)
        except (OSError, msgspec.DecodeError):
            return None
        return head if (head.digest, head.fingerprint) == (digest, fingerprint) else None

    def read_into(self, head: CachedPages, target: memoryview) -> bool:
        """Fill `target` (`head.size` bytes) with the pages; False when the file is gone or too short.

        The caller compares checksums before it believes the bytes.
        """
        path = self.path(head.digest, head.fingerprint)
        try:
            with path.open("rb") as file:
                file.readline()
                whole = file.readinto(target) == head.size
        except OSError:
            return False
        with contextlib.suppress(OSError):  # another user's file, or gone meanwhile
            os.utime(path)
        return whole

    def write(
        self,
        digest: str,
        fingerprint: str,
        ranks: Sequence[int],
        checksums: Sequence[int],
        pages: memoryview,
    ) -> None:
        """Keep an adapter's pages, in place of those that were used least recently. A full or read-only disk is logged,
        and the adapter is served anyway."""
        head = msgspec.json.encode(CachedPages(digest, fingerprint, tuple(ranks), tuple(checksums), len(pages))) + b"\n"
        path, temporary = self.path(digest, fingerprint), None
        try:
            if not self._make_room(path, len(head) + len(pages)):
                return
            with tempfile.NamedTemporaryFile(dir=self.directory, suffix=_PARTIAL, delete=False) as file:
                temporary = file.name
                file.write(head)
                file.write(pages)
            os.replace(temporary, path)
        except OSError as error:
            logger.warning("The page cache '%s' cannot be written: %s", self.directory, error)
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _make_room(self, path: Path, size: int) -> bool:
        """Removes what was used least recently until `size` bytes fit as `path`; False where they never can."""
        if self.limit_bytes is None:
            return True
        if size > self.limit_bytes:
            logger.debug("Pages of %d bytes are more than the page cache may take", size)
            return False
        held, now = [], time.time()
        for entry in os.scandir(self.directory):
            if not entry.name.endswith((_SUFFIX, _PARTIAL)) or entry.name == path.name:
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                being_written = entry.name.endswith(_PARTIAL) and now - stat.st_mtime < _ABANDONED_S
                held.append((being_written, stat.st_mtime_ns, stat.st_size, entry.path))
        surplus = sum(length for _, _, length, _ in held) + size - self.limit_bytes
        for being_written, _, length, victim in sorted(held):
            if surplus <= 0 or being_written:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(victim)
            surplus -= length
        return surplus <= 0
