"""What the router adds: latency at 100 requests/s, requests/s on one core, and whether streamed tokens stay apart.

Three processes beside this one: stub instances that answer at once (`--role stub`), the router, and an open-loop load
generator (`--role load`), whose requests start at their scheduled times whether or not earlier ones have been answered
and whose latencies count from then. The router has one CPU to itself, the other two share another one. Direct and
routed blocks alternate; the figures are differences of percentiles over all blocks. All of it is done with a router of
two instances, which lists their adapters, and again (`table_...`) with one that takes a coordinator's table of
thousands of adapters every second (`published_table.py`), requests for all of them mixed.

    python benchmarks/router_overhead.py --json benchmarks/results/router_overhead.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

try:
    import uvloop

    new_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
except ImportError:
    new_loop = asyncio.new_event_loop

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = 100
TOKEN_GAP_S = 0.05
CONNECTIONS = 256


# ---- the stub instances ----


class StubConnection(asyncio.Protocol):
    """Enough HTTP/1.1 to answer the router and the load generator: POSTs with a Content-Length, GET /v1/models."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end]).lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = bytes(self.buffer[end + 4 : end + 4 + length])
            del self.buffer[: end + 4 + length]
            if head.startswith(b"get"):
                self.reply(MODELS)
            elif b'"stream": true' in body:
                asyncio.get_running_loop().create_task(self.stream(json.loads(body)["max_tokens"]))
            else:
                self.reply(ANSWER)

    def reply(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)  # type: ignore[attr-defined]

    async def stream(self, tokens: int) -> None:
        write = self.transport.write  # type: ignore[attr-defined]
        write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        start = asyncio.get_running_loop().time()
        for n in range(tokens):
            event = b'data: {"id":"cmpl-1","object":"text_completion","choices":[{"text":" t%d"}]}\n\n' % n
            write(b"%x\r\n%s\r\n" % (len(event), event))
            await asyncio.sleep(start + (n + 1) * TOKEN_GAP_S - asyncio.get_running_loop().time())
        write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


ANSWER = json.dumps(
    {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 0,
        "model": "base",
        "choices": [{"index": 0, "text": " answer" * 40, "finish_reason": "length", "logprobs": None}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 40, "total_tokens": 140},
    }
).encode()
MODELS = json.dumps(
    {"data": [{"id": "base"}] + [{"id": f"adapter-{i}", "parent": "base", "rank": 16} for i in range(ADAPTERS)]}
).encode()


