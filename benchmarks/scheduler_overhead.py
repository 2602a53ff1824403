"""Time of `schedule()`: vLLM's scheduler and ours over the same queue, no model.

256 requests run, many more wait, spread over 500 adapters with slots for 8. Both schedulers get the same requests;
steps alternate between them, and every step's output is fed back, so that the queue stays as it is (the running
requests decode, nothing ends). Three cases: the batch is full (nothing can be admitted); it isn't (the queue is
searched for requests that fit, which in vLLM means passing over all of it); and it isn't while requests have aged, so
that room is being made for the oldest of those whose adapters are ready.

    python benchmarks/scheduler_overhead.py --model DIR --json FILE
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "engine"))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

RUNNING, ADAPTERS, SLOTS = 256, 500, 8


def bring_in(scheduler: Any, workers: Any) -> None:
    """The running requests' adapters are ready before there are requests: else the first ones, whose steps are fast,
    may end before a busy machine has answered for the last adapter."""
    from scheduler_harness import step

    for adapter in range(1, SLOTS + 1):
        workers.bring_in(adapter)
    deadline = time.monotonic() + 60
    while len(list(scheduler.readiness.ready())) < SLOTS:
        step(scheduler)
        time.sleep(0.005)
        if time.monotonic() > deadline:
            raise TimeoutError(f"the workers' reports of {SLOTS} adapters did not come")


def fill(scheduler: Any, waiting: int) -> None:
    """256 running requests of 8 adapters that decode for ever, then `waiting` of 500 adapters."""
    from scheduler_harness import make_request, step

    for i in range(RUNNING):
        scheduler.add_request(make_request(f"run{i}", 16, 1900, adapter=1 + i % SLOTS))
    deadline = time.monotonic() + 60
    while len(scheduler.running) < RUNNING:
        step(scheduler)
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {len(scheduler.running)} of {RUNNING} requests run")
    for i in range(waiting):
        scheduler.add_request(make_request(f"wait{i}", 16, 1900, adapter=SLOTS + 1 + i % (ADAPTERS - SLOTS)))
    for _ in range(20):
        step(scheduler)
        time.sleep(0.005)


def timed_step(scheduler: Any) -> float:
    """Seconds of one `schedule()`; its output is fed back outside the time."""
    from scheduler_harness import model_output

    begin = time.perf_counter()
    output = scheduler.schedule()
    seconds = time.perf_counter() - begin
    assert output.total_num_scheduled_tokens == RUNNING
    scheduler.update_from_output(output, model_output(scheduler, output))
    return seconds


def compare(model: str, waiting: int, case: str, steps: int) -> dict[str, float]:
    """Median times in microseconds of both schedulers, and ours over vLLM's; case: full, open or aged."""
    from fake_workers import FakeWorkers
    from scheduler_harness import make_scheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_loraserve.engine import channel
    from vllm_loraserve.engine.scheduler import RankAwareScheduler

    shape = {
        "blocks": 60000,
        "max_seqs": RUNNING if case == "full" else 2 * RUNNING,
        "max_tokens": 8192,
        "max_loras": SLOTS,
        "caching": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/channel"
        channel.address_of = lambda _, purpose="loads": f"{address}-{purpose}"  # type: ignore[assignment]
        workers = FakeWorkers(f"{address}-loads")
        stock = make_scheduler(Scheduler, model, **shape)
        fill(stock, waiting)
        ageing = {"max_skip_s": 0.0, "skip_window": 0} if case == "aged" else {"max_skip_s": 1e6, "skip_window": 10**9}
        ours = make_scheduler(RankAwareScheduler, model, **shape, options=ageing)
        bring_in(ours, workers)
        fill(ours, waiting)
        # As the engine core does at start: collections would hit either side at random.
        gc.collect()
        gc.freeze()
        gc.disable()
        times: dict[str, list[float]] = {"ours": [], "stock": []}
        for number in range(steps):
            pair = [("ours", ours), ("stock", stock)]
            for name, scheduler in pair if number % 2 else pair[::-1]:
                times[name].append(timed_step(scheduler))
        gc.enable()
        gc.unfreeze()
        assert (case == "aged") == (ours.counters.drains >= steps)
        ours.shutdown()
        workers.close()
    medians = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    return {
        "ours_us": round(medians["ours"], 1),
        "stock_us": round(medians["stock"], 1),
        "ratio": round(medians["ours"] / medians["stock"], 3),
    }


def main() -> int:
    """Runs all cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("LORASERVE_TEST_MODEL"), help="model directory (its config)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model is None:
        from vllm_loraserve.launcher import assets

        args.model = str(assets.model_path())
    rows = {}
    print(f"{'batch':<10}{'waiting':>8}{'vLLM us':>10}{'ours us':>10}{'ours/vLLM':>11}")
    for case in ("full", "open", "aged"):
        for waiting in (500, 1000, 2000, 4000):
            row = rows[f"{case}_{waiting}"] = compare(args.model, waiting, case, args.steps)
            print(f"{case:<10}{waiting:>8}{row['stock_us']:>10}{row['ours_us']:>10}{row['ratio']:>11}")
    result = {
        "schedule_ratio": rows["full_2000"]["ratio"],
        "schedule_ratio_open": rows["open_2000"]["ratio"],
        "schedule_ratio_aged": rows["aged_2000"]["ratio"],
        "growth_500_to_4000_ours": round(rows["full_4000"]["ours_us"] / rows["full_500"]["ours_us"], 3),
        "growth_500_to_4000_stock": round(rows["full_4000"]["stock_us"] / rows["full_500"]["stock_us"], 3),
        "growth_open_500_to_4000_ours": round(rows["open_4000"]["ours_us"] / rows["open_500"]["ours_us"], 3),
        "growth_open_500_to_4000_stock": round(rows["open_4000"]["stock_us"] / rows["open_500"]["stock_us"], 3),
        "growth_aged_500_to_4000_ours": round(rows["aged_4000"]["ours_us"] / rows["aged_500"]["ours_us"], 3),
        "rows": rows,
        "running": RUNNING,
        "adapters": ADAPTERS,
        "slots": SLOTS,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": "python " + " ".join(sys.argv),
    }
    print(json.dumps({k: v for k, v in result.items() if k.startswith(("schedule", "growth"))}, indent=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
