"""The coordinator's state and its decisions, without sockets: `Controller`.

Durable is the registry. Everything else (members, residency, demand, placement, commands) is soft: after a restart the
instances register again with what they hold, and the placement begins as what is held where. Until the instances that
were members before are back, or `settle_s` has passed, no table is published, so that routers keep the old one
instead of one with holes. Times are seconds of a monotonic clock that the caller passes in.

    register, heartbeat --> members --+
    add, remove adapter --> registry -+--> placement (PlacementLoop) --> commands to instances
                                      +--> routes that can be served --> table for routers
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable

import msgspec

from vllm_loraserve.adapters.shapes import merged
from vllm_loraserve.cluster.operating_points import OperatingPoints, shipped_defaults
from vllm_loraserve.cluster.placement import (
    Placement,
    PlacementInput,
    PlacementPolicy,
    normalise,
)
from vllm_loraserve.coordinator.commands import CommandBook
from vllm_loraserve.coordinator.membership import Member, Membership, Refused
from vllm_loraserve.coordinator.messages import (
    AdapterDemand,
    AdapterRecord,
    AdapterRoutes,
    Heartbeat,
    HeartbeatReply,
    InstanceEntry,
    Location,
    Prediction,
    Register,
    Registered,
    Route,
    RoutingTable,
)
from vllm_loraserve.coordinator.orders import Orders
from vllm_loraserve.coordinator.placement_loop import PlacementLoop
from vllm_loraserve.coordinator.rebalance import effective_routes
from vllm_loraserve.coordinator.registry import Registry
from vllm_loraserve.coordinator.removals import Removals

logger = logging.getLogger(__name__)

ModuleTable = dict[str, tuple[tuple[int, int], ...]]

COMMAND_S = 1.0
"""Time between two looks at what instances should fetch and release, where nothing else asks for one."""
REFUSED_S = 30.0
"""A refused instance asks again every few seconds; so long after its last try it is no longer mentioned."""
MODULES = "modules"
"""Where the registry keeps what its adapters were compared with."""


class ControlOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator may choose."""

    base_model: str = ""
    """Model of the cluster; empty: that of the first instance."""
    max_rank: int = 256
    expiry_s: float = 5.0
    """Silence that ends an instance's membership."""
    settle_s: float = 4.0
    """Longest wait, after a restart, for the instances that were members before."""
    rebalance_s: float = 15.0
    """Time between two looks at whether another placement would be better."""
    release_after_s: float = 10.0
    """A copy that the placement no longer wants is kept so long after the new one is confirmed."""