async def stub(count: int) -> None:
    """`count` stub instances in one process; prints their ports."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(StubConnection, "127.0.0.1", 0, backlog=1024) for _ in range(count)]
    print(json.dumps([s.sockets[0].getsockname()[1] for s in servers]), flush=True)
    await asyncio.Event().wait()


# ---- the load generator ----


class LoadConnection(asyncio.Protocol):
    """One connection with at most one request on it."""

    def __init__(self, idle: deque[LoadConnection]) -> None:
        self.idle = idle
        self.buffer = bytearray()
        self.done: Callable[[int], None] | None = None
        self.chunks: list[tuple[float, int]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, request: bytes, done: Callable[[int], None], chunks: list[tuple[float, int]] | None = None) -> None:
        self.done, self.chunks = done, chunks
        self.transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        if self.chunks is not None and (events := data.count(b"data: {")):
            self.chunks.append((time.perf_counter(), events))
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end]).lower()
        if b"chunked" in head:
            if not self.buffer.endswith(b"\r\n0\r\n\r\n"):
                return
        else:
            at = head.find(b"content-length:")
            if len(self.buffer) < end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0]):
                return
        status = int(head[9:12])
        self.buffer.clear()
        done, self.done = self.done, None
        self.idle.append(self)
        if done is not None:
            done(status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self.idle:
            self.idle.remove(self)
        if self.done is not None:
            self.done(599)


def request_bytes(model: str, stream_tokens: int = 0) -> bytes:
    body = {"model": model, "prompt": "word " * 100, "max_tokens": stream_tokens or 40, "stream": stream_tokens > 0}
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


class Load:
    """Requests to one port over keep-alive connections."""

    def __init__(self, port: int, adapters: int) -> None:
        self.port = port
        self.idle: deque[LoadConnection] = deque()
        self.requests = [request_bytes("base")] + [request_bytes(f"adapter-{i}") for i in range(adapters)]

    async def connect(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        while len(self.idle) < count:
            _, connection = await loop.create_connection(lambda: LoadConnection(self.idle), "127.0.0.1", self.port)
            self.idle.append(connection)

    async def open_loop(self, rate: float, seconds: float, seed: int) -> dict[str, object]:
        """Poisson arrivals; latencies in ms from the scheduled start, sorted."""
        rng = random.Random(seed)
        latencies: list[float] = []
        bad = 0
        outstanding = 0
        finished = asyncio.Event()
        behind: deque[tuple[bytes, Callable[[int], None]]] = deque()
        begin = due = time.perf_counter() + 0.05
        end = begin + seconds
        sent = 0
        last = begin

        def sender(scheduled: float) -> Callable[[int], None]:
            def done(status: int) -> None:
                nonlocal bad, outstanding, last
                last = time.perf_counter()
                latencies.append((last - scheduled) * 1e3)
                bad += status != 200
                outstanding -= 1
                if behind:
                    send(*behind.popleft())
                elif outstanding == 0:
                    finished.set()

            return done

        def send(request: bytes, done: Callable[[int], None]) -> None:
            if self.idle:
                self.idle.popleft().send(request, done)
            else:
                behind.append((request, done))  # all connections are busy; its time counts all the same

        while due < end:
            pause = due - time.perf_counter()
            if pause > 0:
                # A timer is late by up to a millisecond. At low rates the last stretch is spun through instead; at high
                # ones that would take the CPU from the stub, and what is due by then goes out together.
                await asyncio.sleep(pause if rate > 200 else pause - 0.001 if pause > 0.002 else 0)
                continue
            outstanding += 1
            finished.clear()
            send(rng.choice(self.requests), sender(due))
            sent += 1
            due += rng.expovariate(rate)
        if outstanding:
            await asyncio.wait_for(finished.wait(), 30)
        return {"latencies_ms": sorted(latencies), "bad": bad, "achieved_rps": sent / (max(last, end) - begin)}

    async def closed_loop(self, concurrency: int, seconds: float, seed: int) -> dict[str, object]:
        """`concurrency` clients that each wait for their answer: requests/s."""
        rng = random.Random(seed)
        end = time.perf_counter() + seconds
        count = bad = 0
        await self.connect(concurrency)

        async def client() -> None:
            nonlocal count, bad
            connection = self.idle.popleft()
            while time.perf_counter() < end:
                answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
                connection.send(rng.choice(self.requests), answered.set_result)
                bad += await answered != 200
                self.idle.remove(connection)
                count += 1
            self.idle.append(connection)

        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return {"rps": count / (time.perf_counter() - begin), "bad": bad}

    async def streams(self, count: int, tokens: int) -> dict[str, object]:
        """`count` streams at once: the gaps between arrivals and how many events came joined to another."""
        await self.connect(count)
        records: list[list[tuple[float, int]]] = [[] for _ in range(count)]
        answers: list[asyncio.Future[int]] = []
        request = request_bytes("adapter-1", tokens)
        for chunks in records:
            answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self.idle.popleft().send(request, answered.set_result, chunks)
            answers.append(answered)
            await asyncio.sleep(TOKEN_GAP_S / count)
        bad = sum(status != 200 for status in await asyncio.gather(*answers))
        gaps = [(b[0] - a[0]) * 1e3 for r in records for a, b in itertools.pairwise(r)]
        events = sum(n for r in records for _, n in r)
        joined = sum(n for r in records for _, n in r if n > 1)
        return {"gaps_ms": sorted(gaps), "events": events, "joined": joined, "bad": bad}


async def load() -> None:
    """Obeys commands on stdin, one JSON object a line: [port, number of adapters, method, arguments...]."""
    loads: dict[tuple[int, int], Load] = {}
    for line in iter(sys.stdin.readline, ""):
        port, adapters, method, *arguments = json.loads(line)
        if (port, adapters) not in loads:
            loads[port, adapters] = Load(port, adapters)
        target = loads[port, adapters]
        await target.connect(CONNECTIONS if method == "open_loop" and arguments[0] > 200 else 32)
        print(json.dumps(await getattr(target, method)(*arguments)), flush=True)
        # Nothing reads while this process waits for a command; stale connections would fail the next one.
        for connection in list(target.idle):
            connection.transport.close()  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        target.idle.clear()


# ---- the measurement ----


def percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def cpu_s(pid: int) -> float:
    """CPU seconds a process has used (Linux; 0 elsewhere)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spawn(arguments: list[str], cpu: int | None, **options: object) -> subprocess.Popen[str]:
    def pin() -> None:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})

    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, *arguments],
        text=True,
        env=environment,
        preexec_fn=pin,
        **options,  # type: ignore[call-overload]
    )


