"""One simulated instance: continuous batching with chunked prefill, a KV limit, an arena of rank rows, a
host tier.

Time advances in engine steps. A step carries one token of every decoding request and fills the rest of the
token budget with prompt chunks, oldest first. When there is nothing to prefill, whole runs of identical
decode steps are taken as one **leap** (its length is exact: it ends at the next finish, or at the step
boundary after whatever interrupts it).

KV (`kv_cache.py`): a request holds its prompt and output tokens from admission on, or takes blocks as it
grows; when there is none left, the one that was admitted last gives way and is computed again. Adapters:
resident in the arena (least recently used out first, never one in use), else brought from the host tier,
else fetched from a peer or the checkpoint; a request whose adapter is on its way waits without blocking
those behind it, except with padded kernels, where the load happens inside the step and everybody waits.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import islice

from vllm_loraserve.cluster.placement import AdapterSpec
from vllm_loraserve.simulator.kv_cache import KVCache
from vllm_loraserve.simulator.machine import Kernels, Machine
from vllm_loraserve.simulator.request import Request

SCAN = 32
"""How deep into the queue a step looks for requests whose adapter is ready, and prefetches for the others."""
SKIP_WINDOW = 64
"""Requests admitted since an adapter was first seen to find no room in the arena, before room is made for it."""
MAX_SKIP_S = 2.0
"""The same in seconds, whichever comes first. Both are the defaults of the engine's scheduler."""


