"""What this instance's engine holds of the registry's adapters, as its workers say: `Holdings`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from vllm_loraserve.coordinator.messages import Residency
from vllm_loraserve.engine.resolver import LoRAServeResolver
from vllm_loraserve.engine.worker_desk import Workers


class Inside(NamedTuple):
    """Ids that every worker holds in slots, ids that it has in host memory, why others could not be loaded, and for
    those in the host tier of every worker the sum of their generations: it rises with each change on any."""

    arena: set[int]
    host: set[int]
    errors: dict[int, str]
    generations: dict[int, int]

    def __contains__(self, lora_id: object) -> bool:
        return lora_id in self.arena or lora_id in self.host


class Holdings:
    """Asks the engine; its questions raise what the engine raises, and last as long as its step.

    `extended`: the workers can be asked what `worker_extension.py` answers; else only vLLM's own list is known.
    `models`: vLLM's OpenAIServingModels.
    """

    def __init__(
        self, engine_client: Any, workers: Workers, models: Any, resolver: LoRAServeResolver, *, extended: bool
    ) -> None:
        self.extended = extended
        self._engine = engine_client
        self._workers = workers
        self._models = models
        self._resolver = resolver

    async def inside(self) -> Inside:
        """Of any adapters, by id."""
        if not self.extended:
            return Inside(set(await self._engine.list_loras()), set(), {}, {})
        answers = await self._workers.ask("loraserve_residency")
        arena = set.intersection(*(set(a) for a, _, _, _ in answers))
        held = set.intersection(*(set(a) | set(h) for a, h, _, _ in answers))
        # Keys of a map may arrive as text.
        errors = {int(i): text for _, _, failed, _ in answers for i, text in failed.items()}
        counts = [{int(i): n for i, n in generations.items()} for _, _, _, generations in answers]
        generations = {i: sum(c[i] for c in counts) for i in set.intersection(*(set(c) for c in counts))}
        return Inside(arena, held - arena, errors, generations)

    async def residency(self) -> tuple[Residency, ...]:
        """What the engine holds of the registry's adapters."""
        inside = await self.inside()
        out = []
        for name, request in list(self._models.lora_requests.items()):
            digest, number = self._resolver.digest_of(request), request.lora_int_id
            if digest is not None and number in inside:
                tier: Literal["arena", "host"] = "arena" if number in inside.arena else "host"
                generation = inside.generations.get(number, 0)
                out.append(Residency(name=name, sha256=digest, tier=tier, generation=generation))
        return tuple(out)
