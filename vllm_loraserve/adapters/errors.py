"""The one error type that every room raises about an adapter; its `kind` decides the HTTP status."""

from typing import Literal

AdapterErrorKind = Literal["not_found", "forbidden", "invalid", "unsupported", "too_large", "mismatch"]


class AdapterError(ValueError):
    """An adapter cannot be used. `str(error)` is one sentence that names the thing and the fix.

    Kinds: `not_found` (nothing at that path or name), `forbidden` (outside the allowed roots), `invalid`
    (broken or incomplete files), `unsupported` (a PEFT feature or file format that is not served),
    `too_large` (rank or size over a limit), `mismatch` (does not fit the base model or its own config).
    """

    def __init__(self, kind: AdapterErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind: AdapterErrorKind = kind

    def __reduce__(self) -> tuple[type["AdapterError"], tuple[AdapterErrorKind, str]]:
        return type(self), (self.kind, str(self))
