"""The event loop: arrivals, engine steps, loads and fetches, rebalancing, failures.

`simulate` runs one workload on given machines under one system with the very policies, routing and demand
code the coordinator and router use. Deterministic: the same arguments give the same result.
"""

from __future__ import annotations

import collections
import heapq
import random
from collections.abc import Callable, Sequence
from enum import IntEnum

import msgspec

from vllm_loraserve.cluster.demand import DemandHistory
from vllm_loraserve.cluster.operating_points import OperatingPoints
from vllm_loraserve.cluster.placement import Placement, PlacementInput, make_policy
from vllm_loraserve.cluster.routing import choose, draw, rendezvous
from vllm_loraserve.cluster.routing_plus import (
    ServerView,
    choose_finish_time,
    choose_least_added_cost,
    spill_candidates,
)
from vllm_loraserve.simulator.machine import Kernels, Machine
from vllm_loraserve.simulator.request import Request
from vllm_loraserve.simulator.results import Result
from vllm_loraserve.simulator.server import Server
from vllm_loraserve.simulator.systems import RoutingMode, System
from vllm_loraserve.simulator.workload import Workload

WARM_S = 5.0
"""Seconds of traffic that the first placement is told about."""


class Failure(msgspec.Struct, frozen=True):
    """Server `server` (its index) is dead from `start` to `stop` (seconds): its work is retried elsewhere,
    its host tier and arena are empty when it returns."""

    server: int
    start: float
    stop: float


class Abort(msgspec.Struct, frozen=True):
    """Stop as soon as more than `share` of all requests have a TTFT above `ttft_s`: the SLO is lost."""

    ttft_s: float
    share: float = 0.05


class _Event(IntEnum):
    FAIL = 0
    RECOVER = 1
    STEP = 2
    LOAD = 3
    TICK = 4
    SAMPLE = 5


