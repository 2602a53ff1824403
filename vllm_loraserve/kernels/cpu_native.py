"""The Python face of `csrc/cpu_lora`: LoRA of a paged linear layer in C++, by ctypes.

One call does shrink and expand of all slices for all adapters of the batch; it gathers nothing, reads each
rank row where it lies, and releases the GIL. Where the library was not built `load()` returns None, one
warning says so, and `cpu_paged.py` does the same work in torch.
"""

import ctypes
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vllm_loraserve import native
from vllm_loraserve.kernels.grouping import TokenGroups
from vllm_loraserve.kernels.paged import PagedLinear

logger = logging.getLogger(__name__)

ABI = 3
LIBRARY = "loraserve_cpu_lora.so"
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_MAX_PAGES = 512


class _Layer(ctypes.Structure):
    _fields_ = (
        ("arena", ctypes.c_void_p),
        ("page_table", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("slices", ctypes.c_void_p),
        ("page_stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("ranks_stride", ctypes.c_int64),
        ("in_size", ctypes.c_int64),
        ("page_rows", ctypes.c_int32),
        ("n_slices", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("n_groups", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class NativeLayer:
    """A layer as the library sees it. Holds the tensors that its addresses point into."""

    __slots__ = ("_raw", "dtype", "in_size", "linear", "out_size", "pointer")

    def __init__(self, linear: PagedLinear) -> None:
        if linear.arena.device.type != "cpu" or linear.arena.dtype not in _DTYPES:
            raise ValueError(f"LoRA layer {linear.name!r} is not in host memory in a dtype that is served")
        if linear.page_table.shape[1] > _MAX_PAGES:
            raise ValueError(f"LoRA layer {linear.name!r} has more than {_MAX_PAGES} pages for a slot")
        self.linear, self.dtype = linear, linear.arena.dtype
        self.in_size, self.out_size = linear.in_size, sum(linear.out_sizes)
        self._raw = _Layer(
            linear.arena.data_ptr(),
            linear.page_table.data_ptr(),
            linear.ranks.data_ptr(),
            linear.handle.data_ptr(),
            linear.page_stride,
            linear.page_table.stride(0),
            linear.ranks.stride(0),
            linear.in_size,
            linear.page_rows,
            linear.n_slices,
            _DTYPES[self.dtype],
            0,
        )
        self.pointer = ctypes.addressof(self._raw)


class NativeBatch:
    """The groups of a step as the library sees them."""

    __slots__ = ("_raw", "groups", "n_rows", "pointer")

    def __init__(self, groups: TokenGroups) -> None:
        self.groups = groups
        self.n_rows = int(groups.rows.max()) + 1 if len(groups.rows) else 0
        self._raw = _Batch(
            groups.slots.ctypes.data, groups.starts.ctypes.data, groups.rows.ctypes.data, len(groups.slots), 0
        )
        self.pointer = ctypes.addressof(self._raw)


class NativeLibrary:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lib = lib = ctypes.CDLL(str(path))
        pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        lib.lsc_linear.argtypes = (pointer, pointer, pointer, i64, pointer, i64, i32)
        lib.lsc_isa.restype = ctypes.c_char_p
        lib.lsc_force_isa.argtypes = (ctypes.c_char_p,)
        lib.lsc_reserve.argtypes = (i64,)
        lib.lsc_reserve.restype = i64
        lib.lsc_set_threads.argtypes = (i32,)
        lib.lsc_set_threads.restype = lib.lsc_enter.restype = lib.lsc_leave.restype = None
        if lib.lsc_abi() != ABI:
            raise OSError(f"{path} has ABI {lib.lsc_abi()}, this package needs {ABI}; build it again")
        self._linear = lib.lsc_linear

    def linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        layer: NativeLayer,
        batch: NativeBatch,
        add_inputs: bool = True,
    ) -> bool:
        """See `cpu_paged.linear`. False, and nothing done, when x or y have another dtype or are not rows."""
        if x.dtype != layer.dtype or y.dtype != layer.dtype or x.stride(1) != 1 or y.stride(1) != 1:
            return False
        if x.shape[1] != layer.in_size or y.shape[1] < layer.out_size or min(x.shape[0], y.shape[0]) < batch.n_rows:
            raise ValueError(
                f"LoRA layer {layer.linear.name!r} got x {tuple(x.shape)} and y {tuple(y.shape)} for {batch.n_rows} "
                f"tokens; it needs [tokens, {layer.in_size}] and [tokens, {layer.out_size}]"
            )
        self._linear(layer.pointer, batch.pointer, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), add_inputs)
        return True

    def reserve(self, floats: int) -> int:
        """Make this thread's scratch memory (fp32, kept between calls) at least so large; returns its size in floats.

        A call of `linear` needs tokens x rank x slices of them."""
        return int(self._lib.lsc_reserve(floats))

    @property
    def idle(self) -> bool:
        """True when no `linear` and no `reading` runs: whoever has changed page tables before asking may then give up
        the pages that they named before."""
        return bool(self._lib.lsc_idle())

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around other code that reads pages by page tables."""
        self._lib.lsc_enter()
        try:
            yield
        finally:
            self._lib.lsc_leave()

    @property
    def isa(self) -> str:
        """Which kernels run: avx512_bf16, avx512, avx2 or generic."""
        return str(self._lib.lsc_isa().decode())

    def force_isa(self, name: str | None) -> bool:
        """For tests: pick the kernels (None: the best again). False where this CPU cannot run them."""
        return self._lib.lsc_force_isa(name.encode() if name else None) == 0

    def set_threads(self, n: int) -> None:
        """Upper bound on threads; 0: as many as torch uses."""
        self._lib.lsc_set_threads(n)

    @property
    def has_threads(self) -> bool:
        """Whether torch's OpenMP threads were found."""
        return bool(self._lib.lsc_has_threads())


def library_path() -> Path:
    """Where the library is looked for; `LORASERVE_CPU_LORA_LIBRARY` names another file."""
    return native.library_path(LIBRARY, "LORASERVE_CPU_LORA_LIBRARY")


@functools.cache
def load() -> NativeLibrary | None:
    """The library, or None where it was not built; that is logged once, as a warning."""
    path = library_path()
    try:
        library = NativeLibrary(path)
    except (OSError, AttributeError) as error:
        logger.warning(
            "The native CPU LoRA kernels are not available (%s); torch does their work, more slowly. "
            "docs/development.md says how to build them.",
            error,
        )
        return None
    logger.info("CPU LoRA kernels: %s, threads %s", library.isa, "of torch" if library.has_threads else "one")
    return library
