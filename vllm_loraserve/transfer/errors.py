"""What can go wrong between two instances; each class says whether another try, or another source, can help."""

from __future__ import annotations

from collections.abc import Sequence


class TransferError(Exception):
    """Base of every failure of a transfer. One sentence, naming peer and adapter."""


class AuthenticationError(TransferError):
    """The other side does not know the cluster key."""


class PeerLostError(TransferError):
    """The peer died, hung or became unreachable: take another source."""


class NotHeldError(TransferError):
    """The peer does not hold the adapter (any more): take another source."""


class LayoutMismatchError(TransferError):
    """The peer's pages are cut for another model, dtype, tensor-parallel rank or page size: take another source."""


class DigestMismatchError(TransferError):
    """The peer holds other content under this name: take another source."""


class GenerationChangedError(TransferError):
    """The source replaced or dropped the pages while they were read: lease again and read again."""


class CorruptPageError(TransferError):
    """A page arrived with a wrong checksum: read again, then take another source."""


class RungFailedError(TransferError):
    """This way to the peer failed, the peer itself may be well: take the next rung."""


class CancelledError(TransferError):
    """Somebody else brought the adapter first, or the pool is closing."""


class DeadlineError(TransferError):
    """The time given for the transfer is over."""


class BandwidthError(DeadlineError):
    """Our own bandwidth cap leaves no time for the transfer: nobody else is at fault."""


class AdapterUnavailableError(TransferError):
    """Every source failed. `http_status` is what a request for the adapter deserves; the engine itself is well."""

    http_status = 503

    def __init__(self, name: str, failures: Sequence[tuple[str, str]]) -> None:
        self.name, self.failures = name, tuple(failures)
        tried = "; ".join(f"{source}: {why}" for source, why in failures) or "no source is known"
        super().__init__(f"adapter {name!r} cannot be brought in now ({tried})")
