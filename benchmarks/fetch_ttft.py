"""Request to first token for an adapter that an instance has not: from a peer of the same host, beside stock vLLM.

Three real `vllm serve`, all with the same flags and the same share of the cores, one of them busy at a time:

- ours: two instances with coordinator and router, as `vllm-loraserve up` starts them. An adapter is registered, so one
  instance holds it; the request goes to the other one, which asks the coordinator who has it and fetches its pages.
- stock: vLLM with its own file-system resolver; the request names an adapter that was never loaded, whose checkpoint
  the page cache does not hold.

Timed at a streaming client. Every adapter (rank 64, all linear modules, random weights) is asked for once on each side,
in turns; afterwards the same request again gives the time without a load. Checkpoints are in float32, which is how PEFT
saves an adapter unless told otherwise, and by turns in bfloat16 (`*_bf16_*`), half the bytes to read from disk. That
each of ours came from the peer is read from the instance's log. The figures go into the JSON file of
`benchmarks/transfer.py`, beside what is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
from served import QUIET_S, Seen, free_port, make_adapter, stamp, stream

from vllm_loraserve.coordinator.client import CoordinatorClient
from vllm_loraserve.coordinator.messages import GetTable, RoutingTable
from vllm_loraserve.coordinator.profiling import connector
from vllm_loraserve.launcher import assets
from vllm_loraserve.launcher.cluster import Cluster, Plan
from vllm_loraserve.launcher.processes import Server, healthy

FLAGS = ("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8", "--dtype", "bfloat16")
FLAGS += ("--kv-cache-memory-bytes", str(256 << 20), "--no-enable-prefix-caching")
SLOTS, WARM = 4, 6
PROMPT = [1, 504, 3575, 282, 4649, 314]


def drop_from_cache(folder: Path) -> None:
    """The page cache forgets the checkpoint's files."""
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def environment(threads: int) -> dict[str, str]:
    """Of every server: so many threads for a step, bound to no core."""
    return {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_TARGET_DEVICE": "cpu"}


def start_stock(
    model: Path, adapters: Path, env: dict[str, str], flags: tuple[str, ...], logs: Path
) -> tuple[Server, str]:
    """(server, base URL) of a stock vLLM that resolves names to folders of `adapters`; it has no plugin but that."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--enable-lora", *flags, *FLAGS]
    env = env | {"VLLM_PLUGINS": "lora_filesystem_resolver", "VLLM_LORA_RESOLVER_CACHE_DIR": str(adapters)}
    env |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = Server("stock", command, logs / "stock.log", env)
    server.start()
    return server, f"http://127.0.0.1:{port}"


async def ttft(session: aiohttp.ClientSession, url: str, model: str) -> float:
    """Milliseconds from the request to its first token; raises RuntimeError where there is none."""
    seen = Seen()
    await stream(session, url, model, PROMPT, 1, seen, time.monotonic() + 60)
    if seen.errors or not seen.ttft:
        raise RuntimeError(f"{url}: {model}: {seen.errors}")
    return seen.ttft[0] * 1e3


def came_from_peer(cluster: Cluster, name: str) -> bool:
    """Whether an instance's log says so."""
    said = re.compile(rf"transfer: {re.escape(name)} \(.*came from peer")
    return any(said.search(server.log.read_text(errors="replace")) for server in cluster.instances)


async def table_of(cluster: Cluster) -> RoutingTable:
    async with CoordinatorClient(cluster.coordinator_endpoint, timeout_s=5.0) as client:
        return await client.ask(GetTable(), RoutingTable)


async def lacking(cluster: Cluster, name: str) -> str:
    """URL of the instance that does not hold the adapter, once the other one does."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        instances = (await table_of(cluster)).instances
        holds = {i.url: any(copy.name == name for copy in i.resident) for i in instances}
        if sorted(holds.values()) == [False, True]:
            return next(url for url, held in holds.items() if not held)
        await asyncio.sleep(0.2)
    raise RuntimeError(f"{name} is not held by one instance alone: {holds}")


async def measure(cluster: Cluster, stock: str, names: dict[str, str], folder: Path) -> dict[str, list[float]]:
    """Milliseconds of every request, by side; the first WARM adapters warm both sides up and are not in it.

    names: adapter -> what its figures' names end with.
    """
    took: dict[str, list[float]] = {}
    async with aiohttp.ClientSession(connector=connector()) as session:
        for turn, (name, kind) in enumerate(names.items()):
            ours = await lacking(cluster, name)
            sides = {"fetch": ours, "stock_cold": stock}
            for side, url in sides.items() if turn // 2 % 2 else reversed(sides.items()):
                drop_from_cache(folder / name)
                await asyncio.sleep(QUIET_S)
                milliseconds = await ttft(session, url, name)
                again = statistics.median([await ttft(session, url, name) for _ in range(3)])
                if turn >= WARM:
                    took.setdefault(f"{side}_ttft{kind}", []).append(milliseconds)
                    took.setdefault(f"{side}_again_ttft", []).append(again)
            if not came_from_peer(cluster, name):
                raise RuntimeError(f"{name} did not come from the peer; see {cluster.logs}")
    return took


def run(count: int, rank: int, threads: int, keep: Path | None = None) -> dict[str, float]:
    """The figures: medians in milliseconds, and their ratio. count: adapters of each kind."""
    model = assets.model_path()
    with tempfile.TemporaryDirectory() as scratch:
        state = keep or Path(scratch) / "state"
        folder = Path(scratch) / "adapters"
        names = {f"a{i}": "_bf16" if i % 2 else "" for i in range(2 * count + WARM)}
        for i, (name, kind) in enumerate(names.items()):
            make_adapter(model, folder / name, rank, i, "bfloat16" if kind else "float32")
        size = (folder / "a0" / "adapter_model.safetensors").stat().st_size
        flags = ("--max-loras", str(SLOTS), "--max-lora-rank", str(rank), "--max-cpu-loras", str(len(names)))
        cluster = Cluster(
            Plan(
                model=str(model),
                state=state,
                port=free_port(),
                max_rank=rank,
                adapter_roots=(str(folder),),
                vllm_options=(*FLAGS, *flags),
                coordinator_options=("--rebalance", "3600"),
            )
        )
        env = environment(threads)
        for server in cluster.instances:
            server.env.update(env)
        stock, url = start_stock(model, folder, env, flags, cluster.logs)
        try:
            with cluster.running():
                while not healthy(url):
                    if stock.status is not None:
                        raise SystemExit(f"stock vLLM ended:\n{stock.tail()}")
                    time.sleep(0.2)
                for name in names:
                    cluster.add_adapter(name, folder / name)
                took = asyncio.run(measure(cluster, url, names, folder))
        finally:
            stock.ask_to_stop()
            if stock.process is not None:
                stock.process.wait(60)
    result = {f"{key}_ms": statistics.median(values) for key, values in took.items()}
    for kind in ("", "_bf16"):
        result[f"stock_cold_of_fetch_ttft{kind}"] = result[f"stock_cold_ttft{kind}_ms"] / result[f"fetch_ttft{kind}_ms"]
        result[f"fetch_ttft{kind}_max_ms"] = max(took[f"fetch_ttft{kind}"])
    about = {"ttft_adapters": count, "ttft_rank": rank, "ttft_threads": threads, "ttft_checkpoint_mib": size / 2**20}
    return dict(sorted(result.items())) | about


def merge(path: Path, figures: dict[str, float]) -> None:
    """Puts the figures beside what the file holds; when and how they were taken goes into `ttft_run`."""
    held = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held | figures | {"ttft_run": stamp()}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, beside those of benchmarks/transfer.py")
    parser.add_argument("--adapters", type=int, default=8, help=f"adapters of each kind; {WARM} more warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of a step, on every server")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="a folder for the logs")
    options = parser.parse_args()
    result = run(options.adapters, options.rank, options.threads, options.keep)
    for key, value in result.items():
        print(f"{key:32} {value:10.2f}")
    if options.json is not None:
        merge(options.json, result)


if __name__ == "__main__":
    main()