class Target(NamedTuple):
    """A port to send requests to, and for how many adapters."""

    port: int
    adapters: int
    pid: int = 0


class Machine:
    """The processes of a measurement: stubs and load generator, and the router that is measured now."""

    def __init__(self) -> None:
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.router_cpu, self.other_cpu = (cpus[0], cpus[1]) if len(cpus) > 1 else (None, None)
        self.children: list[subprocess.Popen[str]] = []
        stubs = json.loads(self.start_other([__file__, "--role", "stub"]).readline())
        self.stub: int = stubs[0]
        self.urls = [f"http://127.0.0.1:{port}" for port in stubs]
        self.answers = self.start_other([__file__, "--role", "load"])
        self.generator = self.children[-1]

    def start_other(self, arguments: list[str]) -> IO[str]:
        """A process beside the router; what it prints."""
        child = spawn(arguments, self.other_cpu, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.children.append(child)
        assert child.stdout is not None
        return child.stdout

    def start_router(self, *arguments: str, adapters: int) -> Target:
        command = ["-m", "vllm_loraserve.cli", "router", "--port", "0", *arguments]
        router = spawn(command, self.router_cpu, stderr=subprocess.PIPE)
        self.children.append(router)
        assert router.stderr is not None
        port = next(int(line.rpartition(":")[2]) for line in router.stderr if "listens" in line)
        while True:  # it listens, and knows no instance before the first table
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return Target(port, adapters, router.pid)
            time.sleep(0.1)

    def stop_last(self) -> None:
        child = self.children.pop()
        child.send_signal(signal.SIGTERM)
        child.wait(60)

    def stop(self) -> None:
        while self.children:
            self.stop_last()

    def command(self, target: Target, method: str, *rest: object) -> dict[str, Any]:
        """Has the generator send requests. Raises RuntimeError when one was not answered with a 200."""
        assert self.generator.stdin is not None
        self.generator.stdin.write(json.dumps([target.port, target.adapters, method, *rest]) + "\n")
        self.generator.stdin.flush()
        answer: dict[str, Any] = json.loads(self.answers.readline())
        if answer["bad"]:
            raise RuntimeError(f"{answer['bad']} requests failed in {method} on port {target.port}")
        return answer


def measure_requests(machine: Machine, routed: Target, options: argparse.Namespace) -> dict[str, object]:
    """Added latency at 100 requests/s, and requests/s on one core."""
    command = machine.command
    direct = Target(machine.stub, routed.adapters)
    for target in (routed, direct):
        command(target, "closed_loop", 8, 1.0, 0)
    latencies: dict[Target, list[float]] = {direct: [], routed: []}
    for block in range(options.blocks):
        for target, seen in latencies.items():
            seen += command(target, "open_loop", 100.0, options.seconds, block)["latencies_ms"]
    straight, through = sorted(latencies[direct]), sorted(latencies[routed])

    closed, cost = [], []
    for repeat in range(3):
        before = cpu_s(routed.pid)
        rps = float(command(routed, "closed_loop", 64, options.seconds, repeat)["rps"])
        closed.append(rps)
        cost.append((cpu_s(routed.pid) - before) / (rps * options.seconds) * 1e6)
    # Sustained: the answers keep up with a schedule that waits for nobody, so no queue grows.
    sustained, at_sustained = 0.0, []
    for share in (0.95, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7, 0.6, 0.6, 0.5, 0.5, 0.4, 0.4, 0.3, 0.2):
        rate = statistics.median(closed) * share
        answer = command(routed, "open_loop", rate, options.seconds, 99)
        at_sustained = answer["latencies_ms"]
        if float(answer["achieved_rps"]) >= 0.97 * rate and percentile(at_sustained, 0.5) < 20.0:
            sustained = float(answer["achieved_rps"])
            break
    return {
        "added_ms_p50": percentile(through, 0.5) - percentile(straight, 0.5),
        "added_ms_p99": percentile(through, 0.99) - percentile(straight, 0.99),
        "max_rps": sustained,
        "direct_ms_p50": percentile(straight, 0.5),
        "direct_ms_p99": percentile(straight, 0.99),
        "routed_ms_p50": percentile(through, 0.5),
        "routed_ms_p99": percentile(through, 0.99),
        "requests": len(through),
        "max_rps_ms_p50": percentile(at_sustained, 0.5),
        "max_rps_ms_p99": percentile(at_sustained, 0.99),
        "closed_loop_rps": statistics.median(closed),
        "router_cpu_us_per_request": statistics.median(cost),
    }


def measure_streams(machine: Machine, routed: Target) -> dict[str, object]:
    """Whether streamed tokens stay apart."""
    before = cpu_s(routed.pid)
    stream = machine.command(routed, "streams", 20, 60)
    stream_cpu = cpu_s(routed.pid) - before
    one = machine.command(routed, "streams", 1, 60)
    gaps, one_gaps = stream["gaps_ms"], one["gaps_ms"]
    return {
        "stream_token_gap_ms": TOKEN_GAP_S * 1e3,
        "one_stream_gap_ms_min_p50_max": [one_gaps[0], percentile(one_gaps, 0.5), one_gaps[-1]],
        "one_stream_joined_events": one["joined"],
        "streams_20_gap_ms_p1_p50_p99": [percentile(gaps, 0.01), percentile(gaps, 0.5), percentile(gaps, 0.99)],
        "streams_20_joined_events": stream["joined"],
        "streams_20_events": stream["events"],
        "router_cpu_us_per_event": stream_cpu / int(stream["events"]) * 1e6,
    }


def measure(options: argparse.Namespace) -> dict[str, object]:
    machine = Machine()
    try:
        routed = machine.start_router("--instances", *machine.urls, adapters=ADAPTERS)
        result = measure_requests(machine, routed, options) | measure_streams(machine, routed)
        machine.stop_last()
        told = [
            str(Path(__file__).with_name("published_table.py")),
            "--adapters",
            str(options.table_adapters),
            "--instances",
        ]
        table = json.loads(machine.start_other([*told, *machine.urls]).readline())
        routed = machine.start_router("--coordinator", table["endpoint"], adapters=table["adapters"])
        of_table = {f"table_{key}": table[key] for key in ("adapters", "instances", "bytes")}
        before, began = cpu_s(routed.pid), time.monotonic()
        time.sleep(options.seconds)
        of_table["table_router_cpu_share_idle"] = (cpu_s(routed.pid) - before) / (time.monotonic() - began)
        of_table |= {f"table_{key}": value for key, value in measure_requests(machine, routed, options).items()}
        of_table |= {f"table_{key}": value for key, value in measure_streams(machine, routed).items() if "20" in key}
    finally:
        machine.stop()
    return result | of_table | {"router_cpu": machine.router_cpu, "other_cpu": machine.other_cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--blocks", type=int, default=4, help="direct and routed blocks at 100 requests/s")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a block")
    parser.add_argument("--table-adapters", type=int, default=5000, help="adapters in the coordinator's table")
    parser.add_argument("--role", choices=("stub", "load"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role is not None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(stub(2) if options.role == "stub" else load())
        return
    result = measure(options)
    for key, value in result.items():
        shown = ", ".join(f"{v:.3g}" for v in value) if isinstance(value, list) else value
        print(f"{key:32} {shown:.4g}" if isinstance(shown, float) else f"{key:32} {shown}")
    if options.json is not None:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": f"{os.cpu_count()} CPUs {platform.machine()}, Python {platform.python_version()}",
            "command": " ".join(["python", "benchmarks/router_overhead.py", *sys.argv[1:]]),
        }
        options.json.write_text(json.dumps(about | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