class Simulation:
    """State of one run; use `simulate`."""

    def __init__(
        self,
        workload: Workload,
        machines: Sequence[Machine],
        system: System,
        kernels: Kernels,
        op: OperatingPoints | None,
        seed: int,
        failures: Sequence[Failure],
        abort: Abort | None,
        sample_s: float,
        window_s: float,
        on_progress: Callable[[float], None] | None,
        placement: Placement | None = None,
    ) -> None:
        self.workload = workload
        self.system = system
        self.adapters = workload.adapters
        self.names = [a.name for a in self.adapters]
        self.servers = [
            Server(i, m, kernels, self.adapters, self._fetch, self._post_load) for i, m in enumerate(machines)
        ]
        self.server_names = [f"s{i:04d}" for i in range(len(machines))]
        self.by_name = dict(zip(self.server_names, self.servers, strict=True))
        self.specs = [m.server(n) for m, n in zip(machines, self.server_names, strict=True)]
        self.views = [ServerView(n) for n in self.server_names]
        self.op = op or machines[0].operating_points()
        self.cost = self.op.step_cost or machines[0].step_cost
        self.policy = make_policy(system.policy)
        self.rng = random.Random(seed)
        self.heap: list[tuple[float, int, int, int, int]] = []
        self.sequence = 0
        self.holders: list[set[int]] = [set() for _ in self.adapters]
        self.demand = DemandHistory(window_s=window_s)
        self.mean_output = 128.0
        self.placement = Placement()
        self.given = placement
        self.routes: list[dict[str, float]] = []
        self.standby: list[list[int]] = []
        self.parked: list[Request] = []
        """Requests that wait for any server to come back."""
        self.uncopied: set[int] = set()
        """Adapters for which no host tier has room: served from their checkpoints."""
        self.expected: dict[str, float] = {}
        self.last_tick = 0.0
        self.bytes_moved = 0
        self.fetches = 0
        self.rebalances = 0
        self.placed_per_server = 0
        self.abort = abort
        self.bad = 0
        self.finished = 0
        self.aborted = False
        self.sample_s = sample_s
        self.load_samples: list[tuple[float, list[float]]] = []
        self.failures = failures
        self.on_progress = on_progress
        arrival, adapter = workload.arrival.tolist(), workload.adapter.tolist()
        prompt, output = workload.prompt.tolist(), workload.output.tolist()
        rank = [a.rank for a in self.adapters]
        self.requests = [
            Request(i, arrival[i], adapter[i], rank[adapter[i]] if adapter[i] >= 0 else 0, prompt[i], output[i])
            for i in range(len(arrival))
        ]
        if workload.session is not None:
            for r, s in zip(self.requests, workload.session.tolist(), strict=True):
                r.session = s

    # -- the loop
    # ----------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Runs until every request has finished (or the abort rule says the SLO is lost)."""
        self._place(0.0, warm=True)
        for i, f in enumerate(self.failures):
            self._push(f.start, _Event.FAIL, i, 0)
            self._push(f.stop, _Event.RECOVER, i, 0)
        if self.system.period_s > 0.0:
            self._push(self.system.period_s, _Event.TICK, 0, 0)
        if self.sample_s > 0.0:
            self._push(self.sample_s, _Event.SAMPLE, 0, 0)
        requests, n = self.requests, len(self.requests)
        last_arrival = requests[-1].arrival if requests else 0.0
        heap = self.heap
        i = 0
        now = 0.0
        while self.finished < n and not self.aborted:
            if i < n and (not heap or requests[i].arrival <= heap[0][0]):
                r = requests[i]
                now = r.arrival
                i += 1
                if not i % 512 and self.on_progress is not None:
                    self.on_progress(i / n)
                self._arrive(r, now)
                continue
            if not heap:
                break
            now, _, kind, a, b = heapq.heappop(heap)
            if kind == _Event.STEP:
                server = self.servers[a]
                if server.version == b and server.alive:
                    self._account(server.finish_step(now), now, server)
                    self._start(server, now)
            elif kind == _Event.LOAD:
                server = self.servers[a]
                if server.alive and server.loading.get(b, -1.0) >= 0.0 and now >= server.loading[b]:
                    server.loaded(b)
                    self._wake(server, now)
            elif kind == _Event.TICK:
                if now <= last_arrival + self.system.period_s:
                    self._place(now)
                    self._push(now + self.system.period_s, _Event.TICK, 0, 0)
            elif kind == _Event.SAMPLE:
                self._sample(now)
                self._push(now + self.sample_s, _Event.SAMPLE, 0, 0)
            elif kind == _Event.FAIL:
                self._fail(self.servers[self.failures[a].server], now)
            else:
                self._recover(self.servers[self.failures[a].server], now)
        return Result.of(self, now)

    def _push(self, time: float, kind: int, a: int, b: int) -> None:
        self.sequence += 1
        heapq.heappush(self.heap, (time, self.sequence, kind, a, b))

    def _post_load(self, server: Server, adapter: int, time: float) -> None:
        self._push(time, _Event.LOAD, server.index, adapter)

    def _start(self, server: Server, now: float) -> None:
        if server.machine.beside is not None:
            server.neighbours = sum(1 for s in self.servers if s.step_end > now and s is not server)
        if server.start(now):
            server.version += 1
            self._push(server.step_end, _Event.STEP, server.index, server.version)

    def _wake(self, server: Server, now: float) -> None:
        """Something changed on a server: start it if idle, cut a leap short."""
        if server.step_end < 0.0:
            self._start(server, now)
        elif server.leap > 1 and server.interrupt(now):
            server.version += 1
            self._push(server.step_end, _Event.STEP, server.index, server.version)

    def _arrive(self, r: Request, now: float) -> None:
        if r.adapter >= 0 and not r.retries:
            self.demand.add(self.names[r.adapter], r.prompt + self.mean_output, now)
            if self.system.burst_rebalance and not r.index % 64:
                self._check_burst(now)
        self._dispatch(r, now)

    def _dispatch(self, r: Request, now: float) -> None:
        if not any(s.alive for s in self.servers):
            self.parked.append(r)
            return
        server = self.servers[self._route(r, now)]
        server.enqueue(r)
        server.prefetch(r.adapter, now)
        self._wake(server, now)

    def _account(self, finished: list[Request], now: float, server: Server) -> None:
        for r in finished:
            self.finished += 1
            self.mean_output += 0.01 * (r.output + r.generated - self.mean_output)
            if self.abort is not None and r.first_token - r.arrival > self.abort.ttft_s:
                self.bad += 1
        if self.abort is not None:
            limit = self.abort.share * len(self.requests)
            late = now - self.abort.ttft_s
            if server.waiting and server.waiting[0].arrival < late:
                waiting_late = sum(1 for s in self.servers for r in s.waiting if r.arrival < late)
                self.aborted = self.bad + waiting_late > limit
            else:
                self.aborted = self.bad > limit

    # -- routing
    # -----------------------------------------------------------------------------------------------

    def _route(self, r: Request, now: float) -> int:
        if r.adapter < 0:
            alive = [s for s in self.servers if s.alive]
            return min(alive, key=lambda s: (s.queued_tokens + s.context, s.index)).index
        routes = {s: p for s, p in self.routes[r.adapter].items() if self.by_name[s].alive}
        mode = self.system.routing
        if not routes:
            alive = [s for s in self.servers if s.alive]
            holders = [s for s in alive if r.adapter in s.host] or alive
            if mode is not RoutingMode.FINISH_TIME:
                return min(holders, key=lambda s: (s.queued_tokens + s.context, s.index)).index
        if mode is RoutingMode.PHI:
            return self.by_name[draw(routes, self.rng)].index
        if mode is RoutingMode.PHI_LIVE:
            requests = {s: float(self.by_name[s].running + len(self.by_name[s].waiting)) for s in routes}
            chosen_by_load = choose(routes, requests, self.rng)
            assert chosen_by_load is not None, "there is a route"
            return self.by_name[chosen_by_load].index
        if mode is RoutingMode.LEAST_LOADED:
            return min(
                (self.by_name[s] for s in routes), key=lambda s: (s.queued_tokens + s.queued_kv + s.context, s.index)
            ).index
        spec = self.adapters[r.adapter]
        if mode is RoutingMode.LEAST_ADDED_COST:
            views = [self._view(self.by_name[s], r.adapter, p, now) for s, p in routes.items()]
            return self.by_name[choose_least_added_cost(views, self.cost, r.prompt, self.mean_output, r.rank)].index
        chosen = {self.by_name[s].index: p for s, p in routes.items()}
        for s in self.standby[r.adapter]:
            if self.servers[s].alive:
                chosen.setdefault(s, 0.0)
        others = [s for s in self.servers if s.alive and s.index not in chosen]
        for other in spill_candidates(
            others,
            in_use=lambda s: r.adapter in s.demanded,
            room=lambda s: s.machine.arena_rows - s.rows_demanded,
            load=lambda s: (s.queued_tokens + s.queued_kv, s.running, s.index),
        ):
            chosen[other.index] = 0.0
        views = [self._view(self.servers[i], r.adapter, p, now) for i, p in chosen.items()]
        return self.by_name[
            choose_finish_time(views, self.cost, r.prompt, self.mean_output, r.rank, spec.rank_rows)
        ].index

    def _view(self, s: Server, a: int, phi: float, now: float) -> ServerView:
        v = self.views[s.index]
        m = s.machine
        v.phi = phi
        v.demanded = a in s.demanded
        v.blocked = 0 if a in s.arena or a in s.loading else s.demanded.get(a, 0)
        v.rows_demanded = s.rows_demanded
        v.arena_rows = m.arena_rows
        v.queued = len(s.waiting)
        v.queued_tokens = s.queued_tokens
        v.queued_token_ranks = s.queued_token_ranks
        v.running = s.running
        v.decode_rank_sum = s.decode_rank_sum
        v.context_tokens = s.context
        v.distinct = len(s.refs)
        v.distinct_rows = s.rows_in_use
        v.max_rank = s.max_rank
        v.kv_free = m.kv_tokens - s.kv.used
        v.kv_queued = s.queued_kv
        v.seats_free = m.max_seqs - s.running
        v.step_left_s = max(min(s.step_end - now, s.last_dt), 0.0) if s.step_end >= 0.0 else 0.0
        v.speed = m.speed
        v.max_batched_tokens = m.max_batched_tokens
        if a in s.arena:
            v.ready_s = 0.0
        elif a in s.loading:
            v.ready_s = max(s.loading[a] - now, 0.0)
        else:
            size = self.adapters[a].bytes
            v.ready_s = max(s.pcie_free - now, 0.0) + m.load_latency_s + size / m.h2d_bytes_s
            if a not in s.host:
                v.ready_s = max(s.nic_in_free - now, 0.0) + m.fetch_latency_s + size / m.net_bytes_s
        return v

    # -- adapters
    # ----------------------------------------------------------------------------------------------

    def _fetch(self, target: Server, a: int, now: float) -> float:
        """Brings `a` from the least busy live holder (one-sided read), else from the checkpoint."""
        m = target.machine
        size = self.adapters[a].bytes
        sources = [self.servers[i] for i in self.holders[a] if self.servers[i].alive and i != target.index]
        if sources:
            source = min(sources, key=lambda s: (s.nic_out_free, s.index))
            begin = max(now, target.nic_in_free, source.nic_out_free)
            done = begin + m.fetch_latency_s + size / min(m.net_bytes_s, source.machine.net_bytes_s)
            source.nic_out_free = done
            self.bytes_moved += size
        else:
            begin = max(now, target.nic_in_free)
            done = begin + m.disk_latency_s + size / m.disk_bytes_s
        target.nic_in_free = done
        self.fetches += 1
        self._hold(target, a)
        return done

    def _hold(self, server: Server, a: int) -> None:
        """A copy in the host tier of `server`; makes room, then drops copies elsewhere that nobody placed."""
        size, limit = self.adapters[a].bytes, server.machine.host_bytes
        if server.host_used + size > limit:
            name = self.server_names[server.index]
            for victim in list(server.host):
                if server.host_used + size <= limit:
                    break
                placed = name in self.routes[victim] or server.index in self.standby[victim]
                last = len(self.holders[victim]) < 2
                if victim in self.uncopied:
                    placed = last = False  # what lives in its checkpoint is only cached here
                if not placed and not last and victim not in server.refs:
                    server.drop(victim)
                    self.holders[victim].discard(server.index)
            if server.host_used + size > limit:
                return  # it runs from the arena; the host tier stays as it is
        server.hold(a)
        self.holders[a].add(server.index)
        self._drop_unplaced(a)

    def _drop_unplaced(self, a: int) -> None:
        """Lazy migration: an old copy goes once a placed server has its own; never the last one."""
        placed = {self.by_name[s].index for s in self.routes[a]}
        if placed and placed <= self.holders[a]:
            for i in list(self.holders[a] - placed - set(self.standby[a])):
                if a not in self.servers[i].refs and a not in self.servers[i].loading:
                    self.servers[i].drop(a)
                    self.holders[a].discard(i)

    def _place(self, now: float, warm: bool = False) -> None:
        """One round of the placement loop: forecast, place, publish routes; copies move when asked for."""
        alive = [spec for spec, s in zip(self.specs, self.servers, strict=True) if s.alive]
        if not alive:
            return
        self.expected = self._history() if warm else self.demand.forecast(now)
        inp = PlacementInput(
            adapters=self.adapters,
            servers=alive,
            demand=self.expected,
            op=self.op,
            previous=None if warm else self.placement,
        )
        self.placement = placed = self.given if warm and self.given is not None else self.policy.place(inp)
        largest = max(spec.capacity_rank_rows for spec in alive)
        self.uncopied = {a for a, n in enumerate(self.names) if n in placed.unplaced}
        for a in self.uncopied:
            if self.adapters[a].rank_rows > largest:
                raise ValueError(f"simulation: adapter {self.names[a]} {placed.unplaced[self.names[a]]}")
        live = [spec.name for spec in alive]
        self.routes = [
            {rendezvous(n, live)[0]: 1.0} if a in self.uncopied else placed.phi[n] for a, n in enumerate(self.names)
        ]
        self.standby = [
            [self.by_name[s].index for s in placed.standby.get(n, ())] if self.system.standby else []
            for n in self.names
        ]
        held = collections.Counter(s for a, routes in enumerate(self.routes) if a not in self.uncopied for s in routes)
        self.placed_per_server = max(self.placed_per_server, max(held.values(), default=0))
        self.last_tick = now
        self.rebalances += 0 if warm else 1
        if warm:
            for a, routes in enumerate(self.routes):
                for s in routes if a not in self.uncopied else ():
                    self.by_name[s].hold(a)
                    self.holders[a].add(self.by_name[s].index)
        else:
            for a in range(len(self.adapters)):
                self._drop_unplaced(a)
                for i in self.standby[a]:
                    if i not in self.holders[a] and self.servers[i].alive:
                        self._fetch(self.servers[i], a, now)

    def _history(self) -> dict[str, float]:
        """Tokens/s of each adapter in the first seconds of the workload: what a cluster that has been
        running would know when the run begins. Policies that look at demand get it; no later traffic is
        looked at."""
        tokens: dict[str, float] = {}
        for r in self.requests:
            if r.arrival > WARM_S:
                break
            if r.adapter >= 0:
                name = self.names[r.adapter]
                tokens[name] = tokens.get(name, 0.0) + (r.prompt + self.mean_output) / WARM_S
        return tokens

    def _check_burst(self, now: float) -> None:
        if now - self.last_tick > 0.3 * self.system.period_s and self.demand.bursts(now, self.expected):
            self._place(now)

    # -- failures and samples
    # ----------------------------------------------------------------------------------

    def _fail(self, server: Server, now: float) -> None:
        lost = [*server.waiting, *server.prefilling, *(r for _, _, r in server.decoding)]
        server.alive = False
        server.version += 1
        for a in list(server.host):
            server.drop(a)
            self.holders[a].discard(server.index)
        server.reset()
        self._place(now)
        for r in lost:
            r.prefilled = 0
            r.retries += 1
            if r.first_token >= 0.0:
                # Streamed already: the client sees an error and sends it again; its TTFT stands.
                pass
            self._dispatch(r, now)

    def _recover(self, server: Server, now: float) -> None:
        server.alive = True
        server.pcie_free = server.nic_in_free = server.nic_out_free = now
        self._place(now)
        parked, self.parked = self.parked, []
        for r in parked:
            self._dispatch(r, now)

    def _sample(self, now: float) -> None:
        loads = [(s.kv.used + s.queued_kv) / s.machine.kv_tokens for s in self.servers]
        self.load_samples.append((now, loads))


