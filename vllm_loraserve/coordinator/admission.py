"""What may be registered: asks adapters/ about a source and turns its verdict into protocol errors. Blocking."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from vllm_loraserve.adapters.checkpoint import AdapterError, inspect_checkpoint, open_checkpoint, resolve_source
from vllm_loraserve.adapters.shapes import ModuleShapes, check_shapes
from vllm_loraserve.coordinator.membership import Refused
from vllm_loraserve.coordinator.messages import AdapterRecord, ErrorCode

_CODES: dict[str, ErrorCode] = {"forbidden": "forbidden", "not_found": "not_found"}


def inspect_source(
    name: str,
    source: str,
    *,
    roots: Sequence[str],
    max_rank: int,
    module_shapes: ModuleShapes | None,
    base_model: str,
    allow_download: bool = False,
) -> AdapterRecord:
    """The record of the adapter at `source`, without an id; reads all of its weights once, for the digest.

    Raises Refused: `forbidden` (outside `roots`), `not_found`, `invalid` (everything else that makes it unusable).
    """
    try:
        path = resolve_source(source, roots, allow_download=allow_download)
        info = inspect_checkpoint(path, max_rank=max_rank, module_shapes=module_shapes, check_values=True)
    except AdapterError as error:
        raise Refused(_CODES.get(error.kind, "invalid"), str(error)) from None
    except OSError as error:
        raise Refused("invalid", f"The adapter source '{source}' can't be read ({error.strerror}); check it.") from None
    given = os.path.expanduser(source)
    local = os.path.isabs(given) or any(os.path.exists(os.path.join(os.path.expanduser(r), given)) for r in roots)
    return AdapterRecord(
        name=name,
        # A hub id stays one: every instance has its own cache.
        source=str(path) if local else source,
        rank=info.rank,
        target_modules=info.target_modules,
        size_bytes=info.size_bytes,
        sha256=info.sha256,
        base_model=base_model or info.base_model or "",
        added_at=time.time(),
    )


def misfit(source: str, *, roots: Sequence[str], module_shapes: ModuleShapes) -> str | None:
    """Why the registered adapter at `source` does not fit the base model; empty: it does; None: that can't be seen here
    and now. Reads no weights."""
    try:
        check_shapes(open_checkpoint(resolve_source(source, roots), max_rank=sys.maxsize), module_shapes)
    except AdapterError as error:
        return str(error) if error.kind == "mismatch" else None
    except OSError:
        return None
    return ""
