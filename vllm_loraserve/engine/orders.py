"""Carries out what the coordinator orders of this instance: `Orders`.

prefetch: the engine loads the adapter and vLLM's server serves its name, before any request asks for it
release:  the name is no longer served; when its last running request is done, the engine forgets the adapter
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from vllm.lora.request import LoRARequest

from vllm_loraserve.coordinator.messages import AdapterRecord, Location
from vllm_loraserve.engine.holdings import Holdings
from vllm_loraserve.engine.locator import Locator
from vllm_loraserve.engine.meter import Meter
from vllm_loraserve.engine.resolver import LoRAServeResolver

logger = logging.getLogger("vllm.loraserve.agent")

DRAIN_POLL_S = 0.1
LINGER_S = 2.0
"""Replaced content stays in the engine until no request has used it for so long."""
LOAD_GRACE_S = 5.0
"""Added to `load_timeout_s`: a prefetch that is not in the engine by then has failed; a request for the adapter tells
why."""


class Orders:
    """`models`: vLLM's OpenAIServingModels. `locator`: None where the workers can't be told who holds an adapter.
    `load_timeout_s`: that of the engine's own loads. `on_change`: called when the engine has forgotten an adapter."""

    def __init__(
        self,
        engine_client: Any,
        models: Any,
        resolver: LoRAServeResolver,
        meter: Meter,
        holdings: Holdings,
        locator: Locator | None,
        load_timeout_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.engine = engine_client
        self.models = models
        self.resolver = resolver
        self.meter = meter
        self.tasks: set[asyncio.Task[None]] = set()
        """Removals that are under way; whoever ends the instance's membership cancels them."""
        self._holdings = holdings
        self._locator = locator
        self._on_change = on_change
        self._patience_s = load_timeout_s + LOAD_GRACE_S
        self._withdrawn: set[int] = set()
        """Numbers of requests that had a name and lost it; none is given twice."""
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def prefetch(self, record: AdapterRecord, locations: Sequence[Location] = ()) -> None:
        """Loads this content under the adapter's name; raises what the engine raises.

        Other content that has the name serves it until this one is there, or can't be loaded. Prefetches of one name
        take turns; one whose content is no longer what the name stands for, or whose adapter is being removed, ends.
        """
        self.resolver.learn(record)
        async with self._turns[record.name]:
            if self._wanted(record):
                await self._prefetch(record, locations)

    async def _prefetch(self, record: AdapterRecord, locations: Sequence[Location]) -> None:
        replaced: LoRARequest | None = None
        async with self.models.lora_resolver_lock[record.name]:
            request = self.models.lora_requests.get(record.name)
            if request is not None and self.resolver.digest_of(request) != record.sha256:
                if self.resolver.digest_of(request) is None:
                    raise ValueError(f"'{record.name}' was loaded here from outside the registry; unload it.")
                replaced, request = request, None
            if request is None:
                request = self.resolver.request_for(record, self.models.lora_id_counter.inc(1))
            if request.lora_int_id not in await self._holdings.inside():
                if self._locator is not None:
                    await self._locator.locate(request, locations)
                try:
                    await self.engine.add_lora(request)
                except Exception:
                    if replaced is not None:
                        self._unserve(record.name, replaced, LINGER_S)
                    raise
            if replaced is None:
                self.models.lora_requests[record.name] = request
        # Outside of the lock: an engine that loads aside has answered before the adapter is there, and requests that
        # name it meanwhile wait for it there, or are told why it can't be loaded.
        serving = replaced or request
        try:
            held = await self._held(record, request)
            if not held and not self._is_over(record, request):
                raise TimeoutError(f"The engine has not loaded '{record.name}' within {self._patience_s:g} s.")
        except (RuntimeError, TimeoutError):
            if self.models.lora_requests.get(record.name) is serving:
                self._unserve(record.name, serving, LINGER_S if replaced is not None else 0.0)
            if replaced is not None:
                await self.engine.remove_lora(request.lora_int_id)
            raise
        if replaced is not None:
            # By identity: vLLM's requests of one name are equal.
            present = self.models.lora_requests.get(record.name)
            if not self._wanted(record) or not (present is None or present is replaced):
                await self.engine.remove_lora(request.lora_int_id)
                return
            if present is not None:
                self._unserve(record.name, replaced, LINGER_S)
            self.models.lora_requests[record.name] = request
        if held:
            logger.info("Prefetched adapter '%s' (rank %d) from '%s'", record.name, record.rank, record.source)

    def _wanted(self, record: AdapterRecord) -> bool:
        """Whether the name still stands for this content, by what was last heard."""
        known = self.resolver.known(record.name)
        return known is not None and known.sha256 == record.sha256

    def _is_over(self, record: AdapterRecord, request: LoRARequest) -> bool:
        """Whether nobody waits for the load any more: other content has the name, or this request lost it."""
        return not self._wanted(record) or request.lora_int_id in self._withdrawn

    async def _held(self, record: AdapterRecord, request: LoRARequest) -> bool:
        """Waits until the engine holds the adapter; False when it has not come in time, or is no longer wanted.

        Raises RuntimeError with the reason where the engine says that it can't be loaded.
        """
        end, pause = time.monotonic() + self._patience_s, 0.05
        while True:
            inside = await self._holdings.inside()
            if request.lora_int_id in inside:
                return True
            if request.lora_int_id in inside.errors:
                raise RuntimeError(inside.errors[request.lora_int_id])
            if time.monotonic() > end or self._is_over(record, request):
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    async def release(self, record: AdapterRecord, *, superseded: bool = False) -> None:
        """Stops serving the adapter's name, waits for its running requests, and lets the engine forget it.

        `superseded`: returns without that wait; the engine forgets it later. Otherwise, where other content is about to
        give way to this one, that goes too. vLLM's own unloading removes the name only; the engine would keep the
        weights.
        """
        last = self._wanted(record) and not superseded
        if last:
            self.resolver.forget(record.name)
        async with self.models.lora_resolver_lock[record.name]:
            present = self.models.lora_requests.get(record.name)
            digest = self.resolver.digest_of(present) if present is not None else None
            if present is None or digest is None or (digest != record.sha256 and not last):
                return
            removal = self._unserve(record.name, present, LINGER_S if superseded else 0.0)
        if not superseded:
            await removal
        logger.info("Released adapter '%s'", record.name)

    def _unserve(self, name: str, request: LoRARequest, linger_s: float = 0.0) -> asyncio.Task[None]:
        """No new request gets `request` from now on; the task returned ends when the engine has forgotten it.

        `linger_s`: it must have been idle for so long. Requests that took it a moment ago are not counted yet, and
        where routes were not taken away first there may be some.
        """
        del self.models.lora_requests[name]
        self._withdrawn.add(request.lora_int_id)

        async def remove() -> None:
            # An adapter removed under a running request would be loaded again by that request's next step.
            idle_since = time.monotonic()
            while (runs := self.meter.running_id(request.lora_int_id)) or time.monotonic() - idle_since < linger_s:
                if runs:
                    idle_since = time.monotonic()
                await asyncio.sleep(DRAIN_POLL_S)
            await self.engine.remove_lora(request.lora_int_id)
            self._on_change()

        task = asyncio.create_task(remove())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task
