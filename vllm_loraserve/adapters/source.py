"""Where an adapter's checkpoint may come from: a directory inside the allowed roots, or the hub's cache.

A source string may come from a client, so the answer is a real path inside a root or an error; symlinks
are followed first and count where they lead.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vllm_loraserve.adapters.errors import AdapterError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CHECKED_FILES = ("adapter_config.json", "adapter_model.safetensors")


def resolve_source(source: str, allowed_roots: Sequence[str | Path], *, allow_download: bool = False) -> Path:
    """Real path of the checkpoint directory that `source` names.

    `source` is an absolute path, a path relative to one of `allowed_roots`, or a hub id `org/name`: then
    the local hub cache is asked, and the hub itself only with `allow_download`.
    Raises AdapterError: `forbidden` (outside every root, a `..`, a symlink that leads out), `not_found`.
    """
    if not source or "\0" in source:
        raise AdapterError("invalid", "The adapter source is empty or has a NUL byte; give a path or a hub id.")
    if ".." in Path(source).parts:
        raise AdapterError("forbidden", f"The adapter source '{source}' has a '..'; give a path without it.")
    roots = [Path(os.path.realpath(os.path.expanduser(root))) for root in allowed_roots]
    given = Path(os.path.expanduser(source))
    if given.is_absolute():
        candidates = [given]
    else:
        candidates = [root / given for root in roots if (root / given).exists()]
        if not candidates and _HUB_ID.fullmatch(source):
            return _from_hub(source, allow_download)
    if not candidates:
        raise AdapterError(
            "not_found", f"There is no adapter '{source}' in {_named(roots)}; check its name or add its root."
        )
    directory = candidates[0]
    # Asked first, so that an answer never tells whether a path outside the roots exists.
    if not _inside(directory, roots):
        raise AdapterError(
            "forbidden",
            f"The adapter source '{source}' is outside {_named(roots)}; move it there or allow its root.",
        )
    if not directory.is_dir():
        raise AdapterError("not_found", f"There is no adapter directory '{source}'; check its path.")
    for name in _CHECKED_FILES:
        if not _inside(directory / name, roots):
            raise AdapterError(
                "forbidden",
                f"'{name}' of the adapter '{source}' is a link that leads outside {_named(roots)}; copy the file.",
            )
    return Path(os.path.realpath(directory))


def _inside(path: Path, roots: Sequence[Path]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real == root or root in real.parents for root in roots)


def _named(roots: Sequence[Path]) -> str:
    return "the allowed roots (" + (", ".join(f"'{root}'" for root in roots) or "none is set") + ")"


def _from_hub(repo_id: str, allow_download: bool) -> Path:
    missing = AdapterError(
        "not_found",
        f"There is no adapter '{repo_id}' in the allowed roots or the local hub cache; download it first "
        "or allow downloads.",
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing from None
    patterns = ["adapter_config.json", "*.safetensors"]
    try:
        path = snapshot_download(repo_id, local_files_only=not allow_download, allow_patterns=patterns)
    except Exception as error:  # the hub client's errors share no base class over its versions
        if allow_download:
            raise AdapterError(
                "not_found",
                f"The adapter '{repo_id}' could not be downloaded ({type(error).__name__}); check its name "
                "and the network.",
            ) from error
        raise missing from error
    return Path(path)