class Server:
    """An instance. The event loop calls `enqueue`, `start`, `finish_step`, `interrupt`, `loaded`.

    `fetch(server, adapter, now) -> completion time` brings an adapter that the host tier lacks;
    `post_load(server, adapter, time)` asks the loop to call `loaded` then.
    """

    def __init__(
        self,
        index: int,
        machine: Machine,
        kernels: Kernels,
        adapters: list[AdapterSpec],
        fetch: Callable[[Server, int, float], float],
        post_load: Callable[[Server, int, float], None],
    ) -> None:
        self.index = index
        self.machine = machine
        self.kernels = kernels
        self.adapters = adapters
        self.fetch = fetch
        self.post_load = post_load
        padded = -(-machine.max_rank // machine.page_rows) * machine.page_rows
        self.rows_of = [padded if kernels is Kernels.PADDED else a.rank_rows for a in adapters]
        self.alive = True
        self.version = 0
        self.host: OrderedDict[int, None] = OrderedDict()
        self.host_used = 0
        self.peak_host = 0
        self.busy_s = 0.0
        self.loads = 0
        self.pcie_free = 0.0
        self.nic_in_free = 0.0
        self.nic_out_free = 0.0
        self.reset()

    def reset(self) -> None:
        """Forgets all work and residency, as a restarted instance would."""
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.decoding: list[tuple[int, int, Request]] = []
        self.batch: dict[int, Request] = {}
        """Running requests by index, in the order of their admission."""
        self.plan: list[tuple[Request, int]] = []
        self.arena: OrderedDict[int, None] = OrderedDict()
        self.arena_used = 0
        self.loading: dict[int, float] = {}
        self.refs: dict[int, int] = {}
        self.demanded: dict[int, int] = {}  # adapter -> requests here, waiting or running
        self.rows_demanded = 0
        self.admitted = 0
        self.blocked: dict[int, tuple[float, int]] = {}  # adapter without room -> (since, `admitted` then)
        self.rank_refs: dict[int, int] = {}
        self.decode_ranks: dict[int, int] = {}  # rank -> requests that decode
        self.rows_in_use = 0
        self.max_rank = 0
        self.steps = 0
        self.running = 0
        self.decode_rank_sum = 0
        self.context = 0
        self.kv = KVCache(self.machine.kv_tokens, self.machine.kv_block)
        self.queued_tokens = 0
        self.queued_token_ranks = 0
        self.queued_kv = 0
        self.leap = 0
        self.leap_start = 0.0
        self.leap_dt = 0.0
        self.step_end = -1.0  # < 0: idle
        self.last_dt = 0.0
        self.known_until = math.inf
        self.neighbours = 0
        """Busy instances on the same host; set by the event loop before `start`."""

    # -- the work of a step
    # ------------------------------------------------------------------------------------

    def enqueue(self, r: Request, front: bool = False) -> None:
        """A request arrives in the queue; at its front: one that was preempted."""
        r.server = self.index
        r.kv, r.grow_at = 0, -1
        if front:
            self.waiting.appendleft(r)
        else:
            self.waiting.append(r)
        self.queued_tokens += r.prompt
        self.queued_token_ranks += r.prompt * r.rank
        self.queued_kv += r.prompt + r.output
        a = r.adapter
        if a >= 0:
            if a not in self.demanded:
                self.rows_demanded += self.rows_of[a]
            self.demanded[a] = self.demanded.get(a, 0) + 1

    def start(self, now: float) -> bool:
        """Starts a step or a leap; sets `step_end` (idle: -1.0) and returns whether there is one."""
        m = self.machine
        preempted = False
        while not self.kv.grow(self.steps):
            self._preempt(next(reversed(self.batch.values())))
            preempted = True
        n_decode = len(self.decoding)
        # What was fixed while the step before ran knows only requests that had come before that one began.
        seen = m.schedules_ahead and self.step_end == now and (n_decode or self.prefilling)
        self.known_until = now - self.leap_dt if seen else math.inf
        budget = m.max_batched_tokens - n_decode
        plan: list[tuple[Request, int]] = []
        tokens = token_ranks = 0
        for r in self.prefilling:
            if budget <= 0:
                break
            chunk = min(r.prompt - r.prefilled, budget)
            plan.append((r, chunk))
            budget -= chunk
            tokens += chunk
            token_ranks += chunk * r.rank
        stall = 0.0
        if self.waiting and budget > 0 and self.running < m.max_seqs and not preempted:
            admitted, stall = self._admit(now, budget)
            for r in admitted:
                chunk = min(r.prompt, budget)
                plan.append((r, chunk))
                budget -= chunk
                tokens += chunk
                token_ranks += chunk * r.rank
        self.plan = plan
        if not plan and not n_decode:
            self.step_end = -1.0
            return False
        c = m.step_cost
        if self.kernels is Kernels.RANK_AWARE:
            decode_rank_sum, rows = self.decode_rank_sum, self.rows_in_use
        elif self.kernels is Kernels.S_LORA:
            token_ranks = tokens * max((r.rank for r, _ in plan), default=0)
            decode_rank_sum, rows = n_decode * max(self.decode_ranks, default=0), self.rows_in_use
        else:
            paid = m.max_rank if self.kernels is Kernels.PADDED else self.max_rank
            token_ranks = tokens * paid
            decode_rank_sum = n_decode * paid
            rows = self.rows_in_use
        dt = (
            c.base
            + c.prefill_token * tokens
            + c.prefill_token_rank * token_ranks
            + c.decode_token * n_decode
            + c.decode_token_rank * decode_rank_sum
            + c.rank_row * rows
            + c.adapter * len(self.refs)
            + c.context_token * self.context
        ) / m.speed
        if self.neighbours and m.beside is not None:
            beside = m.beside.seconds(
                prefill_tokens=tokens,
                prefill_token_ranks=token_ranks,
                decode_tokens=n_decode,
                decode_token_ranks=decode_rank_sum,
                rank_rows=rows,
                adapters=len(self.refs),
                context_tokens=self.context,
            )
            dt += self.neighbours * (beside / m.speed - dt)
        self.last_dt = dt
        if plan:
            self.leap = 1
            dt += stall
        else:
            # A neighbour may come and go within a leap, which would change its pace.
            held = m.beside is not None or (m.schedules_ahead and self.waiting)
            self.leap = k = 1 if held else int(min(self.decoding[0][0] - self.steps, self.kv.steps_left(self.steps)))
            # The context grows by one token per request and step: charge the mean.
            dt += c.context_token * n_decode * (k - 1) * 0.5 / m.speed
        self.leap_start = now
        self.leap_dt = dt
        self.step_end = now + dt * self.leap
        return True

    def interrupt(self, now: float) -> bool:
        """Something arrived during a leap: end it at the next step boundary. True if `step_end` changed."""
        if self.leap <= 1 or self.step_end < 0.0:
            return False
        done = int((now - self.leap_start) / self.leap_dt) + 1
        if done >= self.leap:
            return False
        self.leap = done
        self.step_end = self.leap_start + self.leap_dt * done
        return True

    def finish_step(self, now: float) -> list[Request]:
        """The step or leap ends: tokens appear, prompts become decodes, finished requests leave
        (returned)."""
        self.busy_s += now - self.leap_start
        self.steps += self.leap
        self.context += len(self.decoding) * self.leap
        finished: list[Request] = []
        decoding = self.decoding
        while decoding and decoding[0][0] <= self.steps:
            r = heapq.heappop(decoding)[2]
            r.finish = now
            self._stop_decoding(r, r.prompt + r.output)
            self._leave(r)
            finished.append(r)
        for r, chunk in self.plan:
            r.prefilled += chunk
            self.queued_tokens -= chunk
            self.queued_token_ranks -= chunk * r.rank
            if r.prefilled >= r.prompt:
                self.prefilling.remove(r)
                if r.first_token < 0.0:
                    r.first_token = now
                if r.output <= 1:
                    r.finish = now
                    self._leave(r)
                    finished.append(r)
                else:
                    heapq.heappush(decoding, (self.steps + r.output - 1, r.index, r))
                    self.kv.decodes(r, self.steps)
                    self.decode_rank_sum += r.rank
                    self.decode_ranks[r.rank] = self.decode_ranks.get(r.rank, 0) + 1
                    self.context += r.prompt + 1
        self.plan = []
        return finished

    def _stop_decoding(self, r: Request, context: int) -> None:
        self.decode_rank_sum -= r.rank
        self.decode_ranks[r.rank] -= 1
        if not self.decode_ranks[r.rank]:
            del self.decode_ranks[r.rank]
        self.context -= context

    def _preempt(self, r: Request) -> None:
        """`r` gives its KV blocks back and waits at the front; what it has generated is computed again."""
        if r.prefilled < r.prompt:
            self.prefilling.remove(r)
            left = r.prompt - r.prefilled
            self.queued_tokens -= left
            self.queued_token_ranks -= left * r.rank
        else:
            last = next(step for step, _, other in self.decoding if other is r)
            self.decoding = [entry for entry in self.decoding if entry[2] is not r]
            heapq.heapify(self.decoding)
            generated = r.output - (last - self.steps)
            r.prompt, r.output, r.generated = r.prompt + generated, r.output - generated, r.generated + generated
            self._stop_decoding(r, r.prompt)
        self._leave(r)
        r.prefilled = 0
        self.enqueue(r, front=True)

    def _leave(self, r: Request) -> None:
        self.running -= 1
        del self.batch[r.index]
        self.kv.leave(r)
        a = r.adapter
        if a < 0:
            return
        self.demanded[a] -= 1
        if not self.demanded[a]:
            del self.demanded[a]
            self.rows_demanded -= self.rows_of[a]
        left = self.refs[a] - 1
        if left:
            self.refs[a] = left
            return
        del self.refs[a]
        self.rows_in_use -= self.rows_of[a]
        rank = r.rank
        self.rank_refs[rank] -= 1
        if not self.rank_refs[rank]:
            del self.rank_refs[rank]
            if rank == self.max_rank:
                self.max_rank = max(self.rank_refs, default=0)

    def _enter(self, r: Request) -> None:
        self.running += 1
        self.admitted += 1
        self.batch[r.index] = r
        self.kv.enter(r)
        self.queued_kv -= r.prompt + r.output
        self.prefilling.append(r)
        a = r.adapter
        if a < 0:
            return
        self.arena.move_to_end(a)
        if a in self.refs:
            self.refs[a] += 1
            return
        self.refs[a] = 1
        self.rows_in_use += self.rows_of[a]
        self.rank_refs[r.rank] = self.rank_refs.get(r.rank, 0) + 1
        self.max_rank = max(self.max_rank, r.rank)

    def _admit(self, now: float, budget: int) -> tuple[list[Request], float]:
        """Requests that join this step (their first chunks fit `budget`), and the seconds it stalls on
        loads."""
        m = self.machine
        admitted: list[Request] = []
        waiting = self.waiting
        stall = 0.0
        skipped: list[Request] = []
        wanted: set[int] = set()
        drained: set[int] | None = None
        while waiting and budget > 0 and self.running < m.max_seqs and len(skipped) < SCAN:
            r = waiting[0]
            if not self.kv.fits(r) or r.arrival > self.known_until:
                break
            a = r.adapter
            if a >= 0 and drained is not None and (a not in self.refs or a in drained):
                skipped.append(waiting.popleft())
                continue
            if a >= 0 and a not in self.arena:
                if self.kernels is Kernels.PADDED and self._make_room(a, wanted):
                    stall += self._bring(a, now + stall) - (now + stall)
                    self._insert(a)
                else:
                    wanted.add(a)
                    if a not in self.loading:
                        if self._make_room(a, wanted):
                            self._start_load(a, now)
                        elif self._aged(a, now):
                            drained = self._to_drain(a)
                    skipped.append(waiting.popleft())
                    continue
            waiting.popleft()
            self._enter(r)
            admitted.append(r)
            budget -= r.prompt
        if skipped:
            # Prefetch in queue order for those that could not be looked at for lack of budget.
            waiting.extendleft(reversed(skipped))
        if waiting and self.kernels is not Kernels.PADDED and drained is None:
            for r in islice(waiting, len(skipped), SCAN):
                self.prefetch(r.adapter, now, wanted)
        return admitted, stall

    # -- adapters
    # ----------------------------------------------------------------------------------------------

    def prefetch(self, a: int, now: float, keep: set[int] | None = None) -> None:
        """Starts bringing `a` into the arena when it is absent and room can be made."""
        if a >= 0 and a not in self.arena and a not in self.loading:
            keep = keep if keep is not None else set()
            if self._make_room(a, keep):
                keep.add(a)
                self._start_load(a, now)

    def _aged(self, a: int, now: float) -> bool:
        """`a`, for which there is no room, was overtaken for long enough."""
        since, admitted = self.blocked.setdefault(a, (now, self.admitted))
        return now - since > MAX_SKIP_S or self.admitted - admitted > SKIP_WINDOW

    def _to_drain(self, a: int) -> set[int]:
        """The running adapters that get no new requests until `a` has its room: the fewest requests for the rows they
        give back, as in the engine's scheduler (`engine/rank_budget.py`)."""
        lacking = self.rows_in_use + self.rows_of[a] - self.machine.arena_rows
        drained: set[int] = set()
        for v in sorted(self.refs, key=lambda v: (self.refs[v] / self.rows_of[v], v)):
            if lacking <= 0:
                break
            drained.add(v)
            lacking -= self.rows_of[v]
        return drained

    def _start_load(self, a: int, now: float) -> None:
        self.blocked.pop(a, None)
        done = self._bring(a, now)
        self.loading[a] = done
        self.arena_used += self.rows_of[a]  # reserved from now on
        self.post_load(self, a, done)

    def _bring(self, a: int, now: float) -> float:
        """Time at which `a` is in the arena, from the host tier or through `fetch`; books the links."""
        self.loads += 1
        m = self.machine
        if a in self.host:
            self.host.move_to_end(a)
            begin = max(now, self.pcie_free)
            done = begin + m.load_latency_s + self.adapters[a].bytes * self._padding(a) / m.h2d_bytes_s
            self.pcie_free = done
            return done
        return self.fetch(self, a, now)

    def _padding(self, a: int) -> float:
        return self.rows_of[a] / max(self.adapters[a].rank_rows, 1)

    def loaded(self, a: int) -> None:
        """A load that `post_load` announced has arrived."""
        if a in self.loading:
            del self.loading[a]
            self.arena_used -= self.rows_of[a]
            self._insert(a)

    def _insert(self, a: int) -> None:
        self.arena[a] = None
        self.arena_used += self.rows_of[a]

    def _make_room(self, a: int, keep: set[int]) -> bool:
        """Evicts least recently used adapters that nobody in the batch uses until `a` fits; False: it
        can't."""
        m = self.machine
        need = self.rows_of[a]
        free = m.arena_rows - self.arena_used
        full = bool(m.slots) and len(self.arena) + len(self.loading) >= m.slots
        if free >= need and not full:
            return True
        victims = []
        for v in self.arena:
            if v not in self.refs and v not in keep:
                victims.append(v)
                free += self.rows_of[v]
                if free >= need:
                    break
        if free < need or (full and not victims):
            return False
        for v in victims:
            del self.arena[v]
            self.arena_used -= self.rows_of[v]
        return True

    def hold(self, a: int) -> None:
        """Puts a copy into the host tier."""
        if a not in self.host:
            self.host[a] = None
            self.host_used += self.adapters[a].bytes
            self.peak_host = max(self.peak_host, len(self.host))

    def drop(self, a: int) -> None:
        """Removes the copy from the host tier (and from the arena when idle)."""
        if a in self.host:
            del self.host[a]
            self.host_used -= self.adapters[a].bytes
        if a in self.arena and a not in self.refs:
            del self.arena[a]
            self.arena_used -= self.rows_of[a]
