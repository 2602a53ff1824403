"""LoRA of one linear layer on a CPU: vLLM's operations and ours on the same batch, alternating.

Stock: vLLM's PunicaWrapperCPU over stacks padded to the largest rank of the mix. Ours: the paged wrapper. Both
are called through `add_lora_linear` with metadata made beforehand, as a layer does in a step. A ratio is
stock's median time over ours, `ratio_min` that of the shortest times; above 1 ours is faster. On a busy machine
whichever side waits for OpenMP's threads is stretched: a case whose median on either side is over STRETCHED times its
shortest time is marked, and its ratio says nothing. These are CPU factors: stock's CPU path gathers a padded
matrix for every token, which its GPU kernels do not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as StockWrapper

from vllm_loraserve.adapters.layout import ModuleShape, build_layout
from vllm_loraserve.kernels import cpu_native
from vllm_loraserve.kernels.paged import PagedLinear
from vllm_loraserve.kernels.punica_cpu import PunicaWrapperCPU

MIX = (8, 16, 8, 32, 8, 64, 16, 128)
RANKS = {"r8": (8,), "r128": (128,), "mixed": MIX}
PAGE_ROWS = 8


def ranks_of(kind: str, adapters: int) -> list[int]:
    """Rank of each adapter. The mix of few adapters still holds both ends."""
    if kind != "mixed":
        return [RANKS[kind][0]] * adapters
    if adapters == 1:
        return [8]
    if adapters == 4:
        return [8, 16, 32, 128]
    return [MIX[i % len(MIX)] for i in range(adapters)]


def paged_layer(ranks: list[int], hidden: int, a: list[torch.Tensor], b: list[torch.Tensor]) -> PagedLinear:
    layout = build_layout(
        [ModuleShape("m", "m", hidden, (hidden,))],
        model="bench",
        dtype="bfloat16",
        page_rows=PAGE_ROWS,
        tp_rank=0,
        tp_size=1,
    )
    place, stride = layout.groups[0].places[0], layout.groups[0].page_elements
    counts = [-(-rank // PAGE_ROWS) for rank in ranks]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).tolist()
    arena = torch.zeros(sum(counts) * stride, dtype=torch.bfloat16)
    table = torch.zeros((len(ranks), max(counts)), dtype=torch.int32)
    for slot, rank in enumerate(ranks):
        for page in range(counts[slot]):
            number = order.pop()
            table[slot, page] = number
            for row in range(min(PAGE_ROWS, rank - page * PAGE_ROWS)):
                for offset, source in (
                    (place.a_offset, a[slot][page * PAGE_ROWS + row]),
                    (place.b_offset, b[slot][:, page * PAGE_ROWS + row]),
                ):
                    start = number * stride + offset + row * hidden
                    arena[start : start + hidden] = source
    return PagedLinear(
        arena=arena,
        page_table=table,
        ranks=torch.tensor([ranks], dtype=torch.int32),
        page_stride=stride,
        page_rows=PAGE_ROWS,
        a_offsets=(place.a_offset,),
        b_offsets=(place.b_offset,),
        in_size=hidden,
        out_sizes=(hidden,),
        name="bench",
    )


STRETCHED = 1.5


def timed(call: Callable[[], None], at_least: float) -> float:
    """Seconds of one call, averaged over as many as take `at_least` seconds."""
    count, began = 0, time.perf_counter()
    while True:
        call()
        count += 1
        spent = time.perf_counter() - began
        if spent >= at_least:
            return spent / count


def measure(kind: str, tokens: int, adapters: int, hidden: int, *, prefill: bool, repeats: int) -> dict[str, Any]:
    ranks = ranks_of(kind, adapters)
    padded = max(ranks) if kind != "mixed" else 128
    torch.manual_seed(0)
    a = [torch.randn(rank, hidden).bfloat16() * 0.05 for rank in ranks]
    b = [torch.randn(hidden, rank).bfloat16() * 0.05 for rank in ranks]
    a_stacked = torch.zeros(adapters, 1, padded, hidden, dtype=torch.bfloat16)
    b_stacked = torch.zeros(adapters, 1, hidden, padded, dtype=torch.bfloat16)
    for slot, rank in enumerate(ranks):
        a_stacked[slot, 0, :rank], b_stacked[slot, 0, :, :rank] = a[slot], b[slot]
    linear = paged_layer(ranks, hidden, a, b)
    # Decode: a token of each request, adapters round robin. Prefill: one run of tokens for each adapter.
    ids = tuple(
        sorted(t % adapters + 1 for t in range(tokens)) if prefill else (t % adapters + 1 for t in range(tokens))
    )
    mapping = LoRAMapping(ids, ids, is_prefill=True)
    wrappers = (StockWrapper(tokens, tokens, "cpu"), PunicaWrapperCPU(tokens, tokens, "cpu"))
    for wrapper in wrappers:
        wrapper.update_metadata(mapping, list(range(1, adapters + 1)), adapters + 1, 1000)
    wrappers[1].configure_paged(max_rank=256)
    wrappers[1].register_linear(linear)
    x, y = torch.randn(tokens, hidden).bfloat16(), torch.zeros(tokens, hidden).bfloat16()

    def stock() -> None:
        wrappers[0].add_lora_linear(y, x, (a_stacked,), (b_stacked,), 1.0, (hidden,))

    def ours() -> None:
        wrappers[1].add_lora_linear(y, x, (linear.handle,), (linear.handle,), 1.0, (hidden,))

    stock()
    expected = y.clone()
    y.zero_()
    ours()
    error = float((y.float() - expected.float()).abs().max() / expected.float().abs().max())
    if error > 0.03:
        raise SystemExit(f"stock and ours disagree by {error:.3f} for {kind}, {tokens} tokens, hidden {hidden}")
    slow = timed(stock, 0.0) > 0.1
    stock_times, ours_times = [], []
    for _ in range(3 if slow else repeats):
        stock_times.append(timed(stock, 0.0 if slow else 0.004))
        ours_times.append(timed(ours, 0.004))
        y.zero_()
    stock_s, ours_s = statistics.median(stock_times), statistics.median(ours_times)
    return {
        "name": f"{'prefill' if prefill else 'decode'} {tokens} tokens, {adapters} adapters {kind}, hidden {hidden}",
        "kind": kind,
        "phase": "prefill" if prefill else "decode",
        "tokens": tokens,
        "adapters": adapters,
        "hidden": hidden,
        "stock_rank": padded,
        "stock_us": stock_s * 1e6,
        "ours_us": ours_s * 1e6,
        "stock_us_min": min(stock_times) * 1e6,
        "ours_us_min": min(ours_times) * 1e6,
        "ratio": stock_s / ours_s,
        "ratio_min": min(stock_times) / min(ours_times),
        "stretched": stock_s > STRETCHED * min(stock_times) or ours_s > STRETCHED * min(ours_times),
    }


def lower(case: dict[str, Any]) -> float:
    return float(min(case["ratio"], case["ratio_min"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--hidden", type=int, nargs="+", default=[576, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-prefill", action="store_true", help="decode only (stock's prefill takes minutes)")
    options = parser.parse_args()
    native = cpu_native.load()
    cases = []
    for hidden in options.hidden:
        shapes = [(t, n, False) for t in (1, 16, 64) for n in (1, 4, 16) if n <= t]
        shapes += [] if options.no_prefill else [(512, n, True) for n in (1, 4, 16)]
        for tokens, adapters, prefill in shapes:
            for kind in RANKS:
                case = measure(kind, tokens, adapters, hidden, prefill=prefill, repeats=options.repeats)
                cases.append(case)
                mark = "   STRETCHED" if case["stretched"] else ""
                print(
                    f"{case['name']:58} stock {case['stock_us']:11.1f} us   ours {case['ours_us']:9.1f} us   "
                    f"{case['ratio']:8.2f}x, {case['ratio_min']:.2f}x at best{mark}",
                    flush=True,
                )
    several = [case for case in cases if case["kind"] == "mixed" and case["adapters"] > 1]
    result = {
        "benchmark": "cpu_lora_ops",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/cpu_lora_ops.py", *sys.argv[1:]]),
        "device": f"CPU, {os.cpu_count()} cores, torch threads {torch.get_num_threads()}",
        "isa": native.isa if native is not None else "torch",
        "cases": cases,
        # Of both ratios the smaller one: a claim has to hold for either.
        "min_ratio": min(map(lower, cases)),
        "mixed_prefill_min": min((lower(c) for c in several if c["phase"] == "prefill"), default=None),
        "mixed_decode_min": min((lower(c) for c in several if c["phase"] == "decode"), default=None),
        "stretched": [case["name"] for case in cases if case["stretched"]],
    }
    print({key: result[key] for key in ("isa", "min_ratio", "mixed_prefill_min", "mixed_decode_min", "stretched")})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
