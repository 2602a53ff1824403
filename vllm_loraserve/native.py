"""Where the compiled libraries of `csrc/` are: beside the package, or in site-packages for an editable install."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def library_path(name: str, variable: str) -> Path:
    """The file that the environment variable names, else `_lib/NAME` of the tree or of the installed package.

    An editable install leaves the modules in the tree and puts what was compiled into site-packages. The path need not
    exist: where nothing was built it is the one in the tree, for the message.
    """
    if named := os.environ.get(variable):
        return Path(named)
    beside = Path(__file__).parent / "_lib" / name
    if beside.exists():
        return beside
    installed = (Path(entry) / "vllm_loraserve" / "_lib" / name for entry in sys.path if entry)
    return next((path for path in installed if path.exists()), beside)
