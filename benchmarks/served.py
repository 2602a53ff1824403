"""What the serving benchmarks share: adapters with random weights, two real servers, streaming clients, percentiles.

A side is one `vllm serve`: `stock` with `--enable-lora`, `ours` with `--enable-loraserve`, otherwise the same flags.
Both run all the time, one of them under load at a time.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

QUIET_S = 1.5
"""Before a side is timed: a worker of vLLM's polls for a second after its last step, on a core that others need."""
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(model: Path, folder: Path, rank: int, seed: int, dtype: str = "bfloat16") -> Path:
    """A PEFT checkpoint over all linear modules of the model, random weights."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    sizes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    sizes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    shapes = dict(zip(MODULES, sizes, strict=True))
    generator, stored = torch.Generator().manual_seed(seed), getattr(torch, dtype)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (inputs, outputs) in shapes.items():
            part = "mlp" if module in MODULES[4:] else "self_attn"
            key = f"base_model.model.model.layers.{layer}.{part}.{module}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(rank, inputs, generator=generator) * 0.01).to(stored)
            tensors[f"{key}.lora_B.weight"] = (torch.randn(outputs, rank, generator=generator) * 0.01).to(stored)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(MODULES),
        "bias": "none",
        "base_model_name_or_path": str(model),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def servers(
    model: Path, adapters: Mapping[str, Path], sides: Mapping[str, list[str]], logs: Path
) -> AsyncIterator[dict[str, str]]:
    """Side -> base URL, while all run; `sides`: side -> extra flags."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    running: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
    try:
        for side, flags in sides.items():
            port = free_port()
            command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
            command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
            command += ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(512 << 20), "--dtype", "bfloat16"]
            command += ["--no-enable-prefix-caching", *flags]
            with open(logs / f"{side}.log", "wb") as log:
                process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
            running[side] = (process, f"http://127.0.0.1:{port}")
        async with aiohttp.ClientSession() as session:
            for side, (process, url) in running.items():
                await _healthy(session, process, url, logs / f"{side}.log")
                for name, path in adapters.items():
                    body = {"lora_name": name, "lora_path": str(path)}
                    async with session.post(f"{url}/v1/load_lora_adapter", json=body) as answer:
                        if answer.status != 200:
                            raise RuntimeError(f"{side}: {await answer.text()}")
        yield {side: url for side, (_, url) in running.items()}
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


async def _healthy(session: aiohttp.ClientSession, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text(errors='replace')[-2000:]}")
        try:
            async with session.get(f"{url}/health") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.3)
    raise TimeoutError(f"{url} did not get healthy: {log.read_text(errors='replace')[-2000:]}")


@dataclass
class Seen:
    """What clients saw: seconds; `tokens`: streamed tokens in all."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    tokens: int = 0
    requests: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        for name in ("ttft", "gaps", "tpot", "errors"):
            getattr(self, name).extend(getattr(other, name))
        self.tokens += other.tokens
        self.requests += other.requests


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    prompt: list[int],
    tokens: int,
    seen: Seen,
    until: float,
    counted: tuple[float, float] = (0.0, float("inf")),
) -> None:
    """One streamed completion; stops reading at `until` (time.monotonic). Only what lies within `counted` goes into
    `seen`: first tokens of requests sent in it, gaps and tokens wholly in it."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    begin = last = time.monotonic()
    since, end = counted
    first = None
    count = 0
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                seen.errors.append(f"{answer.status}: {(await answer.text())[:200]}")
                return
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                if b'"error"' in line:
                    seen.errors.append(line.decode()[:200])
                    return
                now = time.monotonic()
                if first is None:
                    first = now
                    if since <= begin <= end:
                        seen.ttft.append(now - begin)
                elif since <= last and now <= end:
                    seen.gaps.append(now - last)
                last = now
                count += 1
                seen.tokens += since <= now <= end
                if now > until:
                    return
    except aiohttp.ClientError as error:
        seen.errors.append(repr(error))
        return
    if not since <= begin <= end:
        return
    seen.requests += 1
    if first is not None and count > 1:
        seen.tpot.append((last - first) / (count - 1))


def percentile(values: Iterable[float], q: float) -> float:
    """The q-th percentile (nearest rank above)."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[min(int(q / 100 * len(ordered)), len(ordered) - 1)]


def stamp() -> dict[str, str]:
    """Date, device and command, for a result file."""
    import vllm

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{platform.machine()}, {os.cpu_count()} cores, no accelerator",
        "vllm": vllm.__version__,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
