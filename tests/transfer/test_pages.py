"""Cutting page streams: properties against a byte-by-byte model."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_loraserve.transfer.pages import AdapterPages, Range, match, page_offsets, slice_stream

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def layout(sizes: list[int], gap: int = 3) -> list[Range]:
    ranges, at = [], 0
    for size in sizes:
        ranges.append(Range(at, size))
        at += size + gap
    return ranges


def stream(ranges: list[Range]) -> list[int]:
    return [offset + i for offset, length in ranges for i in range(length)]


def cut(total: int, cuts: list[int]) -> list[int]:
    points = sorted({c % total for c in cuts} | {0, total})
    return [b - a for a, b in itertools.pairwise(points)]


@given(lengths, st.lists(st.integers(0, 500), max_size=8), st.one_of(st.none(), st.integers(1, 17)))
def test_match_pairs_every_byte_once_and_in_order(sizes, cuts, largest):
    source, target = layout(sizes), layout(cut(sum(sizes), cuts), gap=5)
    pieces = match(source, target, largest)
    assert all(p.length <= (largest or p.length) and p.length > 0 for p in pieces)
    assert [p.source + i for p in pieces for i in range(p.length)] == stream(source)
    assert [p.target + i for p in pieces for i in range(p.length)] == stream(target)


@given(lengths, st.integers(0, 600), st.integers(0, 600))
def test_slices_are_the_stream_s(sizes, start, length):
    ranges = layout(sizes)
    whole = stream(ranges)
    if start + length <= len(whole):
        assert stream(slice_stream(ranges, start, length)) == whole[start : start + length]
    elif length:
        with pytest.raises(ValueError, match="after the stream"):
            slice_stream(ranges, start, length)


def test_layouts_of_other_sizes_do_not_match():
    with pytest.raises(ValueError, match="smaller"):
        match([Range(0, 10)], [Range(0, 9)])
    with pytest.raises(ValueError, match="larger"):
        match([Range(0, 10)], [Range(0, 11)])
    with pytest.raises(ValueError, match="larger"):
        match([Range(0, 10)], [Range(0, 10), Range(20, 1)])


def test_a_page_may_not_cross_a_range():
    assert list(page_offsets([4, 4, 2], [Range(100, 8), Range(0, 2)])) == [100, 104, 0]
    with pytest.raises(ValueError, match="crosses"):
        list(page_offsets([6, 6], [Range(0, 8), Range(100, 4)]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checksums": (1,)}, "2 pages but 1 checksums"),
        ({"ranges": (Range(0, 7),)}, "ranges hold 7 bytes"),
        ({"ranges": (Range(0, 3), Range(9, 5))}, "crosses"),
        ({"ranges": (Range(-1, 8),)}, "above 0"),
        ({"ranges": (Range(95, 8),)}, "outside the slab"),
    ],
)
def test_wrong_descriptions_are_refused(change, words):
    good = {
        "name": "a",
        "generation": 1,
        "digest": "",
        "layout": "L",
        "page_lengths": (4, 4),
        "checksums": (1, 2),
        "ranges": (Range(0, 8),),
    }
    AdapterPages(**good).validate(100)
    with pytest.raises(ValueError, match=words):
        AdapterPages(**{**good, **change}).validate(100)
