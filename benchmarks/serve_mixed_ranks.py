"""Two real `vllm serve`, stock and with the plugin, on the same trace of requests for adapters of mixed ranks.

Three comparisons on SmolLM2-135M on a CPU: ranks 8..128 (stock pads all to --max-lora-rank 128); all rank 8 at
--max-lora-rank 8; and rank 8 against no LoRA at all. Servers of one comparison run side by side and take turns with the
same requests, so that both see the same machine. KV memory: both get the same total for KV cache and adapters; what
the arena does not take goes to the KV cache.

One invocation runs and saves all three, after each part; on two quiet cores in less than 15 minutes, most of it stock's
padded prefill.

The factors are CPU factors: stock's CPU fallback gathers a padded matrix for every token, which its GPU kernels do not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from served import QUIET_S

SHAPES = {
    "self_attn.q_proj": ("hidden", "hidden"),
    "self_attn.k_proj": ("hidden", "kv"),
    "self_attn.v_proj": ("hidden", "kv"),
    "self_attn.o_proj": ("hidden", "hidden"),
    "mlp.gate_proj": ("hidden", "inner"),
    "mlp.up_proj": ("hidden", "inner"),
    "mlp.down_proj": ("inner", "hidden"),
}
MIX = (8, 16, 32, 64, 128, 8)
KV_BYTES = 256 << 20


def make_adapter(model: Path, folder: Path, rank: int, seed: int) -> Path:
    """A random adapter on all linear modules; its answers mean nothing, its cost is real."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    sizes = {"hidden": hidden, "inner": config["intermediate_size"], "kv": kv}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (n_in, n_out) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = (
                torch.randn(rank, sizes[n_in], generator=generator) / sizes[n_in] ** 0.5
            ).bfloat16()
            weights[f"{name}.lora_B.weight"] = (torch.randn(sizes[n_out], rank, generator=generator) * 0.01).bfloat16()
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    targets = [module.split(".")[1] for module in SHAPES]
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets})
    )
    return folder


SAMPLE_S = 0.2


