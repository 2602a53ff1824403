"""What the API server's agent may ask each worker.

The engine's own `list_loras` knows only adapters that have run: one that was loaded aside and waits in host memory is
not among them. On one machine these are asked over a socket of their own (`worker_desk.py`), while a step may run;
else by `collective_rpc`, for which they are mixed into vLLM's worker by its official `worker_extension_cls`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def _steady(read: Callable[[], T]) -> T:
    """`read`, once more where the engine's thread has changed what was iterated over."""
    for _ in range(100):
        try:
            return read()
        except (RuntimeError, KeyError):
            continue
    return read()


class WorkerExtension:
    """Methods added to the worker; their names are ours alone."""

    def _loraserve_manager(self) -> Any:
        return self.model_runner.lora_manager  # type: ignore[attr-defined]

    def loraserve_residency(self) -> tuple[list[int], list[int], dict[int, str], dict[int, int]]:
        """Ids of adapters (in slots, ready in host memory), why the last load of an id failed, and the generation of
        each id in the host tier, which is what peers read."""
        manager = self._loraserve_manager()
        active = _steady(lambda: {i for i in list(manager._adapter_manager._active_adapters) if i > 0})
        known = _steady(lambda: set(manager.list_adapters()) | set(getattr(manager, "_prepared", ())))
        is_prepared = getattr(manager, "is_prepared", known.__contains__)
        host = getattr(manager, "host", None)
        return (
            sorted(active),
            sorted(i for i in known - active if is_prepared(i)),
            dict(getattr(manager, "load_errors", {})),
            {entry.key: entry.generation for entry in host.entries()} if host is not None else {},
        )

    def loraserve_shapes(self) -> dict[str, list[tuple[int, int]]]:
        """The base model's modules and their sizes, see `lora_shapes`."""
        from vllm_loraserve.engine.lora_shapes import lora_shapes

        return lora_shapes(self._loraserve_manager()._adapter_manager)

    def loraserve_arena_rows(self) -> int | None:
        """Rank rows of this worker's arena; None where no module lies in pages."""
        arena = getattr(self._loraserve_manager()._adapter_manager, "arena", None)
        return arena.rank_rows if arena is not None and arena.layout.groups else None

    def loraserve_transfer_endpoint(self) -> str:
        """Where peers find this worker; empty where transfers are off."""
        peers = getattr(self._loraserve_manager(), "peers", None)
        return peers.endpoint if peers is not None else ""

    def loraserve_locate(self, rows: list[tuple[str, str, str, list[tuple[str, str]]]]) -> None:
        """Rows (name, path, digest, holders): what (name, path) was registered with, and which peers hold that.

        See `RegisteredContents.expect` and `PeerSources.locate_all`.
        """
        manager = self._loraserve_manager()
        loader, peers = getattr(manager, "loader", None), getattr(manager, "peers", None)
        if loader is not None:
            for name, path, digest, _ in rows:
                loader.registered.expect(name, path, digest)
        if peers is not None:
            peers.locate_all(rows)

    def loraserve_retain(self, adapters: list[str], instances: list[str]) -> None:
        """All adapters and instances that the cluster has; see `PeerSources.retain`."""
        peers = getattr(self._loraserve_manager(), "peers", None)
        if peers is not None:
            peers.retain(set(adapters), set(instances))


QUESTIONS = frozenset(name for name in vars(WorkerExtension) if name.startswith("loraserve_"))
"""What may be asked by name."""
