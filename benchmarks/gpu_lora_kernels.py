"""Speed of the LoRA kernels on a GPU: vLLM's own Triton kernels beside ours, under CUDA graphs, weights out of cache.

    python benchmarks/gpu_lora_kernels.py --json benchmarks/results/gpu_lora_kernels.json [--vllm-source DIR]

Needs PyTorch, Triton and one CUDA device, not vLLM itself: `--vllm-source` names an unpacked vLLM wheel, whose kernel
sources are loaded (default: the installed vLLM). Sections (`--only`), each case written to the JSON when it is done:

    constants     what the device can do: memory and L2 bandwidth, exiting thread blocks, graph nodes
    correctness   both sides against float64, bf16 and fp16, unused pages poisoned with NaN
    linears       four linears x two models x seven batches: stock default, specialised, tuned, stock at the batch's
                  own largest rank, ours; share of the roofline
    interference  fifteen adapters of rank 8 and one of 8..128
    slots         16 active adapters of 16..256 slots
    step          a whole stack of layers, base GEMMs and LoRA, in one graph (decode and prefill)
    sweep         block sizes for ours, best first: what `tuning.py` should say

and `goals`, judged anew on all that the JSON holds (`gpu_lora_goals.py`). With `--only`, cases that are timed again
take the place of their earlier figures and all others stay.

`--tiny --device cpu` with TRITON_INTERPRET=1 runs all of it on toy shapes to test the logic; those times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_lora_goals import judge, lines
from gpu_lora_sides import (
    Ours,
    Stock,
    errors_against_reference,
    expand_sweep,
    inputs,
    random_weights,
    shrink_sweep,
    stock_rank_for,
    sweep_axes,
    weight_sets,
)
from gpu_lora_timing import Timer, device_constants

from vllm_loraserve.kernels.cost import Batch, LayerShape, count_ours
from vllm_loraserve.kernels.lora_linear import device_shape
from vllm_loraserve.kernels.stock_sources import configured, load_stock
from vllm_loraserve.kernels.tuning import ENGINE_MAX_RANK, GRAPH_TOKENS, LaunchConfig
from vllm_loraserve.kernels.workloads import MODELS, batches, interference, slots_sweep, spread

PEAK_FLOPS = 800e12
"""Dense bf16 of an H100 SXM in practice; only the share of the roofline depends on it."""
CASE = ("model", "layer", "batch", "rank", "slots")
"""What tells the rows of a section apart."""
SAME = ("measured", "device", "torch", "triton", "vllm", "table_rank")
"""What figures in one JSON must have in common."""
TINY_MODELS = {"toy": (LayerShape("kv", 64, (32, 16), 1),)}
TINY_BATCHES = (
    Batch("D1 toy decode", spread(6, 3), (8, 16, 3), 16),
    Batch("P1 toy prefill", (0,) * 66 + (1,) * 66 + (-1,) * 3, (8, 5, 0), 16),
)
EVERY_RANK = Batch("ranks 1..128", spread(60, 15), (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64, 100, 128), 128)


class Run:
    """Options, the device and the growing result of one invocation."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tiny: bool = options.tiny
        self.device = torch.device(options.device)
        self.dtype = torch.float16 if self.tiny else torch.bfloat16
        self.graph_tokens = 64 if self.tiny else GRAPH_TOKENS
        self.timer = Timer(self.device, repeats=options.repeats)
        self.stock: SimpleNamespace = load_stock(options.vllm_source)
        if self.tiny:
            # Interpreted programs take milliseconds each: few of them.
            small = {"shrink": {"split_k": 2, "block_k": 32}, "expand": {}}
            stack = ExitStack()
            stack.enter_context(configured(self.stock, lambda op, config: config | small[op]))
            self._configured = stack
        names = options.models.split(",") if options.models else None
        models = TINY_MODELS if self.tiny else MODELS
        self.models = {name: layers for name, layers in models.items() if names is None or name in names}
        prefixes = tuple(options.cases.split(",")) if options.cases else ("",)
        self.batches = [b for b in (TINY_BATCHES if self.tiny else batches()) if b.name.startswith(prefixes)]
        self.result: dict[str, Any] = {
            "measured": self.timer.measures,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(self.device) if self.timer.measures else "cpu (interpreter)",
            "torch": torch.__version__,
            "triton": __import__("triton").__version__,
            "vllm": self.stock.version,
            "python": platform.python_version(),
            "table_rank": ENGINE_MAX_RANK,
            "commands": [" ".join(sys.argv)],
        }
        if options.json and options.json.exists() and options.only:
            self.result = continued(options.json, self.result)

    def save(self, section: str, value: Any) -> None:
        self.result[section] = value
        self.result["goals"] = judge(self.result)
        if self.options.json:
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            self.options.json.write_text(json.dumps(self.result, indent=1) + "\n")

    def add(self, section: str, row: dict[str, Any]) -> dict[str, Any]:
        """Save one row, in place of an earlier one of the same case; returns it."""
        others = [r for r in self.result.get(section, []) if any(r.get(name) != row.get(name) for name in CASE)]
        self.save(section, [*others, row])
        return row

    def cases(self) -> Iterator[tuple[str, LayerShape, Batch]]:
        for model, layers in self.models.items():
            for layer in layers:
                for batch in self.batches:
                    yield model, layer, batch

    def free(self) -> None:
        """Give the last case's weights back before the next one allocates."""
        self.stock.forget_addresses()
        gc.collect()
        if self.timer.measures:
            torch.cuda.empty_cache()


