"""What instances were told to do and have not yet answered; a command is repeated in every reply until it is."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from typing import Literal

import msgspec

from vllm_loraserve.coordinator.messages import AdapterRecord, Command, CommandResult

logger = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_MAX_S = 5.0, 300.0
"""Pause after a failed command before the same is told again; doubles up to the largest."""


class Pending(msgspec.Struct):
    """A command that was not answered yet."""

    command: Command
    since: float


class Failure(msgspec.Struct):
    """The last failed attempt at something, and when it may be tried again."""

    error: str
    pause_s: float
    retry_at: float
    action: str


class CommandBook:
    """Pending commands and recent failures, by instance and adapter: at most one each."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._pending: dict[str, dict[str, Pending]] = {}
        self._failures: dict[tuple[str, str], Failure] = {}

    def tell(
        self,
        instance: str,
        action: Literal["prefetch", "release"],
        adapter: AdapterRecord,
        now: float,
        *,
        superseded: bool = False,
    ) -> bool:
        """Wants `action` done; False if that is pending or has just failed. The opposite command is replaced.

        `superseded`: see Command.
        """
        pending = self._pending.get(instance, {}).get(adapter.name)
        if pending is not None:
            told = pending.command
            if told.action == action and told.adapter.sha256 == adapter.sha256:
                return False
        failure = self._failures.get((instance, adapter.name))
        if action == "prefetch" and failure is not None and now < failure.retry_at:
            return False
        command = Command(id=next(self._ids), action=action, adapter=adapter, superseded=superseded)
        self._pending.setdefault(instance, {})[adapter.name] = Pending(command, now)
        return True

    def cancel(self, instance: str, adapter: str) -> None:
        """Takes back a command (it may have been carried out already)."""
        self._pending.get(instance, {}).pop(adapter, None)

    def answered(self, instance: str, results: Iterable[CommandResult], now: float) -> None:
        """Takes an instance's answers; one to a command that is no longer wanted counts for nothing."""
        mine = self._pending.get(instance, {})
        adapters = {p.command.id: name for name, p in mine.items()}
        for result in results:
            adapter = adapters.get(result.id)
            if adapter is None:
                continue
            command = mine.pop(adapter).command
            key = (instance, adapter)
            if result.ok:
                self._failures.pop(key, None)
                continue
            before = self._failures.get(key)
            pause = RETRY_FIRST_S if before is None else min(2 * before.pause_s, RETRY_MAX_S)
            self._failures[key] = Failure(result.error, pause, now + pause, command.action)
            told = (instance, command.action, adapter, result.error, pause)
            logger.warning("%s could not %s '%s': %s (again in %.0f s)", *told)

    def of(self, instance: str) -> tuple[Command, ...]:
        """What to tell an instance now."""
        return tuple(p.command for p in self._pending.get(instance, {}).values())

    def pending(self) -> tuple[tuple[str, Command], ...]:
        """Everything unanswered: (instance, command)."""
        return tuple((name, p.command) for name, told in self._pending.items() for p in told.values())

    def busy(self, instance: str, adapter: str) -> bool:
        """Whether the instance has not answered a command about the adapter."""
        return adapter in self._pending.get(instance, {})

    def waiting_since(self, instance: str, adapter: str, action: str) -> float | None:
        """When the pending command was first told, or None."""
        pending = self._pending.get(instance, {}).get(adapter)
        return pending.since if pending is not None and pending.command.action == action else None

    def failure(self, instance: str, adapter: str) -> Failure | None:
        """The failure that still counts."""
        return self._failures.get((instance, adapter))

    def failures(self) -> dict[tuple[str, str], Failure]:
        """All failures that still count, by (instance, adapter)."""
        return dict(self._failures)

    def forget_instance(self, instance: str) -> None:
        """Its membership ended, or it is a new process."""
        self._pending.pop(instance, None)
        for key in [k for k in self._failures if k[0] == instance]:
            del self._failures[key]

    def forget_adapter(self, adapter: str) -> None:
        """It is gone from the registry."""
        for told in self._pending.values():
            told.pop(adapter, None)
        for key in [k for k in self._failures if k[1] == adapter]:
            del self._failures[key]
