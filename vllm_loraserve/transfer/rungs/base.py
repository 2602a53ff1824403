"""What a rung is: one way of getting leased pages into memory of ours."""

from __future__ import annotations

from typing import Protocol

from vllm_loraserve.transfer import wire
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.pages import Destination


class Link(Protocol):
    """What a rung may use of the connection to a peer (`peer.Peer`)."""

    host: str
    port: int
    key: bytes
    welcome: wire.Welcome
    timeout: float

    def ask(self, request: wire.Message) -> wire.Reply:
        """One request on the control connection."""

    def control_fileno(self) -> int:
        """For poll: a hang-up here means that the peer is gone."""


class Rung(Protocol):
    """One way between us and one peer.

    `name` labels metrics and logs. `rdma` says that leases must come with registered memory.
    """

    name: str
    rdma: bool

    def probe(self, link: Link, destination_device: int) -> str:
        """Empty where this way works between the two, else the reason why it does not. May connect."""

    def prepare(self, link: Link) -> None:
        """Before a lease is asked for: whatever the peer must know first. Raises RungFailedError."""

    def tend(self) -> None:
        """Now and then while the peer is connected. Returns at once."""

    def read(self, link: Link, lease: wire.Leased, destination: Destination, flight: Flight) -> list[int] | None:
        """Brings the lease's page stream into the destination and returns when all of it has arrived.

        Returns the pages' checksums where they were computed on the way, else None. Raises RungFailedError where only
        this way is at fault, PeerLostError where the peer is gone, GenerationChangedError where the lease ended.
        """

    def close(self) -> None:
        """Gives back what belongs to this peer. Twice is harmless."""
