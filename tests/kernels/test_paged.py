"""The layout seam: the reference agrees with plain matrices, and a layout that cannot be right is refused."""

import dataclasses

import pytest
import torch

from vllm_loraserve.kernels.paged import PagedLinear, reference_linear
from vllm_loraserve.kernels.synthetic import synthetic_linear


def dense(linear: PagedLinear, slice_id: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [rank, out] of one adapter, gathered row by row through the page table."""
    rows_a, rows_b = [], []
    size = linear.out_sizes[slice_id]
    for n in range(int(linear.ranks[slice_id, slot])):
        page = int(linear.page_table[slot, n // linear.page_rows]) * linear.page_stride
        a = page + linear.a_offsets[slice_id] + n % linear.page_rows * linear.in_size
        b = page + linear.b_offsets[slice_id] + n % linear.page_rows * size
        rows_a.append(linear.arena[a : a + linear.in_size])
        rows_b.append(linear.arena[b : b + size])
    return torch.stack(rows_a), torch.stack(rows_b)


def test_reference_is_the_sum_of_plain_products():
    linear = synthetic_linear(
        in_size=24, out_sizes=(16, 8), ranks=[[11, 3], [0, 9]], max_rank=16, dtype=torch.float32, page_rows=4
    )
    x, y, slots = torch.randn(3, 24), torch.randn(3, 24), torch.tensor([1, -1, 0])
    out = reference_linear(y, x, linear, slots)
    a, b = dense(linear, 1, 1)
    torch.testing.assert_close(out[0, 16:], (y[0, 16:] + x[0] @ a.T @ b).double(), atol=1e-5, rtol=1e-5)
    assert torch.equal(out[1], y[1].double())
    assert torch.equal(out[2, 16:], y[2, 16:].double()), "slice 1 of slot 0 has rank 0"
    a, b = dense(linear, 0, 0)
    written = reference_linear(y, x, linear, slots, add_inputs=False)
    torch.testing.assert_close(written[2, :16], (x[2] @ a.T @ b).double(), atol=1e-5, rtol=1e-5)


def test_constants_are_written_again_where_they_are():
    linear = synthetic_linear(in_size=24, out_sizes=(16, 8), ranks=[[8], [8]], max_rank=8, dtype=torch.float32)
    constants = [linear.handle, *linear.column_blocks.values()]
    before = [constant.clone() for constant in constants]
    for constant in constants:
        constant.fill_(-7)
    linear.restore()
    assert all(torch.equal(constant, was) for constant, was in zip(constants, before, strict=True))
    assert linear.handle is constants[0]


def test_handle_and_column_blocks_describe_the_slices():
    linear = synthetic_linear(in_size=32, out_sizes=(160, 40), ranks=[[4], [4]], max_rank=8, dtype=torch.float16)
    assert linear.handle[:, 2].tolist() == [0, 160]
    assert linear.handle[:, 3].tolist() == [160, 40]
    assert linear.column_blocks[128].tolist() == [[0, 0], [0, 128], [1, 0]]
    assert linear.max_rank == 8
    assert linear.aligned


def test_alignment_is_noticed():
    linear = synthetic_linear(in_size=36, out_sizes=(16,), ranks=[[4]], max_rank=8, dtype=torch.float16)
    assert not linear.aligned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_offsets": (0, 0)}, "one entry per slice"),
        ({"page_table": torch.zeros(2, 1)}, "page_table must be int32"),
        ({"ranks": torch.zeros(1, 3, dtype=torch.int32)}, r"ranks must be int32 \[1, 1\]"),
        ({"b_offsets": (10_000,)}, "ends at element"),
        ({"arena": torch.zeros(2, 2)}, "1-D"),
    ],
)
def test_impossible_layouts_are_refused(change, message):
    linear = synthetic_linear(in_size=16, out_sizes=(16,), ranks=[[4]], max_rank=8, dtype=torch.float16, name="layer.3")
    given = {field.name: getattr(linear, field.name) for field in dataclasses.fields(linear) if field.init} | change
    with pytest.raises(ValueError, match=message) as error:
        PagedLinear(**given)
    assert "layer.3" in str(error.value)
