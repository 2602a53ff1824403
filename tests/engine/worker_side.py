"""The worker side of loading under a made-up manager, and what a scheduler's end of the channel says to it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any


class Manager:
    """A worker LoRA manager with `prepare`, over dictionaries."""

    def __init__(self, vllm_config: Any) -> None:
        self.held: set[int] = set()
        self.active: set[int] = set()
        self.kept: set[int] = set()
        """What the scheduler holds."""
        self.prepared: list[int] = []
        self.error: Exception | None = None
        self._adapter_manager = SimpleNamespace()

    def create_lora_manager(self, *_: Any) -> str:
        return "model"

    def prepare(self, request: Any) -> int:
        self.prepared.append(request.lora_int_id)
        if self.error is not None:
            raise self.error
        self.held.add(request.lora_int_id)
        return 16

    def is_prepared(self, adapter: int) -> bool:
        return adapter in self.held

    def hold(self, adapter: int, held: bool = True) -> None:
        (self.kept.add if held else self.kept.discard)(adapter)

    def set_active_adapters(self, requests: Any) -> None:
        for request in requests:
            self.add_adapter(request)

    def add_adapter(self, request: Any) -> bool:
        if request.lora_int_id not in self.held:
            self.prepare(request)
        self.active.add(request.lora_int_id)
        return True

    def remove_adapter(self, adapter: int) -> bool:
        self.held.discard(adapter)
        return True

    def pin_adapter(self, adapter: int) -> bool:
        return adapter in self.held

    unpin_adapter = pin_adapter

    def list_adapters(self) -> set[int]:
        return set(self.active)


def next_reports(end: Any, count: int) -> list[Any]:
    deadline = time.monotonic() + 120
    reports: list[Any] = []
    while len(reports) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)
        reports += end.reports()
    return reports


def next_report(end: Any) -> Any:
    (report,) = next_reports(end, 1)
    return report


def order(end: Any, adapter: int, attempt: int = 1) -> None:
    import msgspec
    from vllm.lora.request import LoRARequest

    from vllm_loraserve.engine import channel

    request = LoRARequest(f"a{adapter}", adapter, f"/adapters/{adapter}")
    end.send(channel.Prepare(adapter, attempt, msgspec.msgpack.encode(request)))
