"""What is counted at the engine client."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


from fake_engine import FakeEngine  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: E402

from vllm_loraserve.engine.meter import LoadLogger, Meter  # noqa: E402


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
async def test_meter_counts_prompt_and_generated_tokens_once(kind):
    clock, engine = Clock(), FakeEngine()
    engine.gate.set()
    meter = Meter(clock)
    detach = meter.attach(engine)
    async for _ in engine.generate("p", SamplingParams(output_kind=kind), "r", lora_request=None):
        assert meter.running("") == 1
    clock.now = 4.0
    (base,) = meter.demand()
    assert (base.name, base.tokens_per_s, base.requests_per_s, base.running) == ("", 2.0, 0.25, 0)
    for clock.now in (10.0, 15.0):
        demand = meter.demand()
    assert demand == (), "out of the window"
    detach()
    assert engine.generate.__func__ is FakeEngine.generate


def test_without_statistics_everything_in_flight_is_running():
    meter = Meter()
    assert LoadLogger().load(meter, ()).running == 0


async def test_meter_counts_pooling_requests_too():
    class Pooling(FakeEngine):
        async def encode(self, prompt, pooling_params, request_id, lora_request=None):
            yield SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=SimpleNamespace(data=[0.5]))

    clock, engine = Clock(), Pooling()
    meter = Meter(clock)
    detach = meter.attach(engine)
    lora = SimpleNamespace(lora_name="one", lora_int_id=7)
    async for _ in engine.encode("p", None, "r", lora_request=lora):
        assert (meter.running("one"), meter.running_id(7)) == (1, 1)
    assert (meter.running("one"), meter.running_id(7)) == (0, 0)
    clock.now = 1.0
    (demand,) = meter.demand()
    assert (demand.name, demand.tokens) == ("one", 3)
    detach()
    assert engine.encode.__func__ is Pooling.encode


async def test_meter_counts_pooling_requests_and_that_their_adapter_is_in_use():
    engine, meter = FakeEngine(), Meter()
    undo = meter.attach(engine)
    lora = LoRARequest("e", 7, "/adapters/e")
    stream = engine.encode(prompt="p", pooling_params=None, request_id="r", lora_request=lora)
    output = await anext(stream)
    assert output.outputs.data == [0.5]
    assert (meter.running_id(7), meter.running("e")) == (1, 1), "it must not be unloaded now"
    await stream.aclose()
    assert not engine.encoding
    assert meter.running_id(7) == 0
    async for _ in engine.encode("p", None, "r2", lora):
        pass
    (demand,) = meter.demand()
    assert (demand.name, demand.tokens, meter.requests()) == ("e", 6, 2)
    undo()
    assert engine.encode.__func__ is FakeEngine.encode
