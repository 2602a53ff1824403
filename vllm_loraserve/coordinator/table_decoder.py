"""Decodes the tables that a coordinator publishes, and of each only what is new.

A table comes every second and is mostly the one before: with thousands of adapters, megabytes whose decoding holds up
an event loop that forwards tokens, for tens of milliseconds. What has the same bytes as in the last table becomes the
same objects.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from vllm_loraserve.coordinator.messages import AdapterRoutes, InstanceEntry, Residency, RoutingTable

_NONE = msgspec.Raw(msgspec.msgpack.encode(()))
StructT = TypeVar("StructT", bound=msgspec.Struct)


class _Entry(InstanceEntry, frozen=True):
    resident: msgspec.Raw = _NONE  # type: ignore[assignment]


class _Table(RoutingTable, frozen=True, kw_only=True, tag="RoutingTable"):
    instances: tuple[_Entry, ...]
    adapters: msgspec.Raw = _NONE  # type: ignore[assignment]


class TableDecoder:
    """Keeps the last table's bytes and objects. A part that is malformed raises what msgspec raises."""

    def __init__(self) -> None:
        self._table = msgspec.msgpack.Decoder(_Table)
        self._adapters = _Remembered(tuple[AdapterRoutes, ...])
        self._residents: dict[str, _Remembered] = {}

    def decode(self, payload: bytes) -> RoutingTable:
        """The table in `payload`."""
        raw = self._table.decode(payload)
        before, self._residents = self._residents, {}
        instances = []
        for entry in raw.instances:
            known = before.get(entry.name) or _Remembered(tuple[Residency, ...])
            self._residents[entry.name] = known
            instances.append(_with(InstanceEntry, entry, resident=known.decode(entry.resident)))
        return _with(RoutingTable, raw, instances=tuple(instances), adapters=self._adapters.decode(raw.adapters))


class _Remembered:
    """A decoder of one value that remembers the last."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._bytes: bytes | None = None
        self._value: Any = None

    def decode(self, raw: msgspec.Raw) -> Any:
        data = bytes(raw)
        if data != self._bytes:
            self._value, self._bytes = self._decoder.decode(data), data
        return self._value


def _with(kind: type[StructT], struct: msgspec.Struct, **changes: Any) -> StructT:
    """`struct` as the class that it stands for."""
    fields = {name: getattr(struct, name) for name in kind.__struct_fields__}
    return kind(**(fields | changes))
