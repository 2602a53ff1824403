"""What the router knows of the cluster: the newest routing table, indexed for lookups, and the instances in it.

The table may be old: with the coordinator away the last one stays in force. After a coordinator's restart its first
tables can lack instances that are alive and about to register again; those stay eligible for `LINGER_S`. An instance
that is draining gets no new requests and finishes those that it has. One that leaves the table otherwise is gone: its
requests that have been silent for `ORPHAN_S` are taken back and tried elsewhere (an unreachable host sends no reset).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from vllm_loraserve.coordinator.client import STALE_S
from vllm_loraserve.coordinator.messages import AdapterRoutes, RoutingTable
from vllm_loraserve.router.errors import invalid, unavailable, unknown_model
from vllm_loraserve.router.upstream import Upstream

logger = logging.getLogger(__name__)

LINGER_S = 10.0
ORPHAN_S = 5.0
NO_INSTANCE_RETRY_S = 2.0
"""About what a restarted instance or a table takes to arrive."""


class Target:
    """What a request asks for: the adapter's eligible instances with their fractions phi (empty: any), its rank."""

    __slots__ = ("name", "rank", "routes", "size_bytes")

    def __init__(self, name: str, routes: dict[str, float], rank: int, size_bytes: int = 0) -> None:
        self.name = name
        self.routes = routes
        self.rank = rank
        self.size_bytes = size_bytes


class Directory:
    """Models and instances by name. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.table: RoutingTable | None = None
        self.received = 0.0
        self.upstreams: dict[str, Upstream] = {}
        self.adapters: dict[str, AdapterRoutes] = {}
        self.smallest_max_rank = 0
        """Adapters up to this rank can go to every instance."""
        self.on_change: Callable[[], None] = lambda: None
        self._targets: dict[str, Target] = {}
        self._epoch_since = 0.0
        self._draining: dict[str, Upstream] = {}
        self._leaving: set[Upstream] = set()

    @property
    def base_model(self) -> str:
        """Name of the base model; empty until an instance has been seen."""
        return self.table.base_model if self.table else ""

    @property
    def epoch(self) -> int:
        """Of the coordinator whose table is in force; rises with each of its starts."""
        return self.table.epoch if self.table else 0

    def age_s(self) -> float:
        """Seconds since a table came in; infinite before the first."""
        return self.clock() - self.received if self.table else float("inf")

    def apply(self, table: RoutingTable) -> bool:
        """Takes a table in force; False when it is older than the present one.

        A table equal in (epoch, version) brings fresh loads and is taken too.
        """
        now = self.clock()
        old = self.table
        if old is not None and table.settled and (table.epoch, table.version) < (old.epoch, old.version):
            if now - self.received < STALE_S:
                return False
            logger.warning("Took a routing table of epoch %d in place of %d", table.epoch, old.epoch)
        if old is not None and not table.settled:
            table = _completed(table, old)
        if not table.base_model and old is not None and old.base_model:
            table = msgspec.structs.replace(table, base_model=old.base_model)
        if old is None or table.epoch != old.epoch:
            self._epoch_since = now
        self.received = now
        self.table = table
        if old is None or table.adapters is not old.adapters:
            self.adapters = {routes.adapter.name: routes for routes in table.adapters}
        for entry in table.instances:
            known = self.upstreams.get(entry.name) or self._draining.get(entry.name)
            if known is None or known.entry.incarnation != entry.incarnation or known.entry.url != entry.url:
                if known is not None:
                    self._remove(known)
                known = Upstream(entry, table.epoch)
                self.upstreams[entry.name] = known
                logger.info("Instance %s at %s is in", entry.name, entry.url)
            known.entry = entry
            known.epoch = table.epoch
            if entry.draining and not known.gone:
                del self.upstreams[entry.name]
                self._draining[entry.name] = known
                known.gone = True
                logger.info("Instance %s is about to stop, %d requests under way", known.name, known.in_flight)
        self.sweep()
        self.smallest_max_rank = min((u.entry.capacity.max_rank for u in self.upstreams.values()), default=0)
        self._targets = {}
        self.on_change()
        return True

    def sweep(self) -> None:
        """Drops instances that left the table, and calls back requests that wait for a dead one; run it often."""
        now = self.clock()
        table = self.table
        if table is None:
            return
        listed = {entry.name for entry in table.instances}
        for name, upstream in [*self.upstreams.items(), *self._draining.items()]:
            if name not in listed and (upstream.epoch == table.epoch or now - self._epoch_since >= LINGER_S):
                self._targets = {}
                self._remove(upstream)
        for upstream in list(self._leaving):
            for attempt in list(upstream.attempts):
                if now - attempt.last_byte >= ORPHAN_S:
                    attempt.call_back()
            if not upstream.attempts:
                self._leaving.discard(upstream)

    def _remove(self, upstream: Upstream) -> None:
        for known in (self.upstreams, self._draining):
            known.pop(upstream.name, None)
        upstream.gone = True
        self._leaving.add(upstream)
        logger.info("Instance %s is out, %d requests under way", upstream.name, upstream.in_flight)

    def live(self) -> list[Upstream]:
        """Instances in the table (or lingering) that may get requests, whether or not their breaker is open."""
        return list(self.upstreams.values())

    def busy(self) -> list[Upstream]:
        """Those of `live`, and draining ones, which still have requests."""
        return [*self.upstreams.values(), *self._draining.values()]

    def resolve(self, model: str | None) -> Target:
        """The target of a request for `model` (none or empty: the base model, as vLLM takes it).

        Raises ApiError 404 for a name that is not registered or on its way out, 400 for an adapter that does not fit
        the base model, and 503 for every name while nothing is known of the cluster: a client may give up on a 404 for
        good.
        """
        name = model or self.base_model
        target = self._targets.get(name)
        if target is not None:
            return target
        if name == self.base_model:
            target = Target(name, {}, 0)
        else:
            known = self.adapters.get(name)
            if known is None and not self.base_model:
                raise unavailable("No instance has been seen yet; try again shortly.", NO_INSTANCE_RETRY_S)
            if known is None or known.adapter.state == "draining":
                raise unknown_model(name, self.base_model)
            if known.adapter.state == "failed":
                raise invalid(f"The adapter `{name}` can't be served: {known.adapter.reason}", "model")
            routes = {route.instance: route.phi for route in known.routes if route.instance in self.upstreams}
            target = Target(name, routes, known.adapter.rank, known.adapter.size_bytes)
        self._targets[name] = target
        return target


def _completed(table: RoutingTable, old: RoutingTable) -> RoutingTable:
    """The adapters of a table that a coordinator made just after its restart, with the instances and routes of before.

    Its registry is whole; instances are still registering. The old version is kept: what is published next is newer.
    """
    routes = {known.adapter.name: known.routes for known in old.adapters}
    adapters = tuple(
        AdapterRoutes(adapter=new.adapter, routes=new.routes or routes.get(new.adapter.name, ()))
        for new in table.adapters
    )
    return msgspec.structs.replace(old, adapters=adapters)
