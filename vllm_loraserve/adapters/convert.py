"""PEFT checkpoint -> pages of rank rows, one module at a time, straight into the memory that keeps them.

The weights are read through a memory map, so that no second full copy exists: besides the target pages, only
one module's scaled B is in memory at a time.
"""

import mmap
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_loraserve.adapters import native_rows
from vllm_loraserve.adapters.checkpoint import Checkpoint, LoRATensors, content_hash
from vllm_loraserve.adapters.errors import AdapterError
from vllm_loraserve.adapters.layout import Layout, PageGroup, SlicePlace
from vllm_loraserve.adapters.safetensors_header import TensorEntry, read_header

Pair = tuple[torch.Tensor, torch.Tensor]
"""A [rank, in] and B [out, rank] of one slice, or of one checkpoint module."""

Shard = Callable[[Sequence[Pair | None]], Sequence[Pair | None]]
"""This worker's part: pairs of a module's checkpoint parts -> pairs of its slices."""

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ModulePlan:
    """How one runtime module is made: the checkpoint modules that it is packed from, and the sharding rule.

    `parts` names the checkpoint module of each part, None where the adapter has none; at least one is given.
    """

    __slots__ = ("module", "parts", "shard")

    def __init__(self, module: str, parts: Sequence[LoRATensors | None], shard: Shard) -> None:
        self.module, self.parts, self.shard = module, tuple(parts), shard


class WeightsReader:
    """A checkpoint's weights file, opened once: a file that takes its place later is another adapter.

    Raises AdapterError `invalid` where that happened between the look at the header and now.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, path = checkpoint, checkpoint.weights_path
        self._file = path.open("rb")
        if read_header(path, self._file) != checkpoint.entries:
            raise AdapterError("invalid", f"'{path}' was replaced while it was read; load it again.")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def stat(self) -> os.stat_result:
        """Of the open file."""
        return os.fstat(self._file.fileno())

    def digest(self) -> str:
        """The adapter's content hash; reads the file once. Another thread may read tensors meanwhile."""
        return content_hash(self.checkpoint, self._file)

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor at `entry`, in the file's dtype: a view of a memory map, which lives as long as it does."""
        dtype = _TORCH[entry.dtype]
        count = (entry.end - entry.start) // dtype.itemsize
        if not count:
            return torch.empty(entry.shape, dtype=dtype)
        # Beyond the end of its file a map may not be touched.
        if entry.end > self.stat().st_size:
            raise AdapterError(
                "invalid", f"'{self.checkpoint.weights_path}' became shorter while it was read; copy it again."
            )
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.start).view(entry.shape)


def slice_ranks(layout: Layout, plans: Sequence[ModulePlan], slice_parts: Mapping[str, Sequence[int]]) -> list[int]:
    """Rank of every slice of the layout, 0 where the adapter does not target it.

    `slice_parts` says for each module which part each of its slices is made from.
    """
    ranks = [0] * len(layout.slice_index)
    for plan in plans:
        for index, part in enumerate(slice_parts[plan.module]):
            tensors = plan.parts[part]
            if tensors is not None:
                ranks[layout.slice_index[plan.module, index]] = tensors.rank
    return ranks


def write_pages(
    reader: WeightsReader,
    layout: Layout,
    plans: Sequence[ModulePlan],
    ranks: Sequence[int],
    targets: Sequence[torch.Tensor | None],
    *,
    check_values: bool = True,
) -> None:
    """Fill `targets` with the adapter's pages; rows beyond a slice's rank are set to zero.

    targets: per group [pages, page_elements] in the layout's dtype, None for a group without pages.
    Raises AdapterError: `mismatch` (a slice has other sizes than the layer), `invalid` (NaN or Inf, in the
    checkpoint or after the cast).
    """
    by_module = {plan.module: plan for plan in plans}
    writer = native_rows.load()
    at = 0
    for group, pages in zip(layout.groups, targets, strict=True):
        if pages is not None:
            inside = ranks[at : at + len(group.places)]
            if not _fills(layout, group, inside, pages.shape[0]):
                pages.zero_()
            _write_group(reader, layout, group, by_module, inside, pages, check_values, writer)
        at += len(group.places)


def _fills(layout: Layout, group: PageGroup, ranks: Sequence[int], count: int) -> bool:
    """Whether slices of these ranks write every element of the group's pages."""
    written = sum((place.in_size + place.out_size) * layout.page_rows for place in group.places)
    return written == group.page_elements and all(rank == count * layout.page_rows for rank in ranks)


