"""What the package says of itself, in a process of vLLM's: vLLM configures its own loggers only.

Modules that vLLM knows nothing of (`transfer/`, `memory/`) log under the package's name: which way a peer is read by
and why no better one, what came from where. Without this only their warnings would be seen.
"""

from __future__ import annotations

import logging


def show() -> None:
    """The package logs as vLLM does, unless somebody has configured logging for everybody. Twice is harmless."""
    ours, theirs = logging.getLogger("vllm_loraserve"), logging.getLogger("vllm")
    if logging.getLogger().handlers or ours.handlers:
        return
    for handler in theirs.handlers:
        ours.addHandler(handler)
    ours.setLevel(theirs.getEffectiveLevel())
