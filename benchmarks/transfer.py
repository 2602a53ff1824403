"""How fast pages move: every way between two processes of one host, beside what bounds it; RDMA in the emulated
machine.

All sides move the same bytes, in turns, in one run; figures are medians, `best` ones the best round. A `*_gib_s` of
ours is a whole fetch: lease, copy, checksum of every page, generation check, commit, release. The bounds do none of
that: `memcpy` is one copy between two slabs of this process, `socket` the best plain send/recv_into over one loopback
connection between two processes (the best of several block sizes, chosen first), `disk_cold` a read of the same bytes
from a file that the page cache does not hold. `memfd_cold` is the first fetch over a new connection, by which nothing
of the peer's memory was read yet. `verbs` needs the packages of tests/rdma_vm; there, ours and ib_read_bw (the better
of polling and of waiting for events, as ours does) read messages of 1 MiB.

A figure in FILE that a run does not measure stays, with the date of its own run under `dates`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from vllm_loraserve.memory import extension
from vllm_loraserve.memory.extension import Segment
from vllm_loraserve.memory.slab import DeviceSlab, HostSlab
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.pages import Wanted
from vllm_loraserve.transfer.peer import Peer
from vllm_loraserve.transfer.server import TransferServer
from vllm_loraserve.transfer.slab_store import SlabStore

KEY = b"the key of this benchmark only"
PAGE = 256 << 10
"""Of the order of a page of attention modules of a small model."""
ROOT = Path(__file__).resolve().parent.parent
BLOCKS = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
WANTED = Wanted(name="a", layout="bench")


def make_pages(mib: int) -> list[np.ndarray]:
    """Pages of random bytes, `mib` MiB together."""
    rng = np.random.default_rng(mib)
    return [rng.integers(0, 256, PAGE, np.uint8) for _ in range((mib << 20) // PAGE)]


def environment(**extra: str) -> dict[str, str]:
    """Ours for a child process that imports what we import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **extra}


# ---- the other process ----


def hold(mib: int, use_nixl: bool) -> None:
    """Serves one adapter, and raw bytes for the plain socket, until standard input ends."""
    with SlabStore((mib + 1) << 20, populate=True) as store:
        store.put("a", make_pages(mib), layout="bench")
        with (
            TransferServer([store], KEY, "holder", verbs="off", offer_nixl=use_nixl) as server,
            socket.create_server(("127.0.0.1", 0)) as plain,
        ):
            print("HOLDER", server.endpoint, plain.getsockname()[1], flush=True)
            peer, _ = plain.accept()
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data = memoryview(store.slab.array())[: mib << 20]
            while order := peer.recv(8):
                block = int.from_bytes(order, "little")
                for start in range(0, len(data), block):
                    peer.sendall(data[start : start + block])
            if use_nixl:
                sys.stdout.flush()
                os._exit(0)  # NIXL's UCX crashes at a normal exit without an RDMA device


def fetch_by_nixl(endpoint: str, mib: int, rounds: int) -> None:
    """Prints the seconds of each verified fetch by NIXL, as JSON; in a process of its own for the same reason."""
    with SlabStore((mib + 1) << 20, populate=True) as target:
        peer = Peer(endpoint, KEY, "reader", order=("nixl",))
        seconds = []
        for _ in range(rounds + 2):
            begun = time.perf_counter()
            peer.fetch(WANTED, target, Flight(60))
            seconds.append(time.perf_counter() - begun)
            target.drop("a")
        print(json.dumps(seconds[2:]), flush=True)
        os._exit(0)


@contextlib.contextmanager
def holder(mib: int, *, use_nixl: bool = False) -> Iterator[tuple[str, socket.socket]]:
    """A holder process: (its endpoint, the plain connection to it)."""
    command = [sys.executable, __file__, "--role", "holder", "--mib", str(mib), *(["--with-nixl"] if use_nixl else [])]
    extra = {"LORASERVE_NIXL_WITHOUT_RDMA": "1"} if use_nixl else {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(**extra))
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("HOLDER ")), None)
        if line is None:
            raise SystemExit("the holder process did not start")
        _, endpoint, port = line.split()
        with socket.create_connection(("127.0.0.1", int(port))) as plain:
            yield endpoint, plain
    finally:
        process.kill()
        process.wait()


