"""Adapters on their way out: no routes any more, running requests finish, instances release, then all is forgotten.

What is being removed is `draining` in the registry, so that a restart goes on with it. Times are seconds of the
monotonic clock that the caller passes in.
"""

from __future__ import annotations

import asyncio
import logging
import math

import msgspec

from vllm_loraserve.coordinator.commands import CommandBook
from vllm_loraserve.coordinator.membership import Membership
from vllm_loraserve.coordinator.registry import Registry, RegistryError

logger = logging.getLogger(__name__)

RESUMED_DRAIN_S = 30.0
"""A drain that a restart interrupted ends when no instance reports a running request any more, or so long after."""
HEARD_S = 0.5
"""Reports from before routers heard of a removal say nothing about requests still on their way."""
RELEASE_PATIENCE_S = 10.0
"""A removal waits so long, after its drain, for instances to confirm the release."""
WRITE_AGAIN_S = 2.0
"""Before a removal that the registry could not write is tried again."""


class _Drain(msgspec.Struct):
    started: float
    deadline: float
    releasing: bool = False
    retry_at: float = -math.inf
    """Not before that, as the registry could not be written."""
    done: asyncio.Event = msgspec.field(default_factory=asyncio.Event)


class Removals:
    """Removals under way; those that the registry has from before a restart go on."""

    def __init__(self, registry: Registry, members: Membership, commands: CommandBook, now: float) -> None:
        self._registry, self._members, self._commands = registry, members, commands
        self._drains = {
            record.name: _Drain(now, now + RESUMED_DRAIN_S) for record in registry.all() if record.state == "draining"
        }

    def begin(self, name: str, drain_s: float, now: float) -> tuple[asyncio.Event, bool]:
        """(set when a registered adapter is gone, whether this has begun it and no other call before). A second call
        can only shorten the drain. RegistryError: it can't be written, and has not begun."""
        drain = self._drains.get(name)
        if drain is not None:
            drain.deadline = min(drain.deadline, now + drain_s)
            return drain.done, False
        self._registry.update(name, state="draining")
        drain = self._drains[name] = _Drain(now, now + drain_s)
        logger.info("Adapter '%s' draining, %d requests running", name, self._members.running(name))
        return drain.done, True

    def step(self, now: float, *, settled: bool) -> list[str]:
        """Takes every removal as far as it goes now; those that are gone. `settled`: all members of before a restart
        are back or given up, so that no running request is one that nobody reports."""
        gone = []
        for name, drain in list(self._drains.items()):
            if not drain.releasing and not self._release(name, drain, now, settled):
                continue
            waiting = any(command.adapter.name == name for _, command in self._commands.pending())
            if (waiting and now < drain.deadline) or now < drain.retry_at:
                continue
            try:
                self._registry.remove(name)
            except RegistryError as error:
                drain.retry_at = now + WRITE_AGAIN_S
                logger.error("Adapter '%s' is not removed yet: %s", name, error)
                continue
            self._commands.forget_adapter(name)
            del self._drains[name]
            drain.done.set()
            gone.append(name)
            logger.info("Adapter '%s' removed", name)
        return gone

    def _release(self, name: str, drain: _Drain, now: float, settled: bool) -> bool:
        """Tells every instance to release an adapter of which nothing runs any more, or whose time is over."""
        reported = all(member.seen > drain.started + HEARD_S for member in self._members.all())
        if now < drain.deadline and not (settled and reported and self._members.running(name) == 0):
            return False
        record = self._registry.get(name)
        assert record is not None
        drain.releasing = True
        drain.deadline = now + RELEASE_PATIENCE_S
        for member in self._members.all():
            self._commands.tell(member.name, "release", record, now)
        return True
