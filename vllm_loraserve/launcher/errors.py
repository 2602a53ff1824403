"""What ends a command of the launcher with one message."""

from __future__ import annotations


class StartError(RuntimeError):
    """The cluster could not be started; the message names the part and, if it has a log, ends with its last lines."""


class AdapterRefused(StartError):
    """The cluster does not take an adapter; `status` is HTTP's, 409: its name is registered with other content."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
