"""From where adapters should be to what each instance is told: fetch what is placed there, release what need not be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_loraserve.cluster.placement import Placement
from vllm_loraserve.coordinator.commands import CommandBook
from vllm_loraserve.coordinator.footprint import page_bytes, rank_rows
from vllm_loraserve.coordinator.membership import Member, Membership
from vllm_loraserve.coordinator.messages import AdapterRecord, Capacity, Residency
from vllm_loraserve.coordinator.registry import Registry

FETCH_PATIENCE_S = 10.0
"""An instance that has not confirmed a prefetch by then is routed to all the same: the request itself brings it in."""


class Orders:
    """Compares the placement with what instances hold, and writes the difference into the command book.

    `release_after_s`: a copy that the placement no longer wants is kept so long after the new one is confirmed.
    """

    def __init__(self, registry: Registry, members: Membership, commands: CommandBook, release_after_s: float) -> None:
        self.registry, self.members, self.commands = registry, members, commands
        self.release_after_s = release_after_s
        self._spare_since: dict[tuple[str, str], float] = {}
        """(instance, adapter) of a copy that the placement no longer wants -> since when another one serves."""

    def give(self, placement: Placement, now: float) -> None:
        """Tells every instance what to fetch and what to release; what it was told already is not told again."""
        demand = self.members.demand()
        wanted: dict[str, list[AdapterRecord]] = {m.name: [] for m in self.members.serving()}
        for name in placement.phi:
            record = self.registry.get(name)
            if record is not None and record.state == "active":
                for instance in placement.holders(name):
                    if instance in wanted:
                        wanted[instance].append(record)
        for member in self.members.serving():
            records = wanted[member.name]
            # Copies that serve before spare ones: `fitting` cuts what comes last.
            records.sort(
                key=lambda r: (
                    member.name not in placement.phi[r.name],
                    -(d.tokens_per_s if (d := demand.get(r.name)) else 0.0),
                    r.adapter_id,
                )
            )
            for record in fitting(records, member.hello.capacity):
                # Only what fits together is fetched ahead; the rest comes with its first request, by eviction.
                if not member.holds(record.name, record.sha256):
                    self.commands.tell(member.name, "prefetch", record, now)
            self._release(member, {r.name for r in records}, placement, now)

    def _release(self, member: Member, wanted: set[str], placement: Placement, now: float) -> None:
        for name, copy in member.resident.items():
            key = (member.name, name)
            record = self.registry.get(name)
            if record is None or record.sha256 != copy.sha256:
                # A prefetch of the content that took the name over lets go of this one, and leaves no gap.
                if self.commands.waiting_since(member.name, name, "prefetch") is None:
                    self.commands.tell(member.name, "release", record_of(copy), now, superseded=record is not None)
                continue
            elsewhere = self.members.holders(name, record.sha256) - {member.name}
            placed = set(placement.phi.get(name, {}))
            if name in wanted or record.state != "active" or not elsewhere & placed:
                self._spare_since.pop(key, None)
                continue
            since = self._spare_since.setdefault(key, now)
            running = member.demand[name].running if name in member.demand else 0
            if running == 0 and now - since >= self.release_after_s:
                self.commands.tell(member.name, "release", record, now)

    def not_ready(self, name: str, instances: Iterable[str], now: float) -> set[str]:
        """Those of `instances` that are still fetching the adapter, or could not a short while ago."""
        out = set()
        for instance in instances:
            since = self.commands.waiting_since(instance, name, "prefetch")
            failure = self.commands.failure(instance, name)
            if (since is not None and now - since < FETCH_PATIENCE_S) or (
                failure is not None and now < failure.retry_at
            ):
                out.add(instance)
        return out


def fitting(records: Iterable[AdapterRecord], capacity: Capacity) -> Iterator[AdapterRecord]:
    """The first of `records` that an instance can hold together: in its host tier where it has one, else its arena."""
    count = capacity.adapters()
    room = capacity.host_bytes or capacity.rank_rows
    for record in records:
        room -= page_bytes(record, capacity) if capacity.host_bytes else rank_rows(record, capacity)
        count -= 1
        if room < 0 or count < 0:
            return
        yield record


def record_of(copy: Residency) -> AdapterRecord:
    """As much of a record as a copy tells of one that the registry does not have: enough to release it."""
    return AdapterRecord(
        name=copy.name,
        source="",
        rank=0,
        target_modules=(),
        size_bytes=0,
        sha256=copy.sha256,
        base_model="",
        added_at=0.0,
    )
