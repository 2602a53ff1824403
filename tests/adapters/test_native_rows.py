"""adapters/native_rows.py: every instruction set writes what torch writes, and finds every NaN and Inf."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_loraserve.adapters import convert, native_rows
from vllm_loraserve.adapters.native_rows import ISAS, RowWriter

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def writer() -> RowWriter:
    found = native_rows.load()
    assert found is not None, "the converter is not built: docs/development.md"
    return found


@pytest.fixture(scope="module")
def isas(writer: RowWriter) -> list[str]:
    usable = []
    for isa in ISAS:
        try:
            writer.write(torch.ones(1, 1), torch.empty(1, 1), 0, 1, 1.0, isa)
        except ValueError:
            continue
        usable.append(isa)
    assert {"best", "generic"} <= set(usable)
    return usable


@settings(max_examples=150, deadline=None)
@given(
    rank=st.integers(1, 140),
    width=st.integers(1, 200),
    page_rows=st.sampled_from([1, 4, 8, 16]),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    scale=st.sampled_from([1.0, 2.0, 0.3]),
    cut=st.integers(0, 5),
    seed=st.integers(0, 2**16),
)
def test_as_torch(
    writer: RowWriter,
    isas: list[str],
    rank: int,
    width: int,
    page_rows: int,
    source: torch.dtype,
    target: torch.dtype,
    transposed: bool,
    scale: float,
    cut: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # `cut` more of each: a shard's rows are not contiguous.
    shape = (width + cut, rank + cut) if transposed else (rank + cut, width + cut)
    whole = torch.randn(shape, generator=generator).to(source)
    rows = (whole.T if transposed else whole)[cut:, cut:]
    pages = -(-rank // page_rows)
    offset = 3
    empty = torch.full((pages, offset + page_rows * width + 5), 7.0, dtype=target)
    expected = empty.clone()
    assert convert._write_rows(rows, expected, offset, page_rows, scale, True)
    for isa in isas:
        got = empty.clone()
        assert writer.write(rows, got, offset, page_rows, scale, isa) is True
        assert torch.equal(got, expected), isa


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_every_place_is_checked(
    writer: RowWriter, isas: list[str], source: torch.dtype, target: torch.dtype, transposed: bool, bad: float
) -> None:
    for row, column in ((0, 0), (7, 63), (8, 64), (70, 69), (69, 70)):
        rows = torch.ones(71, 71, dtype=source)
        rows[row, column] = bad
        rows = rows.T if transposed else rows
        for isa in isas:
            pages = torch.zeros(9, 8 * 71, dtype=target)
            assert writer.write(rows, pages, 0, 8, 1.0, isa) is False, (isa, row, column)
            written = pages.view(72, 71)[:71].float()
            assert torch.equal(written.isnan(), rows.float().isnan())
            assert torch.equal(written.isinf(), rows.float().isinf())


def test_an_overflow_of_the_cast_is_found(writer: RowWriter, isas: list[str]) -> None:
    for isa in isas:
        pages = torch.zeros(1, 8 * 70, dtype=torch.float16)
        assert writer.write(torch.full((8, 70), 6e4), pages, 0, 8, 1.0, isa) is True
        assert writer.write(torch.full((8, 70), 6e4), pages, 0, 8, 2.0, isa) is False


def test_what_it_cannot_do_is_left_to_torch(writer: RowWriter) -> None:
    pages = torch.zeros(1, 32)
    assert writer.write(torch.ones(4, 8, dtype=torch.float64), pages, 0, 4, 1.0) is None
    assert writer.write(torch.ones(8, 16)[::2, ::2], pages, 0, 4, 1.0) is None
    assert writer.write(torch.ones(4, 0), pages, 0, 4, 1.0) is None
    assert not pages.any()


def test_without_the_library_there_is_one_warning(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setenv("LORASERVE_CONVERT_LIBRARY", str(tmp_path / "none.so"))
    with caplog.at_level(logging.WARNING):
        assert native_rows.load() is None
        assert native_rows.load() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
