"""The registry keeps what it acknowledged, also over kill -9, and belongs to one process."""

import os
import signal
import sqlite3
import subprocess
import sys

import msgspec
import pytest
from coordinator_bench import record

from vllm_loraserve.coordinator.registry import Registry, RegistryError

WRITER = """
import sys
from vllm_loraserve.coordinator.messages import AdapterRecord
from vllm_loraserve.coordinator.registry import Registry
registry = Registry(sys.argv[1])
for i in range(100000):
    registry.add(AdapterRecord(name=f"a{i}", source="/a", rank=8, target_modules=("q",), size_bytes=1, sha256=str(i),
                               base_model="m", added_at=1.0))
    print(i, flush=True)
"""


def test_records_and_ids_survive_reopening(tmp_path):
    path = tmp_path / "r.sqlite"
    registry = Registry(path)
    one, two = registry.add(record("one")), registry.add(record("two", rank=64))
    registry.update("two", state="draining", reason="asked")
    registry.remove("one")
    epoch = registry.epoch
    registry.close()
    registry = Registry(path)
    assert registry.epoch > epoch
    assert registry.all() == [msgspec.structs.replace(two, state="draining", reason="asked")]
    again = registry.add(record("one"))
    assert again.adapter_id > two.adapter_id > one.adapter_id, "an id is never used twice"
    with pytest.raises(KeyError):
        registry.add(record("one"))
    registry.close()


def test_acknowledged_records_survive_kill_9(tmp_path):
    path = tmp_path / "r.sqlite"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    acknowledged = -1
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged >= 20:
            os.kill(process.pid, signal.SIGKILL)
            break
    rest = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    acknowledged = int(rest[-1]) if rest else acknowledged
    registry = Registry(path)
    assert {r.name for r in registry.all()} >= {f"a{i}" for i in range(acknowledged + 1)}
    registry.close()


def test_second_coordinator_is_refused_in_one_line(tmp_path):
    path = tmp_path / "r.sqlite"
    registry = Registry(path)
    with pytest.raises(RegistryError, match="in use by another coordinator") as raised:
        Registry(path)
    assert "\n" not in str(raised.value)
    registry.close()
    Registry(path).close()


def test_broken_or_newer_database_is_named(tmp_path):
    path = tmp_path / "r.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(RegistryError, match=r"r\.sqlite.*can't be read"):
        Registry(path)
    newer = tmp_path / "n.sqlite"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(RegistryError, match="schema version 99"):
        Registry(newer)


def test_epoch_is_larger_after_the_file_was_removed(tmp_path):
    registry = Registry(tmp_path / "r.sqlite")
    epoch = registry.epoch
    registry.close()
    (tmp_path / "r.sqlite").unlink()
    registry = Registry(tmp_path / "r.sqlite")
    assert registry.epoch >= epoch
    registry.close()
