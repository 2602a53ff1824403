"""Count programs, bytes and operations of the LoRA kernels, stock vLLM beside ours. A count, not a speed.

    python benchmarks/lora_cost_count.py --json benchmarks/results/lora_cost_count.json

Deterministic: needs no GPU and gives the same figures everywhere, so that CI compares them with the stored ones
(`--check FILE`). What is counted: `vllm_loraserve/kernels/cost.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_loraserve.kernels.cost import Batch, Cost, LayerShape, count_ours, count_stock
from vllm_loraserve.kernels.stock_sources import load_stock
from vllm_loraserve.kernels.tuning import DeviceShape
from vllm_loraserve.kernels.workloads import MODELS, batches, interference, slots_sweep

RATIOS = ("launches", "programs", "live_programs", "weight_bytes", "issued_bytes", "flops")
DEVICE = DeviceShape()


def whole_step(stock: Any, layers: tuple[LayerShape, ...], batch: Batch) -> dict[str, Any]:
    """All LoRA linears of one model step: ours, stock as it comes, and stock with active-adapter specialisation."""
    ours = stock_default = stock_specialised = Cost()
    for layer in layers:
        ours += count_ours(layer, batch, DEVICE) * layer.count
        stock_default += count_stock(stock, layer, batch) * layer.count
        stock_specialised += count_stock(stock, layer, batch, specialised=True) * layer.count
    return {
        "name": batch.name,
        "ours": asdict(ours),
        "stock": asdict(stock_default),
        "stock_specialised": asdict(stock_specialised),
        "ratio": {name: round(getattr(stock_default, name) / getattr(ours, name), 3) for name in RATIOS},
        "ratio_specialised": {
            name: round(getattr(stock_specialised, name) / getattr(ours, name), 3) for name in RATIOS
        },
    }


def measure(source: str | None) -> dict[str, Any]:
    stock = load_stock(source)
    result: dict[str, Any] = {
        "kind": "count, not a speed",
        "vllm": stock.version,
        "device_shape": asdict(DEVICE),
        "cases": [],
        "interference": [],
        "slots": [],
    }
    for model, layers in MODELS.items():
        result["cases"] += [{"model": model} | whole_step(stock, layers, batch) for batch in batches()]
    layers = MODELS["llama-3.1-8b"]
    for rank in (8, 16, 32, 64, 128):
        result["interference"].append({"rank": rank} | whole_step(stock, layers, interference(rank)))
    for slots in (16, 32, 64, 128, 256):
        result["slots"].append({"slots": slots} | whole_step(stock, layers, slots_sweep(slots)))
    return result


def show(result: dict[str, Any]) -> None:
    console = Console(width=150)
    for title, rows, first in (
        ("one model step, stock / ours", result["cases"], "model"),
        ("one large adapter among small ones (Llama-3.1-8B)", result["interference"], "rank"),
        ("slots (Llama-3.1-8B)", result["slots"], "slots"),
    ):
        table = Table(title=f"{title}: counts, not speeds (vLLM {result['vllm']})")
        for column in (first, "case", *RATIOS, "programs, specialised"):
            table.add_column(column, justify="left" if column in (first, "case") else "right")
        for row in rows:
            ratios = [f"{row['ratio'][name]:.2f}" for name in RATIOS]
            extra = f"{row['ratio_specialised']['programs']:.2f}"
            table.add_row(str(row[first]), row["name"], *ratios, extra)
        console.print(table)


def differences(result: Any, stored: Any, path: str = "") -> list[str]:
    """Every place where two results differ."""
    if isinstance(result, dict) and isinstance(stored, dict):
        keys = sorted(result.keys() | stored.keys())
        return [line for key in keys for line in differences(result.get(key), stored.get(key), f"{path}.{key}")]
    if isinstance(result, list) and isinstance(stored, list) and len(result) == len(stored):
        return [
            line
            for i, pair in enumerate(zip(result, stored, strict=True))
            for line in differences(*pair, f"{path}[{i}]")
        ]
    return [] if result == stored else [f"{path}: {stored} stored, {result} now"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--check", type=Path, help="compare with counts written before; exit 1 on any difference")
    parser.add_argument("--vllm-source", help="an unpacked vLLM wheel (default: the installed vLLM)")
    options = parser.parse_args()
    result = measure(options.vllm_source)
    show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.check:
        changed = differences(result, json.loads(options.check.read_text()))
        print("\n".join(changed[:20]) or "counts are as stored", file=sys.stderr)
        return 1 if changed else 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
