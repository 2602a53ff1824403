"""Finds pyverbs: the one that imports, else the distribution's (python3-pyverbs), which a virtual environment hides.

PyPI's pyverbs needs exactly its own rdma-core and is of no use beside the system's; the distribution's fits the
system's libibverbs, and works in any interpreter of the same ABI. Only that one package is made importable, not the
rest of dist-packages.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

logger = logging.getLogger(__name__)

PLACES = (Path("/usr/lib/python3/dist-packages/pyverbs"), Path("/usr/lib64/python3/site-packages/pyverbs"))
_MODULES = ("enums", "addr", "cq", "device", "mr", "pd", "qp", "wr", "pyverbs_error")


def _from_distribution() -> str:
    """Makes `import pyverbs` find the distribution's; the reason where there is none."""
    for place in PLACES:
        if not (place / "__init__.py").exists():
            continue
        spec = importlib.util.spec_from_file_location(
            "pyverbs", place / "__init__.py", submodule_search_locations=[str(place)]
        )
        if spec is None or spec.loader is None:
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules["pyverbs"] = module
        try:
            spec.loader.exec_module(module)
            importlib.import_module("pyverbs.device")
        except ImportError as error:
            for name in [n for n in sys.modules if n == "pyverbs" or n.startswith("pyverbs.")]:
                del sys.modules[name]
            return f"{place} does not fit this Python: {error}"
        return ""
    return "pyverbs is not installed (apt-get install python3-pyverbs)"


@functools.cache
def load() -> tuple[SimpleNamespace | None, str]:
    """(namespace of pyverbs' modules, "") or (None, the reason why there is none)."""
    try:
        importlib.import_module("pyverbs.device")
    except ImportError:
        reason = _from_distribution()
        if reason:
            return None, reason
    try:
        modules = {name: importlib.import_module(f"pyverbs.{name}") for name in _MODULES}
    except ImportError as error:
        return None, f"pyverbs cannot be used: {error}"
    return SimpleNamespace(**modules), ""