def _write_group(
    reader: WeightsReader,
    layout: Layout,
    group: PageGroup,
    by_module: Mapping[str, ModulePlan],
    ranks: Sequence[int],
    pages: torch.Tensor,
    check_values: bool,
    writer: native_rows.RowWriter | None,
) -> None:
    done: str | None = None
    slices: Sequence[Pair | None] = ()
    scale = 1.0
    for place, rank in zip(group.places, ranks, strict=True):
        if not rank:
            continue
        plan = by_module[place.module]
        if done != place.module:
            scalings = {part.scaling for part in plan.parts if part is not None}
            # Which slice comes of which part only `shard` knows.
            scale = scalings.pop() if len(scalings) == 1 else 1.0
            slices, done = plan.shard([_read(reader, part, scale) for part in plan.parts]), place.module
        pair = slices[place.index]
        if pair is not None:
            _check_shapes(place, rank, pair)
            finite = _write_slice(layout, place, pair, scale, pages, check_values, writer)
            if check_values and not finite:
                raise AdapterError(
                    "invalid",
                    f"The adapter's '{place.module}' has NaN or Inf in {layout.dtype}; use an earlier checkpoint "
                    "of its training.",
                )


def _read(reader: WeightsReader, part: LoRATensors | None, scale: float) -> Pair | None:
    """The part's A and B; B lacks a factor `scale`."""
    if part is None:
        return None
    b = reader.tensor(part.b)
    return reader.tensor(part.a), b if part.scaling == scale else b.float() * (part.scaling / scale)


def _check_shapes(place: SlicePlace, rank: int, pair: Pair) -> None:
    a, b = pair
    if a.shape != (rank, place.in_size) or b.shape != (place.out_size, rank):
        raise AdapterError(
            "mismatch",
            f"The adapter's '{place.module}' (slice {place.index}) has A {list(a.shape)} and B {list(b.shape)}, "
            f"but this model needs [{rank}, {place.in_size}] and [{place.out_size}, {rank}]; train it on this "
            "base model.",
        )


def _write_slice(
    layout: Layout,
    place: SlicePlace,
    pair: Pair,
    scale: float,
    pages: torch.Tensor,
    check_values: bool,
    writer: native_rows.RowWriter | None,
) -> bool:
    """Whether all that was written is finite; always so where the values are not checked."""
    a, b = pair
    finite = True
    for rows, offset, factor in ((a, place.a_offset, 1.0), (b.T, place.b_offset, scale)):
        written = writer.write(rows, pages, offset, layout.page_rows, factor) if writer is not None else None
        if written is None:
            written = _write_rows(rows, pages, offset, layout.page_rows, factor, check_values)
        finite = finite and written
    return finite or not check_values


def _write_rows(
    rows: torch.Tensor, pages: torch.Tensor, offset: int, page_rows: int, scale: float, check_values: bool
) -> bool:
    """As `RowWriter.write`, in torch."""
    rank, width = rows.shape
    target = pages.as_strided(
        (pages.shape[0], page_rows, width), (pages.stride(0), width, 1), pages.storage_offset() + offset
    )
    if scale != 1.0:
        rows = rows.float() * scale  # rounded once, by the cast into the page
    full, rest = divmod(rank, page_rows)
    if full:
        target[:full].copy_(rows[: full * page_rows].unflatten(0, (full, page_rows)))
    if rest:
        target[full, :rest].copy_(rows[full * page_rows :])
    if not check_values:
        return True
    # An Inf or NaN times zero is NaN, so the sum finds both; it is read in the page's own dtype, so that
    # an overflow of the cast is found too.
    written = target[: full + (rest > 0)]
    return bool(torch.isfinite(written.float().sum())) or bool(torch.isfinite(written).all())


def page_addresses(layout: Layout, pages: Sequence[int], address: int) -> tuple[list[int], list[int]]:
    """(address, length) of every page of an adapter whose pages lie one after another from `address`."""
    sizes = np.repeat([layout.page_bytes(group) for group in range(len(pages))], pages)
    starts: npt.NDArray[np.int64] = address + np.concatenate(([0], np.cumsum(sizes)[:-1])) if len(sizes) else sizes
    return [int(start) for start in starts], [int(size) for size in sizes]