def continued(file: Path, new: dict[str, Any]) -> dict[str, Any]:
    """What `file` holds, to be added to; an error if those figures were taken under other conditions."""
    old: dict[str, Any] = json.loads(file.read_text())
    for name in SAME:
        if old.get(name) != new[name]:
            raise SystemExit(f"{file} has {name} {old.get(name)!r}, now it is {new[name]!r}: name another --json")
    return old | new | {"commands": old["commands"] + new["commands"]}


def constants(run: Run) -> None:
    found = device_constants(run.timer, tiny=run.tiny)
    say(found)
    run.save("constants", found)


def correctness(run: Run) -> None:
    rows = []
    dtypes = (run.dtype,) if run.tiny else (torch.bfloat16, torch.float16)
    every = [] if run.tiny else [EVERY_RANK]
    for layer, batch in (
        (layer, batch) for of in run.models.values() for layer in of for batch in [*run.batches, *every]
    ):
        if len(batch.token_slots) > 2048:
            continue  # the float64 reference runs on the host
        for dtype in dtypes:
            odd = dataclasses.replace(
                batch, slot_ranks=tuple(min(r, batch.max_rank) - (r > 8) for r in batch.slot_ranks)
            )
            rows += [
                errors_against_reference(run.stock, layer, b, run.device, dtype, run.graph_tokens) for b in (batch, odd)
            ]
            run.free()
    worst = max(rows, key=lambda row: row["ours"] if row["ours"] == row["ours"] else float("inf"))
    bad = [row for row in rows if not (row["ours"] < 0.02 and row["base_rows_unchanged"])]
    say(f"correctness: {len(rows)} cases, worst {worst}, {len(bad)} wrong")
    if bad:
        raise SystemExit(f"wrong results, timings would be worthless: {bad[:3]}")
    run.save("correctness", rows)