# ---- the sides ----


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def receive_plain(sock: socket.socket, target: memoryview, block: int) -> None:
    sock.sendall(block.to_bytes(8, "little"))
    got = 0
    while got < len(target):
        got += sock.recv_into(target[got : got + block])


def read_cold(path: Path, target: memoryview) -> float:
    """Seconds to read the file when the page cache has nothing of it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        got = 0
        while got < len(target):
            got += os.preadv(fd, [target[got : got + (4 << 20)]], got)
        return time.perf_counter() - begun
    finally:
        os.close(fd)


def same_host(mib: int, rounds: int) -> dict[str, float]:
    """GiB/s of every way on this host, in turns."""
    library = extension.load()
    if library is None:
        raise SystemExit(f"the benchmark needs the extension: {extension.missing_reason()}")
    size = mib << 20
    seconds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        endpoint, plain = stack.enter_context(holder(mib))
        target = stack.enter_context(SlabStore((mib + 1) << 20, populate=True))
        here = stack.enter_context(HostSlab(size, populate=True))
        there = stack.enter_context(HostSlab(size, populate=True))
        here.array()[:] = np.concatenate(make_pages(mib))
        by_memfd = stack.enter_context(Peer(endpoint, KEY, "reader", order=("memfd",)))
        by_tcp = stack.enter_context(Peer(endpoint, KEY, "reader", order=("tcp",)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=ROOT)))
        file = folder / "pages"
        with file.open("wb") as out:
            out.write(here.view())
            out.flush()
            os.fsync(out.fileno())
        view = memoryview(there.array())

        def fetch(peer: Peer) -> None:
            peer.fetch(WANTED, target, Flight(60))
            target.drop("a")

        def first_fetch() -> float:
            with Peer(endpoint, KEY, "reader", order=("memfd",)) as peer:
                peer.rungs()
                return timed(lambda: fetch(peer))

        best = min(BLOCKS, key=lambda block: min(timed(lambda: receive_plain(plain, view, block)) for _ in range(3)))
        sides: dict[str, Callable[[], float]] = {
            "memcpy": lambda: timed(lambda: library.copy([Segment(here.address, there.address, size)])),
            "memfd": lambda: timed(lambda: fetch(by_memfd)),
            "memfd_cold": first_fetch,
            "socket": lambda: timed(lambda: receive_plain(plain, view, best)),
            "tcp": lambda: timed(lambda: fetch(by_tcp)),
            "disk_cold": lambda: read_cold(file, view),
        }
        for side in sides.values():  # every mapping touched, every connection open
            side()
            side()
        for _ in range(rounds):
            for name, side in sides.items():
                seconds.setdefault(name, []).append(side())
        assert view.tobytes() == here.array().tobytes()
        fetch(by_memfd)
    rates = {f"{name}_gib_s": mib / 1024 / statistics.median(took) for name, took in seconds.items()}
    # The best of many rounds is what the machine can do when nothing else runs on it.
    rates |= {f"{name}_best_gib_s": mib / 1024 / min(took) for name, took in seconds.items()}
    for ours, bound in (("memfd", "memcpy"), ("tcp", "socket")):
        rates[f"{ours}_of_{bound}"] = statistics.median(seconds[bound]) / statistics.median(seconds[ours])
        rates[f"{ours}_of_{bound}_best"] = min(seconds[bound]) / min(seconds[ours])
    return {**rates, "socket_block_kib": best / 1024}


def nixl_rate(mib: int, rounds: int) -> dict[str, float]:
    """GiB/s of a verified fetch by NIXL, empty where the extra is not installed."""
    if subprocess.run([sys.executable, "-c", "import nixl._api"], capture_output=True, check=False).returncode:
        return {}
    with holder(mib, use_nixl=True) as (endpoint, _):
        run = subprocess.run(
            [
                sys.executable,
                __file__,
                "--role",
                "nixl",
                "--mib",
                str(mib),
                "--rounds",
                str(rounds),
                "--peer",
                endpoint,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={
                **os.environ,
                "LORASERVE_NIXL_WITHOUT_RDMA": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            },
        )
    line = next((line for line in run.stdout.splitlines() if line.startswith("[")), None)
    if line is None:
        print(f"nixl gave no result: {run.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {}
    return {"nixl_gib_s": mib / 1024 / statistics.median(json.loads(line))}


def gpu_rates(mib: int, rounds: int) -> dict[str, float]:
    """GiB/s on the first GPU: our page kernels and page-wise copies beside the driver's one large copy; empty
    without."""
    library = extension.load()
    if library is None or not library.probe().cuda.devices:
        return {}
    size, device = mib << 20, 0
    seconds: dict[str, list[float]] = {}
    with HostSlab(size, gpu=device) as host, DeviceSlab(size, device) as here, DeviceSlab(size, device) as there:
        if not host.granted & extension.PINNED:
            raise SystemExit(
                "the driver page-locks no host memory here, so that gpu_h2d would be no rate of pinned memory"
            )
        host.array()[:] = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        order = [int(page) for page in np.random.default_rng(1).permutation(size // PAGE)]
        whole = [Segment(host.address, here.address, size)]
        pages = [Segment(host.address + p * PAGE, here.address + p * PAGE, PAGE) for p in order]
        addresses, lengths = [here.address + p * PAGE for p in order], [PAGE] * len(order)
        sides: dict[str, Callable[[], object]] = {
            "gpu_h2d": lambda: library.copy(whole, device),
            "gpu_h2d_pages": lambda: library.copy(pages, device),
            "gpu_d2d": lambda: library.copy([Segment(here.address, there.address, size)], device),
            "gpu_gather": lambda: library.gather(here.address, order, PAGE, there.address, device),
            "gpu_scatter": lambda: library.scatter(there.address, order, PAGE, here.address, device),
            "gpu_checksum": lambda: library.checksums(addresses, lengths, device),
        }
        for side in sides.values():
            side()
        for _ in range(rounds):
            for name, side in sides.items():
                seconds.setdefault(name, []).append(timed(side))
        assert library.checksums(addresses, lengths, device) == library.checksums(
            [host.address + p * PAGE for p in order], lengths
        )
    rates = {f"{name}_gib_s": mib / 1024 / statistics.median(took) for name, took in seconds.items()}
    for ours, bound in (("gpu_h2d_pages", "gpu_h2d"), ("gpu_gather", "gpu_d2d"), ("gpu_scatter", "gpu_d2d")):
        rates[f"{ours}_of_{bound}"] = statistics.median(seconds[bound]) / statistics.median(seconds[ours])
    return rates


# ---- RDMA, inside the emulated machine ----


def in_guest(mib: int, rounds: int) -> None:
    """Inside the guest: ib_read_bw and our READs in turns; prints one line of JSON."""
    address = "10.79.0.1"
    ours, fetched, theirs = [], [], []
    with SlabStore((mib + 1) << 20) as source, SlabStore((mib + 1) << 20) as target:
        source.put("a", make_pages(mib), layout="bench")
        with (
            TransferServer([source], KEY, "holder") as server,
            Peer(server.endpoint, KEY, "reader", order=("verbs",)) as peer,
        ):
            (rung,) = peer.rungs()
            for _ in range(rounds):
                theirs.append(_ib_read_bw(address, mib))
                lease = peer.lease(WANTED, rdma=True)
                destination = target.reserve(lease.pages)
                begun = time.perf_counter()
                rung.read(peer, lease, destination, Flight(120))
                ours.append(mib / (time.perf_counter() - begun))
                target.abandon(destination)
                peer.release(lease)
                begun = time.perf_counter()
                peer.fetch(WANTED, target, Flight(120))
                fetched.append(mib / (time.perf_counter() - begun))
                assert target.bytes_of("a") == source.bytes_of("a")
                target.drop("a")
    result = {
        "verbs_mib_s": statistics.median(ours),
        "verbs_fetch_mib_s": statistics.median(fetched),
        "ib_read_bw_mib_s": statistics.median(theirs),
        "verbs_of_ib_read_bw": statistics.median(ours) / statistics.median(theirs),
        "verbs_mib": mib,
    }
    print("BENCH", json.dumps(result), flush=True)


def _ib_read_bw(address: str, mib: int) -> float:
    """MiB/s that perftest reads with messages of 1 MiB and as many READs in flight as we use: polling, or waiting for
    events as we do, whichever is better."""
    return max(_perftest(address, mib), _perftest(address, mib, "-e"))


def _perftest(address: str, mib: int, *how: str) -> float:
    command = ["ib_read_bw", "-d", "rxe0", "-x", "1", "-s", str(1 << 20), "-n", str(mib), "-o", "16", "-F", *how]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for _ in range(60):
            time.sleep(0.5)
            run = subprocess.run([*command, address], capture_output=True, text=True, check=False)
            if run.returncode == 0:
                break
        found = re.search(r"^\s*1048576\s+\d+\s+[\d.]+\s+([\d.]+)", run.stdout, re.MULTILINE)
        if found is None:
            raise SystemExit(f"ib_read_bw gave no figure: {run.stdout[-500:]} {run.stderr[-500:]}")
        return float(found[1])
    finally:
        server.kill()
        server.wait()


def verbs(folder: str) -> dict[str, float]:
    """Boots the machine of tests/rdma_vm and measures there; empty where it was not prepared."""
    if shutil.which("qemu-system-x86_64") is None or not Path(folder, "initramfs").exists():
        print(f"no RDMA figures: run tests/rdma_vm/prepare.sh {folder} first", file=sys.stderr)
        return {}
    vm = ROOT / "tests" / "rdma_vm"
    run = subprocess.run(
        [str(vm / "boot.sh"), folder, str(vm / "guest" / "bench.sh")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env=environment(PYTHON=sys.executable),
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("BENCH ")), None)
    if line is None:
        print(f"the machine gave no figures:\n{run.stdout[-2000:]}", file=sys.stderr)
        return {}
    return dict(json.loads(line.removeprefix("BENCH ")))


def merged(earlier: dict[str, object], result: dict[str, object]) -> dict[str, object]:
    """`result` and the figures of `earlier` that it has not, each with the date of its own run."""
    kept = {key: value for key, value in earlier.items() if key not in result and key not in ("dates", "note")}
    known = earlier.get("dates", {})
    assert isinstance(known, dict)
    # Those of fetch_ttft.py have a stamp of their own.
    dates = {key: known.get(key, earlier.get("date")) for key in kept if "ttft" not in key}
    return {**result, **kept, **({"dates": dates} if dates else {})}


def _gpus() -> str:
    library = extension.load()
    return (", ".join(gpu.name for gpu in library.probe().cuda.devices) if library else "") or "no GPU"


def main() -> None:
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--mib", type=int, default=64, help="size of the adapter in MiB")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-verbs", action="store_true", help="leave the emulated machine out")
    parser.add_argument("--vm", default=f"{cache}/vllm-loraserve/vm", help="where tests/rdma_vm/prepare.sh prepared it")
    parser.add_argument("--role", choices=("holder", "nixl", "guest"), help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--with-nixl", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "holder":
        return hold(options.mib, options.with_nixl)
    if options.role == "nixl":
        return fetch_by_nixl(options.peer, options.mib, options.rounds)
    if options.role == "guest":
        return in_guest(options.mib, options.rounds)
    result = same_host(options.mib, options.rounds) | nixl_rate(options.mib, options.rounds)
    result |= gpu_rates(1024, options.rounds)
    if not options.no_verbs:
        result |= verbs(options.vm)
    for key, value in result.items():
        print(f"{key:28} {value:10.3f}")
    if options.json is not None:
        library = extension.load()
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": f"{os.cpu_count()} CPUs {platform.machine()}, Python {platform.python_version()}, "
            f"checksum {library.hash_variant if library else 'numpy'}, {_gpus()}, RDMA emulated (rdma_rxe in QEMU TCG)",
            "command": " ".join(["python", "benchmarks/transfer.py", *sys.argv[1:]]),
            "mib": options.mib,
            "rounds": options.rounds,
            "load": os.getloadavg()[0],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps(merged(earlier, about | result), indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
