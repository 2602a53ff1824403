"""Who is in the cluster: instances, incarnations, heartbeats and expiry. Time (monotonic seconds) is passed in."""

from __future__ import annotations

import msgspec

from vllm_loraserve.coordinator.messages import (
    AdapterDemand,
    ErrorCode,
    Heartbeat,
    Load,
    Register,
    Residency,
)


class Refused(Exception):
    """The request can't be carried out; becomes an Error reply."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: ErrorCode = code


class Member(msgspec.Struct):
    """One live instance: what it said when it joined, and what it said last."""

    hello: Register
    seen: float
    load: Load = Load()
    demand: dict[str, AdapterDemand] = {}
    resident: dict[str, Residency] = {}
    draining: bool = False
    """About to stop: others may still read its adapters, and it gets no more."""

    @property
    def name(self) -> str:
        return self.hello.instance

    def holds(self, adapter: str, sha256: str) -> bool:
        """Whether it reported this very content as resident."""
        copy = self.resident.get(adapter)
        return copy is not None and copy.sha256 == sha256

    def offers(self, adapter: str, sha256: str) -> bool:
        """Whether peers may read this very content from it: what is in its arena alone they can't."""
        return self.holds(adapter, sha256) and self.resident[adapter].generation > 0


class Membership:
    """The live instances; one that is silent for `expiry_s` seconds is out until it registers again."""

    def __init__(self, expiry_s: float) -> None:
        self.expiry_s = expiry_s
        self._members: dict[str, Member] = {}

    def join(self, hello: Register, now: float) -> Member:
        """Adds or replaces an instance.

        Another process under a live instance's name and another URL is refused (`conflict`): it would be two
        instances taking turns. The same URL means that the process there is new.
        """
        present = self._members.get(hello.instance)
        if present is not None and present.hello.incarnation != hello.incarnation and present.hello.url != hello.url:
            raise Refused(
                "conflict",
                f"Instance '{hello.instance}' is already live at {present.hello.url}; give this one another name.",
            )
        resident = {r.name: r for r in hello.resident}
        member = Member(hello=hello, seen=now, resident=resident, draining=hello.draining)
        if present is not None and present.hello.incarnation == hello.incarnation:
            member.load, member.demand = present.load, present.demand
        self._members[hello.instance] = member
        return member

    def beat(self, heartbeat: Heartbeat, now: float) -> Member:
        """Takes an instance's report; Refused `unknown_instance` tells it to register (again)."""
        member = self._members.get(heartbeat.instance)
        if member is None or member.hello.incarnation != heartbeat.incarnation:
            raise Refused("unknown_instance", f"Instance '{heartbeat.instance}' is not registered; register it again.")
        member.seen = now
        member.load = heartbeat.load
        member.demand = {d.name: d for d in heartbeat.demand}
        member.resident = {r.name: r for r in heartbeat.resident}
        member.draining = heartbeat.draining
        return member

    def leave(self, instance: str, incarnation: str) -> bool:
        """Removes an instance that goes; False if it was not in, or is another incarnation."""
        member = self._members.get(instance)
        if member is None or member.hello.incarnation != incarnation:
            return False
        del self._members[instance]
        return True

    def expire(self, now: float) -> list[str]:
        """Removes the silent ones and names them."""
        silent = [name for name, m in self._members.items() if now - m.seen > self.expiry_s]
        for name in silent:
            del self._members[name]
        return silent

    def get(self, instance: str) -> Member | None:
        """A live instance."""
        return self._members.get(instance)

    def all(self) -> list[Member]:
        """Live instances by name."""
        return [self._members[name] for name in sorted(self._members)]

    def serving(self) -> list[Member]:
        """Those of `all` that take new requests and adapters."""
        return [member for member in self.all() if not member.draining]

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, instance: object) -> bool:
        return instance in self._members

    def holders(self, adapter: str, sha256: str) -> set[str]:
        """Live instances that reported this content as resident."""
        return {m.name for m in self._members.values() if m.holds(adapter, sha256)}

    def running(self, adapter: str) -> int:
        """Requests for `adapter` inside all live instances, by their last reports."""
        return sum(d.running for m in self._members.values() if (d := m.demand.get(adapter)) is not None)

    def demand(self) -> dict[str, AdapterDemand]:
        """Demand by adapter, summed over the live instances."""
        total: dict[str, AdapterDemand] = {}
        for member in self._members.values():
            for name, d in member.demand.items():
                t = total.get(name)
                total[name] = (
                    d
                    if t is None
                    else AdapterDemand(
                        name=name,
                        tokens_per_s=t.tokens_per_s + d.tokens_per_s,
                        requests_per_s=t.requests_per_s + d.requests_per_s,
                        running=t.running + d.running,
                    )
                )
        return total
