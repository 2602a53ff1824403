"""The Triton kernels in interpreter mode against the float64 reference.

Run by `test_triton_interpreted.py` in a process of its own: TRITON_INTERPRET must be set before Triton is
imported. bfloat16 is broken in the interpreter; it is covered by ahead-of-time compilation and on a GPU.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_loraserve.kernels.lora_linear import device_shape, lora_linear, plan_launch, run_expand, run_shrink
from vllm_loraserve.kernels.metadata import StepMetadata
from vllm_loraserve.kernels.paged import PagedLinear, reference_linear
from vllm_loraserve.kernels.synthetic import synthetic_linear


def metadata_for(linear: PagedLinear, graph_tokens: int, **options) -> StepMetadata:
    metadata = StepMetadata(
        slots=linear.slots, max_rank=linear.max_rank, graph_tokens=graph_tokens, device="cpu", **options
    )
    for slot in range(linear.slots):
        metadata.set_slot_rank(slot, int(linear.ranks[:, slot].max()))
    return metadata


def check(linear, metadata, token_slots, *, padding=0, add_inputs=True, seed=0, planes=None, config=None):
    """Run one step and compare every row; rows and slices without an adapter must be bit-unchanged."""
    slots = np.asarray(token_slots, np.int32)
    metadata.build(slots)
    generator = torch.Generator().manual_seed(seed)
    tokens, width = slots.size + padding, sum(linear.out_sizes)
    x = torch.randn(tokens, linear.in_size, generator=generator).to(linear.arena.dtype)
    y = torch.randn(tokens, width, generator=generator).to(linear.arena.dtype)
    x[slots.size :] = float("nan")
    all_slots = torch.full((tokens,), -1)
    all_slots[: slots.size] = torch.from_numpy(slots).long()
    expected = reference_linear(y, x, linear, all_slots, add_inputs=add_inputs)
    out = y.clone()
    lora_linear(out, x, linear, metadata, add_inputs=add_inputs, planes=planes, config=config)
    tolerance = 2e-5 if linear.arena.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    start = 0
    for s, size in enumerate(linear.out_sizes):
        ranks = torch.where(all_slots >= 0, linear.ranks[s][all_slots.clamp(min=0)].long(), 0)
        idle = ranks == 0
        assert torch.equal(out[idle, start : start + size], y[idle, start : start + size])
        start += size
    return out


layers = st.fixed_dictionaries(
    {
        "in_size": st.sampled_from([16, 64, 200, 1000]),
        "out_sizes": st.sampled_from([(64,), (200,), (96, 96), (160, 40, 40), (136, 8, 8)]),
        "max_rank": st.sampled_from([8, 24, 64]),
        "slots": st.integers(1, 5),
        "page_rows": st.sampled_from([1, 8, 16]),
        "gap": st.sampled_from([0, 3, 16]),
        "dtype": st.sampled_from([torch.float16, torch.float32]),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layer=layers, data=st.data())
def test_matches_reference_for_random_layers_and_batches(layer, data):
    slots = layer.pop("slots")
    rank = st.one_of(st.integers(0, layer["max_rank"]), st.sampled_from([0, 1, 7, layer["max_rank"]]))
    ranks = [data.draw(st.lists(rank, min_size=slots, max_size=slots)) for _ in layer["out_sizes"]]
    linear = synthetic_linear(ranks=ranks, seed=data.draw(st.integers(0, 9)), **layer)
    token_slots = data.draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=40))
    graph_tokens = data.draw(st.sampled_from([4, 64]))
    check(
        linear,
        metadata_for(linear, graph_tokens),
        token_slots,
        padding=data.draw(st.sampled_from([0, 3])),
        add_inputs=data.draw(st.booleans()),
    )


@pytest.fixture
def linear():
    ranks = [[8, 33, 0, 64], [8, 17, 5, 64], [0, 33, 5, 7]]
    return synthetic_linear(in_size=512, out_sizes=(256, 64, 64), ranks=ranks, max_rank=64, dtype=torch.float16, seed=3)


def test_tall_tiles_and_wide_rank_blocks_in_the_eager_regime(linear):
    metadata = metadata_for(linear, graph_tokens=16)
    token_slots = np.repeat([0, -1, 3, 1], [70, 20, 90, 65])
    check(linear, metadata, np.random.default_rng(0).permutation(token_slots))
    assert (metadata.plan.block_m, metadata.plan.block_r, metadata.plan.fixed) == (64, 64, False)


@pytest.mark.parametrize(("split_k", "planes"), [(2, 2), (4, 2), (8, 2), (8, 1)])
def test_tall_tiles_with_k_split(linear, split_k, planes):
    metadata = metadata_for(linear, graph_tokens=16)
    token_slots = np.repeat([0, -1, 3, 1], [70, 20, 90, 65]).astype(np.int32)
    plan = metadata.build(token_slots)
    launch = plan_launch(linear, plan, token_slots.size, device_shape(torch.device("cpu")), graph_tokens=16)
    config = dataclasses.replace(launch.config, split_k=split_k, expand_planes=planes)
    assert config.block_m == 64
    uninitialised = torch.full((3, split_k, *launch.planes[2:]), float("nan"))
    check(linear, metadata, token_slots, config=config, planes=uninitialised)


def test_an_infinite_token_stays_in_its_row(linear):
    """Rank 33 leaves columns of the last group of four that no row of A fills."""
    metadata = metadata_for(linear, graph_tokens=64)
    slots = np.asarray([1, 1, 0], np.int32)
    metadata.build(slots)
    x, y = torch.randn(3, 512).half(), torch.randn(3, 384).half()
    x[0, 5] = float("inf")
    out = y.clone()
    lora_linear(out, x, linear, metadata)
    expected = reference_linear(y, x, linear, torch.from_numpy(slots).long())
    torch.testing.assert_close(out[1:].double(), expected[1:], atol=4e-3, rtol=4e-3)


def test_tall_tiles_off_the_16_byte_grid():
    linear = synthetic_linear(
        in_size=37, out_sizes=(33, 20), ranks=[[19], [3]], max_rank=24, dtype=torch.float16, gap=3
    )
    assert not linear.aligned
    metadata = metadata_for(linear, graph_tokens=16)
    check(linear, metadata, [0] * 130)
    assert metadata.plan.block_m == 64


def test_a_captured_launch_serves_a_later_batch(linear):
    """What a CUDA graph does: grid and addresses of the first batch, lists of another."""
    metadata = metadata_for(linear, graph_tokens=32)
    plan = metadata.build(np.zeros(32, np.int32))
    x, y = torch.randn(32, 512).half(), torch.randn(32, 384).half()
    launch = plan_launch(linear, plan, 32, device_shape(x.device), graph_tokens=32)
    planes = torch.full(launch.planes, float("nan"))
    for token_slots in ([3, 1, 0, -1, 3, 2] * 5, [-1] * 32, [2], list(range(4)) * 8):
        slots = np.asarray(token_slots, np.int32)
        metadata.build(slots)
        all_slots = torch.full((32,), -1)
        all_slots[: slots.size] = torch.from_numpy(slots).long()
        out = y.clone()
        planes.fill_(float("nan"))
        run_shrink(planes, x, linear, plan, launch)
        run_expand(out, planes, linear, plan, launch, add_inputs=True)
        torch.testing.assert_close(out.double(), reference_linear(y, x, linear, all_slots), atol=4e-3, rtol=4e-3)


def test_uninitialised_planes_never_leak(linear):
    metadata = metadata_for(linear, graph_tokens=64)
    token_slots = [0, 3, 1, -1, 2, 2, 3]
    plan = metadata.build(np.asarray(token_slots, np.int32))
    launch = plan_launch(linear, plan, len(token_slots), device_shape(torch.device("cpu")), graph_tokens=64)
    check(linear, metadata, token_slots, planes=torch.full(launch.planes, float("nan")))


def test_slot_reuse_does_not_show_the_former_adapter(linear):
    """A slot goes from rank 64 to rank 8 while the old rows stay where they are: only ranks change."""
    metadata = metadata_for(linear, graph_tokens=64)
    check(linear, metadata, [3] * 5)
    linear.ranks[:, 3].clamp_(max=8)
    metadata.set_slot_rank(3, 8)
    check(linear, metadata, [3] * 5)


SPLITS = [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4), (8, 4), (8, 8), (16, 1), (16, 4), (16, 8), (16, 16)]
"""(splits of K, planes that expand loads at once). 16 splits leave some without any of the 512 inputs."""


@pytest.mark.parametrize(("split_k", "planes"), SPLITS)
@pytest.mark.parametrize("block_n", [32, 128])
def test_any_split_and_block_width(linear, split_k, planes, block_n):
    metadata = metadata_for(linear, graph_tokens=64)
    token_slots = np.asarray([0, 3, 1, 1, 2], np.int32)
    plan = metadata.build(token_slots)
    launch = plan_launch(linear, plan, 5, device_shape(torch.device("cpu")), graph_tokens=64)
    config = dataclasses.replace(
        launch.config, split_k=split_k, expand_planes=planes, block_n=block_n, block_rank=16, block_k=64
    )
    uninitialised = torch.full((launch.planes[0], split_k, *launch.planes[2:]), float("nan"))
    check(linear, metadata, token_slots, config=config, planes=uninitialised)


@pytest.mark.parametrize(("split_k", "planes"), [(None, None), (8, 1), (8, 4), (8, 8)])
def test_the_result_is_bit_equal_whatever_the_company(linear, split_k, planes):
    """Batch invariance: fixed split of K and fixed blocks, so a token's row does not depend on other
    tokens. (The formulas do not split 512 inputs.)"""
    metadata = metadata_for(linear, graph_tokens=16, batch_invariant=True)
    x = torch.randn(1, 512).half()
    config = None
    if split_k:
        options = {"graph_tokens": 16, "batch_invariant": True}
        launch = plan_launch(linear, metadata.plan, 1, device_shape(x.device), **options)
        config = dataclasses.replace(launch.config, split_k=split_k, expand_planes=planes, block_k=64)

    def row(others):
        slots = np.asarray([3, *others], np.int32)
        metadata.build(slots)
        rows = torch.cat([x, torch.randn(len(others), 512).half()])
        y = torch.zeros(len(slots), 384).half()
        lora_linear(y, rows, linear, metadata, config=config)
        return y[0]

    alone = row([])
    assert alone.abs().max() > 0
    assert torch.equal(alone, row([0, 1, 2, 3, -1]))
    assert torch.equal(alone, row([3, 1, 0] * 13))


@pytest.mark.parametrize("add_inputs", [True, False])
def test_y_read_early_changes_no_bit(linear, add_inputs):
    metadata = metadata_for(linear, graph_tokens=64)
    token_slots = [0, 3, 1, -1, 2, 2, 3]
    plan = metadata.build(np.asarray(token_slots, np.int32))
    launch = plan_launch(linear, plan, len(token_slots), device_shape(torch.device("cpu")), graph_tokens=64)
    late, early = (
        check(linear, metadata, token_slots, add_inputs=add_inputs, config=dataclasses.replace(launch.config, **option))
        for option in ({}, {"expand_early_y": True})
    )
    assert torch.equal(late, early)


def test_shards_of_a_row_parallel_layer_add_up(linear):
    """Tensor parallelism cuts A along K: the shards' deltas sum to the unsharded delta."""
    whole = synthetic_linear(in_size=256, out_sizes=(64,), ranks=[[12]], max_rank=16, dtype=torch.float32)
    x, slots = torch.randn(3, 256), torch.zeros(3, dtype=torch.long)
    total = torch.zeros(3, 64)
    for shard in range(2):
        columns = slice(shard * 128, shard * 128 + 128)
        half = synthetic_linear(in_size=128, out_sizes=(64,), ranks=[[12]], max_rank=16, dtype=torch.float32)
        _copy_shard(whole, half, columns)
        metadata = metadata_for(half, graph_tokens=16)
        metadata.build(np.zeros(3, np.int32))
        lora_linear(total, x[:, columns].contiguous(), half, metadata)
    expected = reference_linear(torch.zeros(3, 64), x, whole, slots)
    torch.testing.assert_close(total.double(), expected, atol=2e-5, rtol=2e-5)