def simulate(
    workload: Workload,
    machines: Sequence[Machine],
    system: System,
    kernels: Kernels = Kernels.RANK_AWARE,
    *,
    op: OperatingPoints | None = None,
    seed: int = 0,
    failures: Sequence[Failure] = (),
    abort: Abort | None = None,
    sample_s: float = 0.0,
    window_s: float = 5.0,
    on_progress: Callable[[float], None] | None = None,
    placement: Placement | None = None,
) -> Result:
    """Runs `workload` on `machines` (one instance each) under `system`; see `Result`.

    `op`: operating points that placement and routing believe in (None: what the first machine would be
    profiled at); give the machines' `step_cost` and `op` from a measured file to replay a real cluster.
    `placement`: where adapters are at the start (servers `s0000`, `s0001`...; None: the system's choice).
    `sample_s`: interval of load samples (0: none); `window_s`: demand window. Adapters beyond the host tiers' memory
    are read from their checkpoints when asked for; one that is larger than every arena raises ValueError.
    """
    if len(workload.arrival):
        longest = int((workload.prompt + workload.output).max())
        kv = min(m.kv_tokens - m.kv_tokens % max(m.kv_block, 1) for m in machines)
        if longest > kv:
            raise ValueError(
                f"simulation: a request of {longest} tokens does not fit the KV cache of {kv} tokens; "
                "give the machine more `kv_tokens` or cut the trace"
            )
    return Simulation(
        workload, machines, system, kernels, op, seed, failures, abort, sample_s, window_s, on_progress, placement
    ).run()
