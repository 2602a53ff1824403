"""API keys of the router: read from the environment or a file, compared in constant time, never logged."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from vllm_loraserve.router.errors import ApiError

API_KEY_ENV = "LORASERVE_API_KEY"
ADMIN_KEY_ENV = "LORASERVE_ADMIN_API_KEY"
UPSTREAM_KEY_ENV = "LORASERVE_UPSTREAM_API_KEY"


class Keys:
    """A set of bearer keys; only their SHA-256 digests are kept. An empty set lets everybody in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys if key]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"Keys({len(self._digests)})"

    def admits(self, authorization: str | None) -> bool:
        """Whether the `Authorization` header carries one of the keys.

        Digests are compared, and always all of them, so that the time tells neither how much of a key is right nor
        which key it was.
        """
        if not self._digests:
            return True
        scheme, _, token = (authorization or "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found and scheme.lower() == "bearer"

    def require(self, authorization: str | None, x_api_key: str | None = None) -> None:
        """Raises ApiError 401 unless one of the headers is admitted; Anthropic's clients send `X-Api-Key`."""
        if authorization is None and x_api_key is not None:
            authorization = f"Bearer {x_api_key}"
        if not self.admits(authorization):
            raise ApiError(
                401,
                "AuthenticationError",
                "Missing or wrong API key: send 'Authorization: Bearer KEY'.",
                headers={"WWW-Authenticate": "Bearer"},
            )


def load_keys(environment: Mapping[str, str], variable: str, file: Path | None) -> Keys:
    """Keys from an environment variable (separated by commas) and a file (one a line, `#` begins a comment).

    Raises ValueError when the file can't be read or has no key: a router that was told to ask for keys must not
    start open.
    """
    keys = [key.strip() for key in environment.get(variable, "").split(",")]
    if file is not None:
        try:
            lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
        except OSError as error:
            raise ValueError(f"API key file {file}: {error.strerror}; give a readable file") from None
        if not any(lines):
            raise ValueError(f"API key file {file} has no key; write one key a line")
        keys += lines
    return Keys(key for key in keys if key)
