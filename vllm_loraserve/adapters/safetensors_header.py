"""The header of a safetensors file, read and checked without torch and without reading the weights.

Format: 8 bytes little-endian header length, that many bytes of JSON (`name -> dtype, shape,
data_offsets`), then the data (https://github.com/huggingface/safetensors, "Format").
"""

import math
import os
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vllm_loraserve.adapters.errors import AdapterError

# The format's own limit on the header; it keeps a hostile file from making us allocate gigabytes.
MAX_HEADER_BYTES = 100_000_000

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# All exponent bits set means Inf or NaN in every IEEE-like format, so that no float arithmetic is needed
# (numpy has no bfloat16).
_EXPONENT: dict[str, tuple[Any, int]] = {
    "F64": (np.uint64, 0x7FF0000000000000),
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of a file: `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path, file: BufferedReader | None = None) -> dict[str, TensorEntry]:
    """Tensors of the safetensors file `path`, in the order of their data; `file`: the same, open already.

    Raises AdapterError `invalid` (truncated, overlapping, not safetensors) or `unsupported` (dtype).
    """
    if file is None:
        with path.open("rb") as opened:
            return read_header(path, opened)
    broken = f"'{path}' is not a complete safetensors file"
    fix = "copy or save it again."
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise AdapterError(
            "invalid",
            f"{broken} ({size} bytes, header of {length}); it was truncated or is another format, {fix}",
        )
    raw = file.read(length)
    try:
        header = msgspec.json.decode(raw, type=dict[str, Any])
        header.pop("__metadata__", None)
        entries = {name: _entry(value, 8 + length) for name, value in header.items()}
    except (msgspec.DecodeError, RecursionError, KeyError, TypeError, ValueError) as error:
        raise AdapterError("invalid", f"{broken} (header: {error}); {fix}") from None
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 8 + length
    for name, entry in entries.items():
        if entry.dtype not in ITEM_BYTES:
            raise AdapterError(
                "unsupported",
                f"'{path}' stores '{name}' as {entry.dtype}; convert it to one of {', '.join(ITEM_BYTES)}.",
            )
        expected = math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
        if entry.start != position or entry.end - entry.start != expected:
            raise AdapterError("invalid", f"{broken} (tensor '{name}' has wrong offsets); {fix}")
        position = entry.end
    if position != size:
        raise AdapterError("invalid", f"{broken} ({size} bytes, its header says {position}); {fix}")
    return entries


def _entry(value: Mapping[str, Any], base: int) -> TensorEntry:
    start, end = value["data_offsets"]
    shape = tuple(value["shape"])
    numbers = (start, end, *shape)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a size or offset is not a non-negative integer")
    return TensorEntry(str(value["dtype"]), shape, base + start, base + end)


def non_finite_tensor(path: Path, entries: Mapping[str, TensorEntry]) -> str | None:
    """Name of the first tensor that holds a NaN or an Inf, or None. Reads each tensor once."""
    for name, bits, dtype in _raw_tensors(path, entries):
        mask = _EXPONENT[dtype][1]
        if bits.size and bool(((bits & bits.dtype.type(mask)) == mask).any()):
            return name
    return None


def _raw_tensors(path: Path, entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, np.ndarray, str]]:
    with path.open("rb") as file:
        for name, entry in entries.items():
            file.seek(entry.start)
            data = file.read(entry.end - entry.start)
            if len(data) != entry.end - entry.start:
                raise AdapterError("invalid", f"'{path}' became shorter while '{name}' was read; copy it again.")
            yield name, np.frombuffer(data, dtype=_EXPONENT[entry.dtype][0]), entry.dtype


def readable_file(path: Path) -> bool:
    """Whether `path` is a regular file (symlinks followed) that this process may read."""
    return path.is_file() and os.access(path, os.R_OK)