def _copy_shard(whole: PagedLinear, shard: PagedLinear, columns: slice) -> None:
    for row in range(12):
        source = int(whole.page_table[0, row // 8]) * whole.page_stride
        target = int(shard.page_table[0, row // 8]) * shard.page_stride
        a = source + whole.a_offsets[0] + (row % 8) * whole.in_size
        b = source + whole.b_offsets[0] + (row % 8) * 64
        a_to = target + shard.a_offsets[0] + (row % 8) * shard.in_size
        b_to = target + shard.b_offsets[0] + (row % 8) * 64
        shard.arena[a_to : a_to + 128] = whole.arena[a + columns.start : a + columns.stop]
        shard.arena[b_to : b_to + 64] = whole.arena[b : b + 64]


def test_pages_beyond_four_billion_elements_are_found(tmp_path):
    """An arena of 8 GiB (a sparse file): element numbers do not fit 32 bits, nor does a page number times a stride."""
    stride, page = 1 << 20, 4097
    file = tmp_path / "arena"
    with file.open("wb") as sparse:
        sparse.truncate((page + 1) * stride * 2)
    arena = torch.from_file(str(file), shared=True, size=(page + 1) * stride, dtype=torch.float16)
    first = page * stride
    arena[first : first + 8 * 64] = torch.randn(8 * 64) / 8
    arena[first + 8 * 64 : first + 8 * 128] = torch.randn(8 * 64)
    linear = PagedLinear(
        arena=arena,
        page_table=torch.tensor([[page]], dtype=torch.int32),
        ranks=torch.tensor([[5]], dtype=torch.int32),
        page_stride=stride,
        page_rows=8,
        a_offsets=(0,),
        b_offsets=(8 * 64,),
        in_size=64,
        out_sizes=(64,),
    )
    out = check(linear, metadata_for(linear, graph_tokens=16), [0, 0, -1])
    assert out[0].abs().max() > 0


def test_wrong_shapes_and_dtypes_are_named(linear):
    metadata = metadata_for(linear, graph_tokens=16)
    metadata.build(np.zeros(4, np.int32))
    x, y = torch.zeros(4, 512).half(), torch.zeros(4, 384).half()
    with pytest.raises(ValueError, match=r"takes x \[tokens, 512\]"):
        lora_linear(y, x[:, :500], linear, metadata)
    with pytest.raises(ValueError, match=r"holds torch.float16 pages, got x of torch.float32"):
        lora_linear(y, x.float(), linear, metadata)
    with pytest.raises(ValueError, match="got 3 rows, but the step's mapping has 4 tokens"):
        lora_linear(y[:3], x[:3], linear, metadata)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        lora_linear(y, x.T.contiguous().T, linear, metadata)
