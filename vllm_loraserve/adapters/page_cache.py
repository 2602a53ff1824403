"""Optional on-disk cache of converted pages: the same bytes as in memory, keyed by content and layout.

A file is a JSON line (digest, fingerprint, ranks, checksums) and then the pages. It is written aside and
renamed, so that a reader sees all of it or nothing; a file that does not match is ignored and replaced.
"""

import contextlib
import logging
import os
import tempfile
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


class PageCache:
    """Converted adapters in `directory`, made if need be."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str, fingerprint: str) -> Path:
        return self.directory / f"{digest[:32]}-{fingerprint[:32]}.pages"

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
        try:
            with self.path(head.digest, head.fingerprint).open("rb") as file:
                file.readline()
                return file.readinto(target) == head.size
        except OSError:
            return False

    def write(
        self,
        digest: str,
        fingerprint: str,
        ranks: Sequence[int],
        checksums: Sequence[int],
        pages: memoryview,
    ) -> None:
        """Keep an adapter's pages. A full or read-only disk is logged, and the adapter is served anyway."""
        head = CachedPages(digest, fingerprint, tuple(ranks), tuple(checksums), len(pages))
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=self.directory, delete=False) as file:
                temporary = file.name
                file.write(msgspec.json.encode(head) + b"\n")
                file.write(pages)
            os.replace(temporary, self.path(digest, fingerprint))
        except OSError as error:
            logger.warning("The page cache '%s' cannot be written: %s", self.directory, error)
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
