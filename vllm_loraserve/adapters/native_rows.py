"""The Python face of `csrc/convert`: one matrix of a checkpoint into rows of pages, in one pass over memory, by ctypes.

Cast, scaling, transposition and the search for NaN and Inf take torch several passes and several times as long. The
GIL is released meanwhile. Where the library was not built `load()` returns None, and `convert.py` does it in torch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch

from vllm_loraserve import native

logger = logging.getLogger(__name__)

ABI = 1
LIBRARY = "loraserve_convert.so"
ISAS = ("best", "generic", "avx2", "avx512")
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class _Rows(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("page_rows", ctypes.c_int64),
        ("page_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("source_dtype", ctypes.c_int32),
        ("target_dtype", ctypes.c_int32),
    )


class RowWriter:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        found = int(library.lsc_abi())
        if found != ABI:
            raise OSError(f"ABI {found}, this package needs {ABI}; build the extension again")
        self._write = library.lsc_write_rows
        self._write.restype, self._write.argtypes = ctypes.c_int, (ctypes.POINTER(_Rows), ctypes.c_int)

    def write(
        self, rows: torch.Tensor, pages: torch.Tensor, offset: int, page_rows: int, scale: float, isa: str = "best"
    ) -> bool | None:
        """Put `rows` [rank, width] times `scale` into `pages` [pages, page_elements], `page_rows` rows from `offset`
        elements into each page; multiplied in fp32 and rounded once. True: all that was written is finite.

        None, with nothing written, where the library has no way for these dtypes, strides or devices.
        isa: one of ISAS, for tests. Raises ValueError where this CPU lacks it.
        """
        if (
            rows.dtype not in _DTYPES
            or pages.dtype not in _DTYPES
            or 1 not in rows.stride()
            or not rows.numel()
            or rows.device.type != "cpu"
            or pages.device.type != "cpu"
            or pages.stride(1) != 1
        ):
            return None
        rank, width = rows.shape
        assert -(-rank // page_rows) <= pages.shape[0]
        assert offset + page_rows * width <= pages.shape[1]
        job = _Rows(
            rows.data_ptr(),
            pages.data_ptr() + offset * pages.element_size(),
            rank,
            width,
            *rows.stride(),
            page_rows,
            pages.stride(0),
            scale,
            _DTYPES[rows.dtype],
            _DTYPES[pages.dtype],
        )
        result = int(self._write(ctypes.byref(job), ISAS.index(isa)))
        if result < 0:
            raise ValueError(f"this CPU does not run '{isa}'")
        return result == 0


def library_path() -> Path:
    """Where the library is looked for; `LORASERVE_CONVERT_LIBRARY` names another file."""
    return native.library_path(LIBRARY, "LORASERVE_CONVERT_LIBRARY")


@functools.cache
def _load(path: Path) -> RowWriter | None:
    try:
        return RowWriter(path)
    except (OSError, AttributeError) as error:
        logger.warning(
            "%s cannot be used (%s): adapters are converted by torch, which takes longer. docs/development.md says how "
            "to build it.",
            path,
            error,
        )
        return None


def load() -> RowWriter | None:
    """The library, or None where it is missing; the first None of a path is logged as one warning."""
    return _load(library_path())
