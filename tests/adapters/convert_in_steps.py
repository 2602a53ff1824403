"""Run as a program by test_streaming.py: what converting a large adapter takes of this process's own memory.

Looked at before and after each tensor is read, not by a clock, so that a slow machine sees the same. File pages do not
count: the kernel takes them back when it wants to. Arguments: a directory of a checkpoint, its layers, its features.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_loraserve.adapters.checkpoint import open_checkpoint
from vllm_loraserve.adapters.convert import ModulePlan, WeightsReader, slice_ranks, write_pages
from vllm_loraserve.adapters.layout import ModuleShape, build_layout
from vllm_loraserve.memory.host_tier import HostTier


def own_bytes() -> int:
    """Anonymous and shared memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


class Watched(WeightsReader):
    """Notes the most memory that any read found."""

    most = 0

    def tensor(self, entry: Any) -> torch.Tensor:
        self.most = max(self.most, own_bytes())
        tensor = super().tensor(entry)
        self.most = max(self.most, own_bytes())
        return tensor


def main() -> None:
    folder, layers, features = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(layers)]
    layout = build_layout(
        [ModuleShape(name, "q_proj", features, (features,)) for name in names],
        model="m",
        dtype="bfloat16",
        page_rows=8,
        tp_rank=0,
        tp_size=1,
    )
    checkpoint = open_checkpoint(folder)
    reader = Watched(checkpoint)
    plans = [ModulePlan(module.name, [module], lambda pairs: pairs) for module in checkpoint.modules]
    ranks = slice_ranks(layout, plans, {name: [0] for name in names})
    size = layout.size_bytes(layout.pages_for(ranks))
    tier = HostTier(layout, 2 * size)
    before = own_bytes()
    entry = tier.create(1, "", ranks)
    write_pages(reader, layout, plans, ranks, tier.targets(entry))
    entry.digest = reader.digest()
    tier.commit(entry)
    grown = max(reader.most, own_bytes()) - before
    print(json.dumps({"pages": size, "grown": grown, "file": checkpoint.weights_path.stat().st_size}))


if __name__ == "__main__":
    main()
