"""Compiles the GPU kernels before the first request.

Batches up to the largest captured one are launched while CUDA graphs are captured. Larger ones choose among some
dozens of variants, and the first step that wants one would wait for the compiler, half a second or a whole one. Here
each is launched once, on an empty list of work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch

from vllm_loraserve.kernels.lora_linear import device_shape, plan_launch, run_expand, run_shrink
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.paged import PagedLinear
from vllm_loraserve.kernels.tuning import SMALL_RANK, DeviceShape, LaunchConfig, choose


def launch_configs(linear: PagedLinear, metadata: StepMetadata, device: DeviceShape) -> set[LaunchConfig]:
    """All configurations that `plan_launch` chooses for this layer, whatever the batch (and a few more)."""
    found = set()
    tops = (linear.max_rank,) if metadata.batch_invariant else (SMALL_RANK, linear.max_rank)
    # With an item for every SM K is not split, and more items change nothing.
    for (block_m, block_r), top_rank, items in itertools.product(metadata.all_blocks(), tops, range(1, device.sms + 1)):
        found.add(
            choose(
                k=linear.in_size,
                n_slices=linear.n_slices,
                block_m=block_m,
                block_r=block_r,
                items=items,
                top_rank=top_rank,
                device=device,
                aligned=linear.aligned,
                batch_invariant=metadata.batch_invariant,
            )
        )
    return found


def distinct(linears: Iterable[PagedLinear]) -> Iterator[PagedLinear]:
    """One layer of each kind: a model repeats the same few."""
    kinds = set()
    for linear in linears:
        kind = (
            (linear.in_size, linear.out_sizes, linear.page_stride, linear.page_rows, linear.aligned, linear.max_rank),
            *(tensor.data_ptr() % 16 for tensor in (linear.arena, linear.page_table, linear.ranks)),
        )
        if kind not in kinds:
            kinds.add(kind)
            yield linear


def warm_up(linears: Iterable[PagedLinear], metadata: StepMetadata, *, add_inputs: Iterable[bool] = (True,)) -> int:
    """Launch every variant of both kernels for these layers once; how many there are. Writes nothing.

    add_inputs: the values that the layers will ask for (see `lora_linear`).
    """
    launches = 0
    for linear in distinct(linears):
        for config in launch_configs(linear, metadata, device_shape(linear.arena.device)):
            launches += _launch_nothing(linear, config, add_inputs)
    return launches


def _launch_nothing(linear: PagedLinear, config: LaunchConfig, add_inputs: Iterable[bool]) -> int:
    """Both kernels on the plan of a batch without tokens: every program leaves at once; how many launches."""
    device, dtype = linear.arena.device, linear.arena.dtype
    blocks = (config.block_m, config.block_r)
    plan = StepMetadata(slots=1, max_rank=1, graph_tokens=1, device=device, blocks=blocks).plan
    launch = plan_launch(linear, plan, 1, device_shape(device), graph_tokens=1, config=config)
    planes = torch.empty(launch.planes, dtype=torch.float32, device=device)
    x = torch.empty(1, linear.in_size, dtype=dtype, device=device)
    y = torch.empty(1, sum(linear.out_sizes), dtype=dtype, device=device)
    run_shrink(planes, x, linear, plan, launch)
    wanted = set(add_inputs)
    for one in wanted:
        run_expand(y, planes, linear, plan, launch, add_inputs=one)
    return 1 + len(wanted)
