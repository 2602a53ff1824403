"""The durable part of the coordinator: which adapters exist. SQLite in WAL mode, one process at a time.

A record is on disk before its addition is acknowledged (synchronous=FULL), so a kill at any instant loses nothing that
anybody was told. Adapter ids come from AUTOINCREMENT: never used twice, not even for the same name. Instances are kept
only as a hint of whom to wait for after a restart. What is in memory follows the file: a write that fails (a full disk)
raises RegistryError and has changed neither; only that hint may get lost.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vllm_loraserve.coordinator.messages import AdapterRecord

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE adapters (
  adapter_id INTEGER PRIMARY KEY AUTOINCREMENT,
  name TEXT NOT NULL UNIQUE,
  source TEXT NOT NULL,
  rank INTEGER NOT NULL,
  target_modules TEXT NOT NULL,
  size_bytes INTEGER NOT NULL,
  sha256 TEXT NOT NULL,
  base_model TEXT NOT NULL,
  added_at REAL NOT NULL,
  state TEXT NOT NULL,
  reason TEXT NOT NULL
);
CREATE TABLE instances (name TEXT PRIMARY KEY, url TEXT NOT NULL, last_seen REAL NOT NULL);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_COLUMNS = "name, source, rank, target_modules, size_bytes, sha256, base_model, added_at, state, reason"


class RegistryError(RuntimeError):
    """The database can't be used; the message is one sentence naming the file and the fix."""


class Registry:
    """The adapters of a cluster, in the file `path`; one thread only. Raises RegistryError when it can't open."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RegistryError(
                f"The registry '{self.path}' is in use by another coordinator; stop it or give another --database."
            ) from None
        try:
            self._db = self._open()
            self.epoch = self._next_epoch()
            self._records = {
                r.name: r for r in map(self._record, self._db.execute(f"SELECT adapter_id, {_COLUMNS} FROM adapters"))
            }
            self._ranks = {r.name: r.rank for r in self._records.values()}
        except sqlite3.DatabaseError as error:
            os.close(self._lock)
            raise RegistryError(f"The registry '{self.path}' can't be read ({error}); restore or remove it.") from error

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"schema version {version}, this release knows {SCHEMA_VERSION}")
        return db

    def _next_epoch(self) -> int:
        """Larger than every earlier one, also when the file was removed in between: hence never below the clock."""
        row = self._db.execute("SELECT value FROM meta WHERE key='epoch'").fetchone()
        epoch = max(int(row[0]) + 1 if row else 1, int(time.time()))
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (str(epoch),))
        return epoch

    @staticmethod
    def _record(row: tuple) -> AdapterRecord:
        names = ["adapter_id", *_COLUMNS.split(", ")]
        fields = dict(zip(names, row, strict=True))
        fields["target_modules"] = tuple(json.loads(fields["target_modules"]))
        return msgspec.convert(fields, AdapterRecord)

    def _write(self, statement: str, values: Sequence[object]) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise RegistryError(f"The registry '{self.path}' can't be written ({error}); see to its disk.") from error

    def get(self, name: str) -> AdapterRecord | None:
        """The record of `name`."""
        return self._records.get(name)

    def all(self) -> list[AdapterRecord]:
        """Every record, in the order of their addition."""
        return sorted(self._records.values(), key=lambda r: r.adapter_id)

    def ranks(self) -> dict[str, int]:
        """Adapter -> rank; to be read only."""
        return self._ranks

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: AdapterRecord, *, replace: bool = False) -> AdapterRecord:
        """Stores a new adapter and returns it with its `adapter_id`; KeyError if the name is taken and may not be
        taken over, RegistryError."""
        if record.name in self._records and not replace:
            raise KeyError(record.name)
        fields = msgspec.structs.asdict(record)
        fields["target_modules"] = json.dumps(record.target_modules)
        names = _COLUMNS.split(", ")
        cursor = self._write(
            f"INSERT OR REPLACE INTO adapters ({_COLUMNS}) VALUES ({', '.join('?' * len(names))})",
            [fields[n] for n in names],
        )
        assert cursor.lastrowid is not None
        stored = msgspec.structs.replace(record, adapter_id=cursor.lastrowid)
        self._ranks[record.name] = record.rank
        self._records[record.name] = stored
        return stored

    def update(
        self, name: str, *, source: str | None = None, state: str | None = None, reason: str | None = None
    ) -> AdapterRecord:
        """Changes what may change of a record: where it is read from, and its state. Content never. RegistryError."""
        changes = {k: v for k, v in (("source", source), ("state", state), ("reason", reason)) if v is not None}
        record = msgspec.structs.replace(self._records[name], **changes)
        assignments = ", ".join(f"{key}=?" for key in changes)
        self._write(f"UPDATE adapters SET {assignments} WHERE name=?", [*changes.values(), name])
        self._records[name] = record
        return record

    def remove(self, name: str) -> None:
        """Forgets an adapter; KeyError if unknown, RegistryError."""
        if name not in self._records:
            raise KeyError(name)
        self._write("DELETE FROM adapters WHERE name=?", (name,))
        del self._records[name], self._ranks[name]

    def remember_instance(self, name: str, url: str, last_seen: float) -> None:
        """Notes a live instance (seconds since the epoch), for the wait after a restart; best effort."""
        self._hint("INSERT OR REPLACE INTO instances VALUES (?, ?, ?)", (name, url, last_seen))

    def forget_instance(self, name: str) -> None:
        """Its membership ended; best effort."""
        self._hint("DELETE FROM instances WHERE name=?", (name,))

    def _hint(self, statement: str, values: Sequence[object]) -> None:
        try:
            self._write(statement, values)
        except RegistryError as error:
            logger.warning("%s A restart may wait for other instances than those there were.", error)

    def known_instances(self) -> set[str]:
        """Instances that were members when the last coordinator ended."""
        return {name for (name,) in self._db.execute("SELECT name FROM instances")}

    def get_meta(self, key: str) -> str | None:
        """A small setting of the cluster, such as `base_model`."""
        row = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return None if row is None else row[0]

    def set_meta(self, key: str, value: str) -> None:
        """Stores a small setting; RegistryError."""
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def close(self) -> None:
        """Closes the file and lets another coordinator have it."""
        self._db.close()
        os.close(self._lock)
