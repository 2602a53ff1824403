"""The end of an instance: the coordinator hears of it first, and who waits for its engine gets a 503."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutput, FinishReason

from vllm_loraserve.engine import request_errors, stopping

pytestmark = pytest.mark.vllm


class Outputs:
    """An output processor with the requests that still wait."""

    def __init__(self) -> None:
        self.raised: list[BaseException] = []

    def propagate_error(self, error: BaseException) -> None:
        self.raised.append(error)


class Client:
    """An engine client whose shutdown is written down."""

    def __init__(self, order: list[str]) -> None:
        self.output_processor = Outputs()
        self.order = order

    def stop(self, timeout: float | None = None) -> None:
        self.order.append(f"stopped {timeout}")

    shutdown = stopping.wrap_shutdown(stop)


async def test_the_coordinator_is_told_before_the_engine_stops() -> None:
    order: list[str] = []
    client = Client(order)

    async def tell() -> None:
        order.append("told")
        await asyncio.sleep(0.01)
        order.append("heard")

    with stopping.told_first(client, tell):
        # As vLLM does it: from a thread, while the loop goes on serving.
        await asyncio.to_thread(client.shutdown, timeout=7)
        assert client.output_processor.raised == []
    assert order == ["told", "heard", "stopped 7"]
    (error,) = client.output_processor.raised
    assert isinstance(error, GracefulHTTPError)
    assert error.http_status == 503
    await asyncio.to_thread(client.shutdown)
    assert order[3:] == ["stopped None"], "nobody is to be told any more"


async def test_an_engine_stops_though_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    client = Client(order)

    async def fail() -> None:
        raise RuntimeError("no coordinator")

    async def hang() -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(stopping, "TELL_S", 0.05)
    for tell in (fail, hang):
        with stopping.told_first(client, tell):
            await asyncio.to_thread(client.shutdown)
    with stopping.told_first(client, hang):
        client.shutdown()  # in the loop's own thread, which can't wait for the loop
    assert order == 3 * ["stopped None"]


@pytest.mark.parametrize("stops", [False, True])
def test_what_an_engine_gives_up_when_it_stops_is_no_answer(stops: bool) -> None:
    class Processor:
        def __init__(self) -> None:
            self.queues = {name: SimpleNamespace(output=None, ready=asyncio.Event()) for name in ("given up", "done")}
            self.request_states = {name: SimpleNamespace(queue=queue) for name, queue in self.queues.items()}

        def process_outputs(self, outputs: Any) -> Any:
            for output in outputs:
                self.queues[output.request_id].output = output
            return SimpleNamespace(request_outputs=[])

    processor = Processor()
    if stops:
        request_errors.stopping.add(processor)
    outputs = [
        EngineCoreOutput("given up", [], finish_reason=FinishReason.ABORT),
        EngineCoreOutput("done", [7], finish_reason=FinishReason.STOP),
    ]
    request_errors.wrap_process_outputs(Processor.process_outputs)(processor, outputs)
    assert processor.queues["done"].output is outputs[1]
    ended = processor.queues["given up"].output
    if stops:
        assert isinstance(ended, GracefulHTTPError)
        assert ended.http_status == 503
    else:
        assert ended is outputs[0], "a pause of the engine, or a client that left"