def tune_stock(
    run: Run, layer: LayerShape, batch: Batch, side: Stock, sets: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Best shrink and best expand blocks for stock, each swept alone."""
    x, y = inputs(layer, batch, run.device, run.dtype)
    tokens = len(batch.token_slots)
    buffer = torch.zeros((side.n_slices, tokens, side.rank), dtype=torch.float32, device=run.device)
    quick = Timer(run.device, repeats=3, min_seconds=0.005)

    def best(op: str, sweep: Iterator[dict[str, int]], launch: Callable[[int], None]) -> dict[str, int]:
        times = {}
        candidates = [{}, *sweep]
        for index, blocks in enumerate(candidates[:2] if run.tiny else candidates):
            with configured(run.stock, lambda o, config, blocks=blocks: config | (blocks if o == op else {})):
                try:
                    work = {"": lambda: [launch(i) for i in range(sets)] and None}
                    times[index] = quick.compare(work, sets)[""]
                except Exception as error:  # a tile too large for the device's shared memory
                    say(f"stock {op} {blocks}: {type(error).__name__}")
        return candidates[min(times, key=lambda index: times[index])]

    shrink = best("shrink", shrink_sweep(tokens), lambda i: side.shrink(i, buffer, x))
    expand = best("expand", expand_sweep(tokens, side.rank), lambda i: side.expand(i, y, buffer))
    return shrink, expand


def sides_of(run: Run, layer: LayerShape, batch: Batch, sets: int, *, tuned: bool = True) -> list[Any]:
    """Stock default, specialised, tuned (and specialised), at the batch's own rank (specialised), and ours."""
    run.stock.forget_addresses()
    common = (run.stock, layer, batch, sets, run.device, run.dtype)
    default = Stock(*common, name="stock")
    specialised = Stock(*common, name="stock specialised", specialised=True, weights=default.weights)
    sides: list[Any] = [default, specialised]
    if tuned:
        sides.append(specialised.with_blocks("stock tuned", *tune_stock(run, layer, batch, specialised, sets)))
    own = stock_rank_for(batch)
    if own < batch.max_rank:
        sides.append(Stock(*common, name="stock at own rank", specialised=True, rank=own))
    sides.append(Ours(layer, batch, sets, run.device, run.dtype, graph_tokens=run.graph_tokens))
    return sides


def call_all(side: Any, y: torch.Tensor, x: torch.Tensor, sets: int) -> None:
    """One LoRA linear with each of the weight sets in turn."""
    for index in range(sets):
        side.call(index, y, x)


def time_sides(run: Run, layer: LayerShape, batch: Batch, *, tuned: bool = True) -> dict[str, Any]:
    slots = len(batch.slot_ranks)
    # In prefill x and y alone are larger than the L2 cache.
    most = 64 if len(batch.token_slots) <= run.graph_tokens else 8
    sets = 1 if run.tiny else weight_sets(layer, batch, slots, most=most, budget_bytes=run.options.gib * 2**30)
    sides = sides_of(run, layer, batch, sets, tuned=tuned)
    x, y = inputs(layer, batch, run.device, run.dtype)
    works = {side.name: partial(call_all, side, y, x, sets) for side in sides}
    times = run.timer.compare(works, sets)
    blocks = next((side.overrides for side in sides if side.name == "stock tuned"), None)
    row = {"layer": layer.name, "batch": batch.name, "sets": sets, "us": times, "tuned_blocks": blocks}
    row["ratio"] = {name: value / times["ours"] for name, value in times.items() if name != "ours"}
    row["roofline_share"] = roofline_us(run, layer, batch) / times["ours"]
    del sides, works
    run.free()
    return row


def roofline_us(run: Run, layer: LayerShape, batch: Batch) -> float:
    """The least time that adapter weights, x and y (read and written once) and the needed operations allow."""
    cost = count_ours(layer, batch, device_shape(run.device))
    rows = int(batch.tokens_per_slot.sum())
    moved = cost.weight_bytes + rows * (layer.in_size + 2 * sum(layer.out_sizes)) * 2
    bandwidth = run.result.get("constants", {}).get("copy_bytes_per_second", 3.0e12)
    return max(moved / bandwidth, cost.useful_flops / PEAK_FLOPS) * 1e6


def table(run: Run, title: str, rows: list[dict[str, Any]], first: tuple[str, ...]) -> None:
    """Print rows aligned in columns (a GPU machine need not have more than PyTorch and Triton)."""
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    others = [name for name in names if name != "ours"]
    lines = [[*first, *(f"{name}, us" for name in names), *(f"{name} / ours" for name in others), "roofline"]]
    for row in rows:
        times = [f"{row['us'][name]:.1f}" if name in row["us"] else "" for name in names]
        ratios = [f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "" for name in others]
        share = f"{row['roofline_share']:.0%}" if "roofline_share" in row else ""
        lines.append([*(str(row[name]) for name in first), *times, *ratios, share])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    say(f"\n{title}" + ("" if run.timer.measures else " (interpreter: times mean nothing)"))
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def say(text: object) -> None:
    print(text, flush=True)


def linears(run: Run) -> None:
    rows = [run.add("linears", {"model": model} | time_sides(run, layer, batch)) for model, layer, batch in run.cases()]
    table(run, "one linear", rows, ("model", "layer", "batch"))


def interference_curve(run: Run) -> None:
    """Stock at rank 128 whatever is in the batch, ours by what is in it."""
    rows = []
    for model, layers in run.models.items():
        for rank in (8, 16) if run.tiny else (8, 16, 32, 64, 128):
            batch = Batch(f"toy {rank}", spread(6, 3), (8, 8, rank), 16) if run.tiny else interference(rank)
            rows += [
                run.add("interference", {"model": model, "rank": rank} | time_sides(run, layer, batch, tuned=False))
                for layer in layers
            ]
    table(run, "one large adapter among small ones", rows, ("model", "layer", "rank"))


def slots(run: Run) -> None:
    """Cost against the number of slots, 16 of them active, on the first linear of the first model."""
    model, layers = next(iter(run.models.items()))
    rows = []
    for count in (4, 8) if run.tiny else (16, 32, 64, 128, 256):
        batch = (
            Batch(f"toy {count}", spread(6, 3), (8, 16, 3) + (0,) * (count - 3), 16) if run.tiny else slots_sweep(count)
        )
        row = {"model": model, "slots": count} | time_sides(run, layers[0], batch, tuned=False)
        rows.append(run.add("slots", row))
    table(run, "slots", rows, ("model", "layer", "slots"))


def step(run: Run) -> None:
    """Every layer of a model: base GEMM and LoRA of each linear, all in one graph; ratios are of whole steps."""
    rows = []
    for model, layers in run.models.items():
        count = 1 if run.tiny else layers[0].count
        base = [
            [
                torch.empty(one.in_size, sum(one.out_sizes), dtype=run.dtype, device=run.device).normal_(std=0.02)
                for one in layers
            ]
            for _ in range(count)
        ]
        for batch in run.batches:
            row = {"model": model, "layer": "all", "batch": batch.name} | time_step(run, layers, batch, base)
            rows.append(run.add("step", row))
            run.free()
    table(run, "whole step", rows, ("model", "batch"))


def time_step(run: Run, layers: tuple[LayerShape, ...], batch: Batch, base: list[list[torch.Tensor]]) -> dict[str, Any]:
    # Idle slots cost stock only grid, which `slots` measures: leave them out, so that the padded weights fit.
    active = max(batch.token_slots) + 1
    batch = dataclasses.replace(batch, slot_ranks=batch.slot_ranks[:active])
    count = len(base)
    run.stock.forget_addresses()
    stacks: dict[str, list[Any]] = {"stock": [], "stock specialised": [], "stock tuned": [], "ours": []}
    for layer in layers:
        weights = [random_weights(layer, active, batch.max_rank, run.device, run.dtype) for _ in range(count)]
        common = (run.stock, layer, batch, count, run.device, run.dtype)
        stacks["stock"].append(Stock(*common, name="stock", weights=weights))
        special = Stock(*common, name="stock specialised", specialised=True, weights=weights)
        stacks["stock specialised"].append(special)
        blocks = tune_stock(run, layer, batch, special, min(count, 8))
        stacks["stock tuned"].append(special.with_blocks("stock tuned", *blocks))
        stacks["ours"].append(Ours(layer, batch, count, run.device, run.dtype, graph_tokens=run.graph_tokens))
    data = [inputs(layer, batch, run.device, run.dtype) for layer in layers]

    def forward(sides: list[Any] | None) -> None:
        for i in range(count):
            for position, (x, y) in enumerate(data):
                torch.mm(x, base[i][position], out=y)
                if sides is not None:
                    sides[position].call(i, y, x)

    works: dict[str, Callable[[], None]] = {"no LoRA": lambda: forward(None)}
    works |= {name: (lambda sides=sides: forward(sides)) for name, sides in stacks.items()}
    times = run.timer.compare(works, 1)
    ratio = {name: value / times["ours"] for name, value in times.items() if name != "ours"}
    return {"layers": count, "us": times, "ratio": ratio}


def sweep(run: Run) -> None:
    """Block sizes for ours, every (layer, batch): the five best beside what the formulas choose. One group of sizes
    after the other is tried, each around the best of those before it."""
    rows = []
    quick = Timer(run.device, repeats=3, min_seconds=0.005)
    dependent = run.timer.measures and torch.cuda.get_device_capability(run.device) >= (9, 0)
    for model, layer, batch in run.cases():
        sets = 1 if run.tiny else weight_sets(layer, batch, 4, most=32, budget_bytes=run.options.gib * 2**30)
        chosen = Ours(layer, batch, sets, run.device, run.dtype, graph_tokens=run.graph_tokens)
        x, y = inputs(layer, batch, run.device, run.dtype)
        found: dict[LaunchConfig, float] = {}
        axes = sweep_axes(layer.in_size, len(batch.token_slots), dependent_launch=dependent)
        for axis in (lambda config: [config], *axes):
            around = min(found, key=found.__getitem__, default=chosen.launch.config)
            candidates = [config for config in axis(around) if config not in found]
            for config in candidates[:1] if run.tiny else candidates:
                try:
                    options = {"config": config, "blocks": (config.block_m, config.block_r)}
                    side = Ours(
                        layer,
                        batch,
                        sets,
                        run.device,
                        run.dtype,
                        linears=chosen.linears,
                        graph_tokens=run.graph_tokens,
                        **options,
                    )
                    found[config] = quick.compare({"": partial(call_all, side, y, x, sets)}, sets)[""]
                except Exception as error:  # a tile too large for the device's shared memory
                    say(f"ours {config}: {type(error).__name__}")
        formula = found[chosen.launch.config]
        best = sorted(found, key=found.__getitem__)[:5]
        row = {
            "model": model,
            "layer": layer.name,
            "batch": batch.name,
            "tried": len(found),
            "us": {"ours": formula, "best": found[best[0]]},
            "ratio": {"best": found[best[0]] / formula},
            "best": [{"us": found[config]} | dataclasses.asdict(config) for config in best],
        }
        rows.append(run.add("sweep", row))
        del chosen
        run.free()
    table(
        run,
        "block sizes for ours (best / formulas below 1: there is something to gain)",
        rows,
        ("model", "layer", "batch"),
    )


SECTIONS: dict[str, Callable[[Run], None]] = {
    "constants": constants,
    "correctness": correctness,
    "linears": linears,
    "interference": interference_curve,
    "slots": slots,
    "step": step,
    "sweep": sweep,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results here after every section (with --only: update it)")
    parser.add_argument("--vllm-source", help="an unpacked vLLM wheel (default: the installed vLLM)")
    parser.add_argument("--only", help=f"sections, comma-separated: {','.join(SECTIONS)}")
    parser.add_argument("--models", help=f"comma-separated: {','.join(MODELS)}")
    parser.add_argument("--cases", help="batches by prefix, comma-separated, for example D1,P2")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats; the median counts")
    parser.add_argument("--gib", type=float, default=24, help="device memory for rotating weight sets")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to test the logic in the interpreter")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; to test the logic use --tiny --device cpu with TRITON_INTERPRET=1")
    wanted = options.only.split(",") if options.only else list(SECTIONS)
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown sections {unknown}; there are {', '.join(SECTIONS)}")
    run = Run(options)
    for name in wanted:
        SECTIONS[name](run)
    say("\n" + "\n".join(lines(judge(run.result))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