class Controller:
    """Keeps the cluster's state; `dirty` is set when a new table should be published soon."""

    def __init__(
        self,
        registry: Registry,
        policy: PlacementPolicy,
        options: ControlOptions,
        now: float,
        operating_points: OperatingPoints | None = None,
    ) -> None:
        self.registry = registry
        self.options = options
        op = operating_points if operating_points is not None else shipped_defaults()
        self.loop = PlacementLoop(policy, op, options.rebalance_s, now)
        self.members = Membership(options.expiry_s)
        self.commands = CommandBook()
        self.orders = Orders(registry, self.members, self.commands, options.release_after_s)
        self.base_model = options.base_model or registry.get_meta("base_model") or ""
        self.dirty = asyncio.Event()
        self.modules = self._compared_with()
        """`adapters.shapes.ModuleShapes` of the base model, as instances tell it; empty: none has yet."""
        self.modules_changed = asyncio.Event()
        """The registered adapters have not been compared with `modules`: see `CoordinatorServer._recheck`."""
        self.version = 0
        self._removals = Removals(registry, self.members, self.commands, now)
        self._replacing: dict[str, int] = {}
        """Name that other content has just taken over -> the new `adapter_id`."""
        self._awaited = registry.known_instances()
        self._settled_at = now + options.settle_s
        self._commanded_at = now
        self._refused: dict[str, tuple[float, str]] = {}
        """URL of an instance that was not taken -> when, why."""

    def _compared_with(self) -> ModuleTable:
        stored = self.registry.get_meta(MODULES)
        model, modules = msgspec.json.decode(stored, type=tuple[str, ModuleTable]) if stored else ("", {})
        return modules if model == self.base_model else {}

    # ---- instances ----

    def register(self, hello: Register, now: float) -> Registered:
        """An instance joins; Refused when it serves another model or takes a live one's name."""
        known = self.members.get(hello.instance)
        try:
            self._check_base_model(hello)
            member = self.members.join(hello, now)
        except Refused as refused:
            # Its own log has this too; who looks at `status` for a missing instance should not have to know that.
            self._refused[hello.url] = (now, str(refused))
            raise
        self._refused.pop(hello.url, None)
        if known is None or known.hello.incarnation != hello.incarnation:
            self.commands.forget_instance(hello.instance)
            logger.info(
                "Instance '%s' joined at %s with %d adapters resident", member.name, hello.url, len(member.resident)
            )
        self.registry.remember_instance(hello.instance, hello.url, time.time())
        self._learn_modules()
        self._adopt_residents(member)
        self._awaited.discard(hello.instance)
        if known is None:
            self.loop.soon(now)
        self._place(now)
        return Registered(epoch=self.registry.epoch, expiry_s=self.options.expiry_s)

    def _check_base_model(self, hello: Register) -> None:
        if hello.base_model == self.base_model:
            return
        if self.base_model and (self.options.base_model or len(self.members) or len(self.registry)):
            raise Refused(
                "invalid",
                f"Instance '{hello.instance}' serves '{hello.base_model}', but this cluster '{self.base_model}'; "
                "start it with that model, or give it a coordinator of its own.",
            )
        self.registry.set_meta("base_model", hello.base_model)
        self.base_model = hello.base_model

    def _learn_modules(self) -> None:
        told = merged(m.hello.modules for m in self.members.all())
        if told and told != self.modules:
            self.modules = told
            self.modules_changed.set()

    def _adopt_residents(self, member: Member) -> None:
        """After a restart of ours: what an instance holds is where it was placed."""
        for name in member.resident:
            record = self.registry.get(name)
            if (
                record is not None
                and member.holds(name, record.sha256)
                and (name not in self.placement.phi or not self.settled)
            ):
                holders = self.members.holders(name, record.sha256)
                self.placement.phi[name] = normalise(dict.fromkeys(holders, 1.0))

    def heartbeat(self, beat: Heartbeat, now: float) -> HeartbeatReply:
        """Takes a report and says what to do; Refused `unknown_instance`: it must register first."""
        before = self.members.get(beat.instance)
        held = before.resident if before is not None else {}
        was_draining = before is not None and before.draining
        member = self.members.beat(beat, now)
        self.loop.observe(member, beat, self.registry.ranks(), now)
        self.commands.answered(beat.instance, beat.results, now)
        if member.draining and not was_draining:
            logger.info("Instance '%s' is about to stop, %d requests running", member.name, member.load.running)
            self.commands.forget_instance(member.name)
            self._place(now)
        if beat.results or member.resident != held:
            self._commanded_at = -math.inf  # at the next tick, once for all that report until then
            self.dirty.set()
        commands = tuple(
            msgspec.structs.replace(c, locations=self.locations(c.adapter, besides=beat.instance))
            if c.action == "prefetch"
            else c
            for c in self.commands.of(beat.instance)
        )
        return HeartbeatReply(epoch=self.registry.epoch, commands=commands)

    def locations(self, record: AdapterRecord, besides: str = "") -> tuple[Location, ...]:
        """The location table's row: who holds this content and can be read from, least busy first."""
        holders = [
            m
            for m in self.members.all()
            if m.name != besides and m.hello.transfer and m.offers(record.name, record.sha256)
        ]
        holders.sort(key=lambda m: (m.load.running + m.load.waiting, m.name))
        return tuple(
            Location(instance=m.name, endpoint=m.hello.transfer, generation=m.resident[record.name].generation)
            for m in holders
        )

    def leave(self, instance: str, incarnation: str, now: float) -> None:
        """An instance goes in good order."""
        if self.members.leave(instance, incarnation):
            logger.info("Instance '%s' left", instance)
            self._gone([instance], now)

    def _gone(self, instances: Iterable[str], now: float) -> None:
        for instance in instances:
            self.commands.forget_instance(instance)
            self.loop.speeds.forget(instance)
            self.loop.arrivals.forget(instance)
            self.registry.forget_instance(instance)
        self._place(now)

    # ---- adapters ----

    def check_name(self, name: str) -> None:
        """Refuses a name that no new adapter can have."""
        record = self.registry.get(name)
        if name == self.base_model:
            raise Refused("conflict", f"'{name}' is the base model's name; give the adapter another.")
        if record is not None and record.state == "draining":
            raise Refused("conflict", f"Adapter '{name}' is being removed; add it again when that is done.")

    def max_rank(self) -> int:
        """The largest rank that the cluster takes now."""
        able = [m.hello.capacity.max_rank for m in self.members.all()]
        return min(self.options.max_rank, max(able)) if able else self.options.max_rank

    def add(self, inspected: AdapterRecord, now: float, *, replace: bool = False) -> tuple[AdapterRecord, bool]:
        """Stores an inspected adapter; (record, False) if this content is there already. Other content under the name
        is Refused, or with `replace` gives way."""
        self.check_name(inspected.name)
        present = self.registry.get(inspected.name)
        if present is not None and present.state == "failed" and present.sha256 == inspected.sha256:
            self.found_to_fit(present, now)
            present = self.registry.get(inspected.name)
        other = present if present is not None and present.sha256 != inspected.sha256 else None
        if other is not None and not replace:
            raise Refused(
                "conflict",
                f"Adapter '{inspected.name}' is registered with other content (sha256 {other.sha256[:12]}, "
                f"this is {inspected.sha256[:12]}); replace it (load_inplace), remove it first or choose another name.",
            )
        if present is not None and other is None:
            if present.source != inspected.source:
                present = self.registry.update(inspected.name, source=inspected.source)
                self.dirty.set()
            return present, False
        record = self.registry.add(inspected, replace=other is not None)
        if other is not None:
            self.commands.forget_adapter(record.name)
        logger.info(
            "Adapter '%s' %s: rank %d, %d bytes, sha256 %s",
            record.name,
            "added" if other is None else "replaced",
            record.rank,
            record.size_bytes,
            record.sha256[:12],
        )
        self._place(now)
        if other is not None:
            self._replacing[record.name] = record.adapter_id
            # Also those that have not reported it: a request may have brought it there a moment ago.
            for member in self.members.serving():
                if not self.commands.busy(member.name, record.name):
                    self.commands.tell(member.name, "release", other, now, superseded=True)
        return record, True

    def is_replacing(self, record: AdapterRecord) -> bool:
        """Whether `record` has taken the name over from other content, and not everybody is known to have heard."""
        return self._replacing.get(record.name) == record.adapter_id

    def outdated(self, record: AdapterRecord) -> list[str]:
        """Instances that may give new requests other content than `record`'s under its name."""
        replacing = self.is_replacing(record)
        return [
            m.name
            for m in self.members.serving()
            if (replacing and self.commands.busy(m.name, record.name))
            or ((copy := m.resident.get(record.name)) is not None and copy.sha256 != record.sha256)
        ]

    def replaced(self, record: AdapterRecord) -> str:
        """To be called when nothing is `outdated`: why an instance where `record` is placed can't load it, or empty."""
        if self.is_replacing(record):
            del self._replacing[record.name]
        for instance in sorted(self.placement.phi.get(record.name, ())):
            failure = self.commands.failure(instance, record.name)
            if failure is not None and failure.action == "prefetch":
                return f"'{instance}' can't load it: {failure.error}"
        return ""

    def remove(self, name: str, drain_s: float, now: float) -> asyncio.Event:
        """Begins a removal; the event is set when the adapter is gone. Refused `not_found`."""
        if self.registry.get(name) is None:
            raise Refused(
                "not_found", f"There is no adapter '{name}'; see `vllm-loraserve status` for those there are."
            )
        done, begun = self._removals.begin(name, drain_s, now)
        if begun:
            self._unplace(name)
        return done

    def _unplace(self, name: str) -> None:
        """No new request gets the adapter, and no instance is to fetch it."""
        self.placement.phi.pop(name, None)
        self.placement.standby.pop(name, None)
        for member in self.members.all():
            self.commands.cancel(member.name, name)
        self.dirty.set()

    def fail(self, record: AdapterRecord, reason: str) -> None:
        """An adapter that was registered before the base model was known turns out not to fit it."""
        present = self.registry.get(record.name)
        if present is None or present.adapter_id != record.adapter_id or present.state == "draining":
            return
        self.registry.update(record.name, state="failed", reason=reason)
        self._unplace(record.name)
        logger.warning("Adapter '%s' can't be served: %s", record.name, reason)

    def found_to_fit(self, record: AdapterRecord, now: float) -> None:
        """The opposite of `fail`."""
        present = self.registry.get(record.name)
        if present is not None and present.adapter_id == record.adapter_id and present.state == "failed":
            self.registry.update(record.name, state="active", reason="")
            self._place(now)

    def all_compared(self, modules: ModuleTable) -> None:
        """Every registered adapter was compared with `modules`; that need not be done again after a restart."""
        self.registry.set_meta(MODULES, msgspec.json.encode((self.base_model, modules)).decode())

    # ---- placement ----

    @property
    def settled(self) -> bool:
        """Whether the members of before a restart are back, or were waited for long enough."""
        return not self._awaited

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self.loop.placement

    def placement_input(self, now: float) -> PlacementInput:
        """What a policy gets to see now."""
        return self.loop.input(self.members, self.registry.all(), now)

    def _place(self, now: float) -> None:
        """Gives every adapter a place on the present instances, changing as little as possible."""
        self.dirty.set()
        # Before everybody is back, "nobody holds it" is not known yet.
        if self.members.serving() and self.settled:
            self.loop.repair(self.placement_input(now))
            self._command(now)

    def _command(self, now: float) -> None:
        """Tells instances to fetch what is placed there, and to release what need not be there any more."""
        if not self.settled:
            return
        self._commanded_at = now
        self.orders.give(self.placement, now)

    # ---- time, table ----

    def tick(self, now: float) -> None:
        """To be called a few times a second: expiry, drains, commands, at its time the next look at the placement."""
        if self._awaited and now >= self._settled_at:
            logger.warning("Instances that did not come back after the restart: %s", ", ".join(sorted(self._awaited)))
            for instance in self._awaited:
                self.registry.forget_instance(instance)
            self._awaited.clear()
            self._place(now)
        self._refused = {url: seen for url, seen in self._refused.items() if now - seen[0] < REFUSED_S}
        expired = self.members.expire(now)
        if expired:
            logger.warning("Instances silent for %.1f s, now out: %s", self.options.expiry_s, ", ".join(expired))
            self._gone(expired, now)
        for name in self._removals.step(now, settled=self.settled):
            self._replacing.pop(name, None)
            self.dirty.set()
        if self.settled and now - self._commanded_at >= COMMAND_S:
            self._command(now)
        if self.settled and (reason := self.loop.due(now)) and self.loop.look(self.placement_input(now), reason, now):
            self._command(now)
            self.dirty.set()

    def _routes(self, record: AdapterRecord, live: set[str], now: float) -> tuple[Route, ...]:
        target = self.placement.phi.get(record.name, {})
        if record.state != "active" or not target:
            return ()
        holders = self.members.holders(record.name, record.sha256) & live
        routes = effective_routes(target, live, self.orders.not_ready(record.name, target, now), holders)
        return tuple(Route(instance=s, phi=f) for s, f in routes.items())

    def table(self, now: float) -> RoutingTable:
        """The routing table of this moment, under the next version."""
        self.version += 1
        live = {m.name for m in self.members.serving()}
        wall = time.time()
        return RoutingTable(
            epoch=self.registry.epoch,
            version=self.version,
            base_model=self.base_model,
            instances=tuple(
                InstanceEntry(
                    name=m.name,
                    incarnation=m.hello.incarnation,
                    url=m.hello.url,
                    load=m.load,
                    capacity=m.hello.capacity,
                    resident=tuple(m.resident.values()),
                    transfer=m.hello.transfer,
                    last_seen=wall - (now - m.seen),
                    speed=self.loop.speeds.speed(m.name),
                    draining=m.draining,
                )
                for m in self.members.all()
            ),
            adapters=tuple(AdapterRoutes(adapter=r, routes=self._routes(r, live, now)) for r in self.registry.all()),
            made_at=wall,
            settled=self.settled,
            prediction=self._prediction(),
        )

    def _prediction(self) -> Prediction | None:
        op, choice = self.loop.op, self.loop.policy.choice
        if choice is None or op.step_cost is None:
            return None
        return Prediction(step_cost=op.step_cost, measured=op.measured, choice=choice)

    def demand(self) -> tuple[AdapterDemand, ...]:
        """Demand by adapter, heaviest first."""
        return tuple(sorted(self.members.demand().values(), key=lambda d: (-d.tokens_per_s, d.name)))

    def problems(self) -> list[str]:
        """What an operator should know, one sentence each."""
        out = [f"'{r.name}' can't be served: {r.reason}" for r in self.registry.all() if r.state == "failed"]
        out += [f"'{a}' has no place: it {why}." for a, why in sorted(self.placement.unplaced.items())]
        out += [
            f"'{instance}' can't load '{adapter}': {f.error}"
            for (instance, adapter), f in sorted(self.commands.failures().items())
        ]
        out += self._foreign_points()
        out += self.loop.speeds.warnings()
        out += [f"Refused {url}: {why}" for url, (_, why) in sorted(self._refused.items())]
        out += [f"Waiting for '{name}' to register again after the restart." for name in sorted(self._awaited)]
        return out

    def _foreign_points(self) -> list[str]:
        """Measured operating points that are none of this cluster's."""
        op, kinds = self.loop.op, {m.hello.capacity.device for m in self.members.all()}
        if op.measured and op.model and self.base_model not in ("", op.model):
            of, here = op.model, self.base_model
        elif op.measured and op.device and kinds and op.device not in kinds:
            of, here = op.device, ", ".join(sorted(kinds))
        else:
            return []
        return [f"The operating points are those of '{of}', not of '{here}'; measure them by `vllm-loraserve profile`."]
