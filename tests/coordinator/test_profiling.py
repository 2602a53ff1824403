"""Profiling against an engine whose step cost is known: in virtual time, where the figures are exact, and by HTTP."""

import asyncio
import json
import re
import selectors
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import aiohttp
import msgspec
import numpy as np
import pytest
from aiohttp import web
from coordinator_bench import PATIENCE_S, FakeInstance, write_adapter
from safetensors.numpy import load_file

from vllm_loraserve.adapters.checkpoint import inspect_checkpoint
from vllm_loraserve.cluster import operating_points
from vllm_loraserve.cluster.fit import fit_step_cost
from vllm_loraserve.cluster.operating_points import StepCost
from vllm_loraserve.coordinator import profile, profiling
from vllm_loraserve.coordinator.messages import AddAdapter
from vllm_loraserve.coordinator.profiling import Profiler, ProfilingError, Workload, connector

BASE, PREFILL, DECODE_RANK, CONTEXT = 4e-3, 4e-5, 2e-5, 2e-6


class Engine:
    """Continuous batching with a step cost of BASE + PREFILL x prompt tokens + DECODE_RANK x sum of decode ranks +
    CONTEXT x tokens that decoding requests look back at."""

    def __init__(self) -> None:
        self.new: list[tuple[asyncio.Queue, int, int, int]] = []
        self.running: list[list] = []
        self.models: set[str] = set()
        self.key: str | None = None
        self.work = asyncio.Event()

    @staticmethod
    def rank(model: str) -> int:
        # At the end: what is before it may be a directory's random name.
        found = re.search(r"-r(\d+)-\d+$", model)
        return int(found[1]) if found else 0

    async def run(self) -> None:
        while True:
            if not self.new and not self.running:
                self.work.clear()
                await self.work.wait()
            new, self.new = self.new, []
            cost = BASE + PREFILL * sum(n[1] for n in new)
            cost += sum(DECODE_RANK * rank + CONTEXT * context for _, _, rank, context in self.running)
            await asyncio.sleep(cost)
            for r in list(self.running):
                r[0].put_nowait(True)
                r[1] -= 1
                r[3] += 1
                if r[1] == 0:
                    self.running.remove(r)
                    r[0].put_nowait(None)
            for queue, prompt, output, rank in new:
                queue.put_nowait(True)
                if output > 1:
                    self.running.append([queue, output - 1, rank, prompt + 1])
                else:
                    queue.put_nowait(None)

    async def events(self, body: dict) -> AsyncIterator[bytes]:
        self.models.add(body["model"])
        queue: asyncio.Queue = asyncio.Queue()
        self.new.append((queue, len(body["prompt"]), body["max_tokens"], self.rank(body["model"])))
        self.work.set()
        while await queue.get():
            yield b"data: " + json.dumps({"choices": [{"text": "x"}]}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = await request.json()
        if body["model"] == "missing":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for event in self.events(body):
            await response.write(event)
        return response


class Direct:
    """An engine in place of an HTTP session: no socket, so that nothing but the engine takes time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @asynccontextmanager
    async def post(self, url: str, json: dict) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(status=200, content=self.engine.events(json))


class VirtualTime(selectors.DefaultSelector):
    """Where an event loop would wait, its clock moves on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list:
        assert timeout is not None, "everybody waits for somebody else"
        self.now += timeout
        return super().select(0)


@pytest.fixture
def virtual(monkeypatch):
    """An event loop in virtual time, by which the profiler measures."""
    time = VirtualTime()
    loop = asyncio.SelectorEventLoop(time)
    loop.time = lambda: time.now
    monkeypatch.setattr(profiling, "time", SimpleNamespace(monotonic=loop.time))
    yield loop
    loop.close()


@pytest.fixture
async def engine():
    """(engine, URL)"""
    engine = Engine()
    app = web.Application()
    app.router.add_post("/v1/completions", engine.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    loop = asyncio.create_task(engine.run())
    yield engine, f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    loop.cancel()
    await runner.cleanup()


WORKLOAD = Workload(prompt_tokens=64, output_tokens=8, concurrency=8, trial_s=0.8, slo_ttft_s=0.2)


def test_points_fall_with_rank_and_the_fit_predicts_steps(virtual):
    async def measure():
        engine = Engine()
        steps = asyncio.create_task(engine.run())
        profiler = Profiler(Direct(engine), "http://engine", WORKLOAD)
        by_rank = {r: [f"p-r{r}-0", f"p-r{r}-1"] for r in (8, 128)}
        samples = await profiler.step_samples(by_rank, "base")
        mixed = samples[-1]
        assert (mixed.decode_tokens, mixed.decode_token_ranks) == (8, 2 * (8 + 8 + 128 + 128))
        assert (mixed.adapters, mixed.rank_rows) == (4, 2 * (8 + 128))
        fit = fit_step_cost(samples)
        points = [await profiler.operating_point(by_rank[r]) for r in (8, 128)]
        steps.cancel()
        return fit, points

    fit, ((low, _), (high, trials)) = virtual.run_until_complete(measure())
    assert fit.samples == 3 * 7 + 2 + 2, "the base model and two ranks, long contexts, then both ranks mixed"
    assert low > high > 0
    assert trials[-1].p95_ttft_s <= WORKLOAD.slo_ttft_s
    assert trials[-1].offered_rps < trials[0].offered_rps
    assert fit.cost.seconds(prefill_tokens=64) == pytest.approx(BASE + PREFILL * 64, rel=0.05)
    slow, fast = (
        fit.cost.seconds(decode_tokens=8, decode_token_ranks=8 * r, rank_rows=2 * r, adapters=2) for r in (128, 8)
    )
    assert slow - fast == pytest.approx(DECODE_RANK * 8 * 120, rel=0.05)
    assert fit.cost.context_token == pytest.approx(CONTEXT, rel=0.05), "what no prompt of one length tells"


async def test_an_slo_out_of_reach_and_a_failing_instance_are_named(engine):
    _, url = engine
    async with aiohttp.ClientSession() as session:
        hopeless = Profiler(session, url, Workload(prompt_tokens=8, output_tokens=2, trial_s=0.05, slo_ttft_s=1e-4))
        with pytest.raises(ProfilingError, match=r"over the SLO of 0\.0001 s"):
            await hopeless.operating_point(["p-r8-0"])
        with pytest.raises(ProfilingError, match="404 for 'missing'"):
            await hopeless.operating_point(["missing"])


@pytest.mark.parametrize(
    ("environment", "sent"),
    [
        ({}, {}),
        ({"VLLM_API_KEY": "a"}, {"Authorization": "Bearer a"}),
        ({"VLLM_API_KEY": "a", "LORASERVE_UPSTREAM_API_KEY": " b "}, {"Authorization": "Bearer b"}),
    ],
)
def test_the_instances_key_is_the_routers_or_vllms(environment, sent):
    assert profile._authorization(environment) == sent


async def test_an_instance_that_asks_for_a_key_is_named(engine):
    fake, url = engine
    fake.key = "of-the-instance"
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer another"}) as session:
        with pytest.raises(ProfilingError, match="asks for an API key; set LORASERVE_UPSTREAM_API_KEY"):
            await Profiler(session, url, WORKLOAD).first_token_s("p-r8-0", 8)


def test_made_adapters_have_the_modules_and_the_rank(tmp_path):
    like = write_adapter(tmp_path / "like", rank=4)
    made = profile.make_like(like, tmp_path / "made", 32)
    info = inspect_checkpoint(made)
    assert (info.rank, info.target_modules) == (32, ("q_proj", "v_proj"))
    weights = load_file(made / "adapter_model.safetensors")
    assert all(np.abs(w).max() < 1e-4 for k, w in weights.items() if "lora_B" in k)


def schedule_trace(path, start):
    """Steps of 10 ms and 1 ms a decode, and before `start` such that take ten times as long."""
    lines = []
    for begin, slow in ((start - 1000.0, 10.0), (start + 1.0, 1.0)):
        at = begin
        for i in range(100):
            decodes, prompt, rank, context = 1 + i % 5, 16 * (i % 4), 8 * (i % 3), 100 * (i % 7)
            lines.append(
                {"pid": 1, "t": at, "after_idle": i == 0,
                 "prefill_tokens": prompt, "prefill_token_ranks": prompt * rank,
                 "decode_tokens": decodes, "decode_token_ranks": decodes * rank, "rank_rows": rank,
                 "adapters": int(rank > 0), "context_tokens": context}
            )  # fmt: skip
            at += slow * (0.010 + 0.001 * decodes)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("traced", [False, True])
async def test_the_command_writes_a_file_the_coordinator_reads_and_cleans_up(
    engine, running, tmp_path, monkeypatch, traced
):
    fake, url = engine
    server, client = running
    fake.key = "of-the-instance"
    monkeypatch.setenv("LORASERVE_UPSTREAM_API_KEY", fake.key)
    write_adapter(tmp_path / "adapters" / "a")
    instance = FakeInstance("one")
    instance.url = url
    instance.capacity = msgspec.structs.replace(instance.capacity, dtype="bfloat16", kernels="rank-aware cpu")
    await client.request(instance.hello())
    await client.request(AddAdapter(name="a", source="a"))
    parser = profile.argparse.ArgumentParser()
    profile.add_arguments(parser)
    out, options = tmp_path / "op.json", []
    if traced:
        schedule_trace(tmp_path / "steps.jsonl", time.time())
        options = ["--steps", str(tmp_path / "steps.jsonl")]
    args = parser.parse_args(
        ["--coordinator", server.options.bind, "--ranks", "8,64", "--trial", "0.3", "--prompt-tokens", "32",
         "--output-tokens", "4", "--slo-ttft", "60", "--concurrency", "4",
         "--timeout", str(PATIENCE_S), "--out", str(out), *options]
    )  # fmt: skip

    async def live():
        while True:
            instance.obey((await client.request(instance.beat())).commands)
            await asyncio.sleep(0.1)

    beating = asyncio.create_task(live())
    assert await asyncio.to_thread(profile.run, args) == 0
    beating.cancel()
    points = operating_points.load(out)
    assert points.measured
    assert points.dtype == "bfloat16"
    assert points.kernels.startswith("rank-aware cpu (vllm-loraserve ")
    assert sorted(points.points) == [8, 64]
    assert points.step_cost is not None
    seconds = StepCost(base=0.010, decode_token=0.001).seconds(decode_tokens=3)
    assert (points.step_cost.seconds(decode_tokens=3) == pytest.approx(seconds, rel=0.01)) is traced
    assert "P95 TTFT 60 s" in points.slo
    assert [r.name for r in server.controller.registry.all()] == ["a"]
    assert [p.name for p in (tmp_path / "adapters").iterdir()] == ["a"]
    assert {m for m in fake.models if m != "toy"} == {m for m in fake.models if m.startswith("profile-")}


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "has no step of this run"), ("{}\n", "is no schedule trace"), ("x\n", "is no schedule trace")],
)
def test_a_trace_that_says_nothing_is_named(tmp_path, text, said):
    (tmp_path / "steps.jsonl").write_text(text)
    with pytest.raises(ProfilingError, match=f"steps.jsonl {said}"):
        profile._fit_of_steps(tmp_path / "steps.jsonl", time.time())


async def test_idle_connections_are_given_up_before_the_server_closes_them():
    """A stalled client would otherwise send its next request into a connection that is just going."""
    async with connector() as made:
        assert made._keepalive_timeout < 5.0, "uvicorn's"
        assert made.limit == 0, "a group of streams must not wait for connections"