class Server:
    """One `vllm serve` in a process group of its own."""

    def __init__(self, name: str, model: Path, arguments: list[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.name, self.log, self.peak_bytes = name, log, 0
        self.arguments = arguments
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(model),
            "--served-model-name",
            "base",
        ]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "512", "--max-num-seqs", "32"]
        command += ["--no-enable-prefix-caching", "--enforce-eager", *arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        self.process = subprocess.Popen(
            command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended at start:\n{self.log.read_text(errors='replace')[-3000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return
            time.sleep(1)
        raise SystemExit(
            f"{self.name} did not start in {seconds:.0f} s:\n{self.log.read_text(errors='replace')[-3000:]}"
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def sample_memory(self) -> None:
        total = 0
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self.process.pid)
            for process in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().pss
        self.peak_bytes = max(self.peak_bytes, total)

    @contextlib.contextmanager
    def sampled(self) -> Iterator[None]:
        """While the block runs the server's memory is looked at every SAMPLE_S seconds, for its peak."""
        ended = threading.Event()

        def sample() -> None:
            self.sample_memory()
            while not ended.wait(SAMPLE_S):
                self.sample_memory()

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def kv_tokens(self) -> int | None:
        found = re.search(r"KV cache size: ([\d,]+) tokens", self.log.read_text(errors="replace"))
        return int(found.group(1).replace(",", "")) if found else None

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def running(servers: list[Server], seconds: float) -> Iterator[None]:
    try:
        began = time.monotonic()
        for server in servers:
            server.wait(seconds)
            print(f"  {server.name:8} up after {time.monotonic() - began:.0f} s", flush=True)
        yield
    finally:
        for server in servers:
            server.stop()


async def one_request(session: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> dict[str, float]:
    body = {**request, "stream": True, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    began, first, last, tokens = time.perf_counter(), 0.0, 0.0, 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise SystemExit(f"{url} answered {response.status}: {await response.text()}")
        async for line in response.content:
            text = line.decode().strip()
            if not text.startswith("data: ") or text == "data: [DONE]":
                continue
            event = json.loads(text[6:])
            if event.get("error"):
                raise SystemExit(f"{url} answered {event['error']}")
            if event.get("choices"):
                last = time.perf_counter()
                first = first or last
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    if tokens != request["max_tokens"]:
        raise SystemExit(f"{url} gave {tokens} tokens of {request['max_tokens']}")
    return {"ttft": first - began, "tpot": (last - first) / max(tokens - 1, 1), "tokens": tokens}


async def play(server: Server, trace: list[dict[str, Any]], concurrency: int) -> dict[str, Any]:
    """All requests of the trace, `concurrency` at a time."""
    limit = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def bounded(request: dict[str, Any]) -> dict[str, float]:
            async with limit:
                return await one_request(session, server.url, request)

        with server.sampled():
            began = time.perf_counter()
            done = await asyncio.gather(*(bounded(request) for request in trace))
            seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": sum(d["tokens"] for d in done), "requests": done}


def make_trace(models: list[str], requests: int, prompt: int, output: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "model": models[index % len(models)],
            "prompt": [rng.randrange(1000, 40000) for _ in range(prompt)],
            "max_tokens": output,
        }
        for index in range(requests)
    ]


def summary(server: Server, runs: list[dict[str, Any]]) -> dict[str, Any]:
    ttft = sorted(request["ttft"] for run in runs for request in run["requests"])
    tpot = [request["tpot"] for run in runs for request in run["requests"]]
    return {
        "arguments": [argument.replace(f"{server.log.parent}/", "") for argument in server.arguments],
        "output_tokens_per_s": statistics.median(run["tokens"] / run["seconds"] for run in runs),
        "ttft_p50_s": ttft[len(ttft) // 2],
        "ttft_p95_s": ttft[min(int(len(ttft) * 0.95), len(ttft) - 1)],
        "tpot_ms": statistics.median(tpot) * 1e3,
        "kv_tokens": server.kv_tokens(),
        "peak_memory_bytes": server.peak_bytes,
        "runs": len(runs),
    }


def compare(
    servers: dict[str, Server], traces: dict[str, list[dict[str, Any]]], rounds: int, concurrency: int, patience: float
) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    with running(list(servers.values()), patience):
        for name, server in servers.items():
            # Each adapter once, so that no side is timed while it reads checkpoints.
            models = sorted({request["model"] for request in traces[name]})
            asyncio.run(play(server, make_trace(models, len(models), 4, 1, 99), len(models)))
            print(f"  {name:8} has all its adapters", flush=True)
        for turn in range(rounds):
            for name in list(servers) if turn % 2 == 0 else list(reversed(servers)):
                time.sleep(QUIET_S)
                runs[name].append(asyncio.run(play(servers[name], traces[name], concurrency)))
                print(
                    f"  {name:8} {runs[name][-1]['tokens'] / runs[name][-1]['seconds']:8.1f} output tokens/s",
                    flush=True,
                )
    return {name: summary(server, runs[name]) for name, server in servers.items()}


def main() -> None:
    from vllm_loraserve.kernels import cpu_native
    from vllm_loraserve.launcher import assets

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--requests", type=int, default=24, help="of a round at rank 8")
    parser.add_argument("--mixed-requests", type=int, default=12, help="of a round at mixed ranks (stock is slow)")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--output", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="rank 8")
    parser.add_argument("--mixed-rounds", type=int, default=2, help="mixed ranks")
    parser.add_argument("--patience", type=float, default=240, help="seconds that servers may take to start")
    parser.add_argument("--only", choices=("mixed", "rank8"), help="one part; its results are added to the file")
    options = parser.parse_args()
    # A timeout must not leave servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model = assets.model_path(os.environ.get("LORASERVE_TEST_MODEL"))
    began = time.monotonic()
    result: dict[str, Any] = {
        "benchmark": "serve_mixed_ranks",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/serve_mixed_ranks.py", *sys.argv[1:]]),
        "device": f"CPU, {os.cpu_count()} cores",
        "isa": library.isa if (library := cpu_native.load()) is not None else "torch",
        "note": "CPU factors: stock gathers a padded matrix per token on a CPU, which its GPU kernels do not do",
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def loras(ranks: tuple[int, ...]) -> tuple[list[str], list[str]]:
            names, modules = [], []
            for index, rank in enumerate(ranks):
                name = f"r{rank}-{index}"
                path = folder / name
                modules.append(f"{name}={path if path.exists() else make_adapter(model, path, rank, index)}")
                names.append(name)
            return names, ["--lora-modules", *modules]

        def server(name: str, label: str, kv_bytes: int, *arguments: str) -> Server:
            extra = ["--kv-cache-memory-bytes", str(kv_bytes), *arguments]
            return Server(name, model, extra, folder / f"{label}-{name}.log")

        if options.only != "rank8":
            print("Ranks " + ", ".join(map(str, MIX)))
            names, modules = loras(MIX)
            rows, stock_rows = sum(-(-rank // 8) * 8 for rank in MIX), 128 * len(MIX)
            spared = (stock_rows - rows) * rank_row_bytes(model)
            result["lora_rank_rows"] = {"ours": rows, "stock": stock_rows}
            trace = make_trace(names, options.mixed_requests, options.prompt, options.output, 7)
            result |= compare(
                {
                    "stock": server(
                        *("stock", "mixed", KV_BYTES, "--enable-lora", "--max-loras", str(len(MIX))),
                        *("--max-lora-rank", "128", *modules),
                    ),
                    "ours": server(
                        *("ours", "mixed", KV_BYTES + spared, "--enable-loraserve", "--max-loras", str(len(MIX))),
                        *("--loraserve-config.arena_rank_rows", str(rows), *modules),
                    ),
                },
                {"stock": trace, "ours": trace},
                options.mixed_rounds,
                options.concurrency,
                options.patience,
            )
            result["mixed_throughput_ratio"] = (
                result["ours"]["output_tokens_per_s"] / result["stock"]["output_tokens_per_s"]
            )
            result["mixed_date"] = result["date"]
            save(options.json, result)
        if options.only != "mixed":
            print("All rank 8")
            names, modules = loras((8,) * len(MIX))
            common = ["--max-loras", str(len(MIX)), "--max-lora-rank", "8", *modules]
            trace = make_trace(names, options.requests, options.prompt, options.output, 7)
            rank8 = compare(
                {
                    "stock": server("stock", "rank8", KV_BYTES, "--enable-lora", *common),
                    "ours": server("ours", "rank8", KV_BYTES, "--enable-loraserve", *common),
                    "no_lora": server("no_lora", "rank8", KV_BYTES),
                },
                {"stock": trace, "ours": trace, "no_lora": [{**request, "model": "base"} for request in trace]},
                options.rounds,
                options.concurrency,
                options.patience,
            )
            result["rank8"], result["no_lora"] = rank8, rank8["no_lora"]
            speed = {name: side["output_tokens_per_s"] for name, side in rank8.items()}
            result["rank8_throughput_ratio"] = speed["ours"] / speed["stock"]
            result["rank8_of_no_lora"] = speed["ours"] / speed["no_lora"]
            result["rank8_date"] = result["date"]
            save(options.json, result)
    print(f"All of it took {time.monotonic() - began:.0f} s")
    print(json.dumps({key: value for key, value in result.items() if not isinstance(value, dict)}, indent=1))


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write what there is so far; a part that this run does not make stays as an earlier one left it."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**earlier, **result}, indent=1) + "\n")


def rank_row_bytes(model: Path) -> int:
    """Bytes of one rank row of all modules, bf16."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    sizes = {"hidden": hidden, "inner": config["intermediate_size"], "kv": kv}
    return 2 * config["num_hidden_layers"] * sum(sizes[n_in] + sizes[n_out] for n_in, n_out in SHAPES.values())


if __name__ == "__main__":
    main()
