"""Which content the cluster's adapters were registered with: what a worker reads from their source must be that.

An instance that read something else would answer with other weights than its peers under the same name, and would use
KV blocks of the registered ones for them: vLLM keys its prefix cache by name and path.
"""

from __future__ import annotations

from pathlib import Path

from vllm.lora.request import LoRARequest

from vllm_loraserve.adapters.errors import AdapterError


class RegisteredContents:
    """Content hash by name and path, as `resolver.py` spells the path: one content for each, for good."""

    def __init__(self) -> None:
        self._digests: dict[tuple[str, str], str] = {}

    def expect(self, name: str, path: str, digest: str) -> None:
        """The adapter `name` is served from `path` with this content (`content_hash`) and no other."""
        self._digests[name, path] = digest

    def check(self, request: LoRARequest, directory: Path, digest: str) -> None:
        """Raises AdapterError `mismatch` where `directory` holds other content than was registered; what is not the
        cluster's passes."""
        expected = self._digests.get((request.lora_name, request.lora_path))
        if expected is not None and digest != expected:
            raise AdapterError(
                "mismatch",
                f"'{directory}' has changed since '{request.lora_name}' was registered from it; load it again with "
                "load_inplace, or give the new weights a name of their own.",
            )
