"""What a worker's adapter memory holds, as metrics: is it large enough for the adapters that are asked for?"""

from __future__ import annotations

from typing import Any

from vllm_loraserve.engine.channel import Family

FIGURES = (
    ("resident_adapters", "Adapters that a worker holds.", "gauge"),
    ("memory_used_bytes", "Bytes that they take.", "gauge"),
    ("memory_size_bytes", "Bytes that there are for adapters.", "gauge"),
    ("evictions", "Adapters that had to leave for others.", "counter"),
)


class MemoryMetrics:
    """Figures of one worker's arena and host tier, by tier and worker; `manager`: its PagedLoRAModelManager.

    Workers of one engine hold the same adapters, each its shard: over workers only bytes may be summed.
    """

    def __init__(self, worker: int, manager: Any) -> None:
        self._worker, self._manager = str(worker), manager

    def metrics(self) -> list[Family]:
        """The figures of this moment. Thread-safe."""
        manager = self._manager
        arena, host = manager.arena, manager.host
        free = sum(pages * arena.layout.page_bytes(group) for group, pages in enumerate(arena.free_pages()))
        tiers = {
            "arena": (len(manager.residents), arena.nbytes - free, arena.nbytes, manager.arena_evictions),
            "host": (len(host), host.capacity_bytes - host.free_bytes, host.capacity_bytes, host.evictions),
        }
        return [
            Family(
                f"loraserve:{name}",
                text,
                kind,
                [
                    (
                        f"loraserve:{name}" + ("_total" if kind == "counter" else ""),
                        {"tier": tier, "worker": self._worker},
                        float(values[index]),
                    )
                    for tier, values in tiers.items()
                ],
            )
            for index, (name, text, kind) in enumerate(FIGURES)
        ]
