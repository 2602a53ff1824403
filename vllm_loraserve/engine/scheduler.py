"""vLLM's scheduler with adapters in mind: who waits for which adapter, what fits together, what LoRA may cost a step.

`schedule()` stays vLLM's. Around it: the waiting queue shows only requests whose adapter is ready and finds room
(admission.py), loads are started aside in the order of the queue (readiness.py, channel.py), prefill of adapters is cut
to a work budget (rank_budget.py) and takes turns by rank (turns.py), room is made for who has waited long (ageing.py),
shares and limits hold (fairness.py), and who can't be served is told so (hopeless.py). With no request of an adapter
every decision is vLLM's own.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine import channel, engine_waits
from vllm_loraserve.engine.admission import AdmissionQueue, Lane
from vllm_loraserve.engine.ageing import Ageing
from vllm_loraserve.engine.engine_config import config_of
from vllm_loraserve.engine.fairness import Limits, Shares, reach
from vllm_loraserve.engine.hopeless import Hopeless
from vllm_loraserve.engine.metrics import Publisher, Totals, summed
from vllm_loraserve.engine.rank_budget import MIN_CHUNK, ArenaRoom, WorkBudget, rank_cost
from vllm_loraserve.engine.readiness import Readiness
from vllm_loraserve.engine.trace import StepCounters, StepTrace, work_of
from vllm_loraserve.engine.turns import Turns

logger = init_logger("vllm.loraserve.scheduler")

WORKERS_TIMEOUT_S = 10.0
WAITS_EVERY_S = 0.25
LOADS_EVERY_S = 0.05
"""How often loads are looked at when nothing has changed: back-offs and timeouts run out."""
LOADS_POLL_S = 0.005
"""Longest pause between two steps while there is nothing to do but wait for loads, where it can't be seen what else has
come: a new request waits so long then."""

_Base: Any = Scheduler if TYPE_CHECKING else object


class RankAwareMixin(_Base):
    """Goes before one of vLLM's scheduler classes."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        config = config_of(vllm_config) or LoRAServeConfig()
        lora_config = vllm_config.lora_config
        self.loraserve = config
        engine_waits.install(config)
        self._end: channel.SchedulerEnd | None = None
        self.room = ArenaRoom(slots=lora_config.max_loras if lora_config is not None else 1)
        prefetch, workers = config.prefetch, 0
        address = channel.address_of(vllm_config)
        if lora_config is not None and address is not None:
            prefetch, workers = self._meet_workers(address, vllm_config.parallel_config.world_size, prefetch)
        self.readiness = Readiness(
            workers,
            prefetch=prefetch,
            concurrent_loads=config.concurrent_loads,
            load_timeout_s=config.load_timeout_s,
            load_retries=config.load_retries,
        )
        self.readiness.rank_limit = self.room.largest_rank
        self.readiness.host_rows, self.readiness.rows_of = self._host_rows, self.room.rows_of
        share = config.lora_share if self.scheduler_config.enable_chunked_prefill else None
        self.work = WorkBudget(rank_cost(config.lora_cost_per_rank, config.operating_points), share)
        self.shares, self.limits = Shares(config.shares), Limits(config.max_inflight_tokens)
        self._charged: dict[Request, int] = {}
        """Request -> tokens that its share was charged with, until it ends."""
        self._charged_now: set[Request] = set()
        """Those that were charged in this step."""
        self.counters = StepCounters()
        engine = vllm_config.parallel_config.data_parallel_index
        self.trace = StepTrace(config.trace_schedule, pid=os.getpid(), engine=engine) if config.trace_schedule else None
        self._after_idle = True
        """There were no requests since the last step that was traced."""
        stats = channel.address_of(vllm_config, "stats") if self.log_stats else None
        self._publisher = Publisher(stats) if stats is not None and self._end is not None else None
        self._busy = False
        """There were requests since totals were published with none left."""
        self._figures: dict[int, list[channel.Family]] = {}
        """What each worker last said of itself."""
        self.waiting: AdmissionQueue = AdmissionQueue(self.policy, self)
        self.turns = Turns(self.readiness, self.room, self.waiting)
        self.ageing = Ageing(
            self.readiness,
            self.room,
            self.waiting,
            self.counters,
            max_skip_s=config.max_skip_s,
            skip_window=config.skip_window,
        )
        self.hopeless = Hopeless(
            self.readiness, self.waiting, self.limits, self.counters, limit_wait_s=config.limit_wait_s
        )
        self._overtook: set[Request] = set()
        """Requests that were admitted in this step past the oldest one that finds no room."""
        self._loads_looked_at = self._waits_looked_at = 0.0
        self._now = 0.0
        """When this step began."""
        self._decoding = False
        """Somebody decodes in this step."""
        self._holders: list[Request] = []
        """Requests of adapters that wait and hold KV blocks: vLLM keeps them beside the waiting queue."""
        self._unheld: list[int] = []
        """Adapters that are ready and waited for, and that the workers are not told to hold."""
        self._only_loads = False
        """The last step had nothing to run, since all that waits waits for its adapter."""
        self._doorbell: engine_waits.Doorbell | None = None
        """Rings when a request comes; None: nobody has offered the queue that it comes by."""
        self._waited = False
        """The engine core has let us wait before the coming step."""

    _host_rows: int | None = None
    """Rank rows that the workers' host tiers hold; None: not known."""

    def _meet_workers(self, address: str, count: int, prefetch: int) -> tuple[int, int]:
        """(prefetch, workers): what the workers' managers can do; 0 workers: loads stay in the step."""
        self._end = channel.SchedulerEnd(address)
        hellos = self._end.wait_for_workers(count, WORKERS_TIMEOUT_S)
        if len(hellos) < count:
            logger.warning(
                "%d of %d workers answered within %g s: adapters will be loaded inside the step.",
                len(hellos),
                count,
                WORKERS_TIMEOUT_S,
            )
            return prefetch, 0
        rows = [hello.rank_rows for hello in hellos if hello.rank_rows is not None]
        self.room.rank_rows = min(rows) if rows else None
        self.room.page_rows = max(hello.page_rows for hello in hellos)
        held = [hello.prepared for hello in hellos if hello.prepared is not None]
        self._host_rows = min((hello.host_rows for hello in hellos if hello.host_rows is not None), default=None)
        return max(min([prefetch, *held]), 1), count

    # ---- the step ----

    def wait_for_loads(self, requests: queue.Queue[Any]) -> None:
        """Called before a step by an engine core that gets its requests by this queue and has no batch in flight: where
        the last step found nothing to do but wait for loads, returns when a worker has reported, a request has come, or
        loads are due to be looked at."""
        if self._end is None:
            return
        if self._doorbell is None:
            self._doorbell = engine_waits.Doorbell(requests)
        self._doorbell.answer()
        self._waited = True
        if self._only_loads and requests.empty():
            # Nobody reports a grammar that is ready, or KV blocks that have come.
            self._end.wait(LOADS_POLL_S if self.deferred_waiting else LOADS_EVERY_S, self._doorbell.fd)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step's work, as vLLM decides it over the requests that can run."""
        begin = time.monotonic()
        self.waiting.begin_step()
        if self._end is not None:
            if self._only_loads and not self._waited:
                # Else the engine would run empty steps as fast as it can, on cores that the loads need.
                self._end.wait(LOADS_POLL_S)
                begin = time.monotonic()
            self._waited = False
            for report in self._end.reports():
                if isinstance(report, channel.Figures):
                    self._figures[report.rank] = report.families
                    continue
                self.readiness.on_report(report, begin)
                self.waiting.lanes_changed = True
        self._now = begin
        self._survey(begin)
        output = super().schedule(throttle_prefills)
        if self._end is not None:
            self._hold_and_release(self._end)
        self._account(output, begin)
        return output

    def _survey(self, now: float) -> None:
        """What runs, what waits, what should be loaded, who has waited long enough."""
        lanes = self.waiting.lanes
        self.ageing.begin_step()
        self._overtook.clear()
        self._charged_now.clear()
        self._unheld.clear()
        decode_rows, self._decoding = self._count_running()
        self.work.begin(self.max_num_scheduled_tokens, decode_rows, self.room.used_rows, self._decoding)
        self._holders = [request for request in self.kv_holding_waiting if request.lora_request is not None]
        if not lanes and not self._holders:
            return
        self._start_loads(now)
        self.hopeless.survey(self._holders, now)
        ready = list(self.turns.ready_lanes())
        self._unheld += (lane.adapter for lane in ready if not self.readiness.is_held(lane.adapter))
        self.ageing.survey(ready, self._holders, now)

    def _count_running(self) -> tuple[int, bool]:
        """Room and limits as the running requests take them; (rank rows of those that decode, whether any does)."""
        users: dict[int, int] = {}
        decodes: dict[int, int] = {}
        others_decode = False
        for request in self.running:
            lora = request.lora_request
            decode = not request.is_prefill_chunk
            others_decode |= decode
            if lora is not None:
                adapter = lora.lora_int_id
                users[adapter] = users.get(adapter, 0) + 1
                if decode:
                    decodes[adapter] = decodes.get(adapter, 0) + 1
        rank_of = self.readiness.rank_of
        pinned = {adapter: rank_of(adapter) for adapter in self.readiness.pinned}
        self.room.assign({adapter: (count, rank_of(adapter)) for adapter, count in users.items()}, pinned)
        if self.limits.most:
            self.limits.clear()
            for request in (*self.running, *self.kv_holding_waiting):
                if (lora := request.lora_request) is not None:
                    self.limits.take(lora.lora_name, reach(request))
        return sum(rank_of(adapter) * count for adapter, count in decodes.items()), others_decode

    def _start_loads(self, now: float) -> None:
        waited = now - self._loads_looked_at >= LOADS_EVERY_S
        if waited:
            self.readiness.expire(now)
        if not self.readiness.can_start or not (self.waiting.lanes_changed or waited):
            return
        self.waiting.lanes_changed, self._loads_looked_at = False, now
        running = set(self.room.users)
        # Enough to find `prefetch` adapters that don't run among the first.
        lanes = self.waiting.first_lanes(self.readiness.prefetch + len(running) + self.readiness.retrying)
        heads = [*self._holders, *(self.waiting.head(lane)[1] for lane in lanes)]
        requests: dict[int, Any] = {}
        for head in heads:
            requests.setdefault(head.lora_request.lora_int_id, head.lora_request)
        wanted = [(adapter, request.lora_path) for adapter, request in requests.items()]
        for adapter, attempt in self.readiness.next_loads(wanted, running, now):
            if self._end is not None:
                self._end.send(channel.Prepare(adapter, attempt, msgspec.msgpack.encode(requests[adapter])))

    def _hold_and_release(self, end: channel.SchedulerEnd) -> None:
        """What is ready stays in host memory until it is activated, or nobody waits for it any more."""
        users, lanes = self.room.users, self.waiting.lanes
        self.readiness.activated(users)
        holders = {r.lora_request.lora_int_id for r in self._holders}
        for adapter in (*self._unheld, *holders):
            if adapter not in users and self.readiness.hold(adapter):
                end.send(channel.Hold(adapter))

        def needed(adapter: int, path: str) -> bool:
            return adapter in users or (adapter, path) in lanes or adapter in holders

        for adapter in self.readiness.releases(needed):
            end.send(channel.Release(adapter))

    # ---- the gate of the waiting queue ----

    def open_lanes(self) -> Iterable[Lane]:
        """An adapter's requests are shown when it is ready, not held back for an aged one, and can join alone."""
        lanes = self.turns.ready_lanes()
        if self.ageing.making_room:
            drain_for, draining, users = self.ageing.drain_for, self.ageing.draining, self.room.users
            return (
                lane for lane in lanes if lane is drain_for or (lane.adapter in users and lane.adapter not in draining)
            )
        return self.turns.few_join(list(lanes)) if self._decoding else lanes

    def admits(self, lane: Lane, request: Request) -> bool:
        """Room in the arena, under its limit, and work left for at least a small chunk."""
        rank = self.readiness.rank_of(lane.adapter)
        if request in self.hopeless or not self.room.fits(lane.adapter, rank):
            return False
        if not self.limits.allows(lane.name, reach(request)):
            if lane.over_since is None:
                lane.over_since = self._now
            return False
        lane.over_since = None
        if self.work.allow(min(request.num_tokens, MIN_CHUNK), rank) == 0:
            self.counters.held_prefills += 1
            return False
        return True

    def share_time(self, lane: Lane) -> float:
        """Virtual time of the lane's label."""
        return self.shares.time(lane.name)

    def taken(self, request: Request) -> None:
        """Counts as running until it is returned."""
        self.counters.admitted += 1
        oldest_blocked = self.ageing.oldest_blocked
        if oldest_blocked is not None and self.waiting.taken_key(request) > oldest_blocked:
            self.counters.overtakes += 1
            self._overtook.add(request)
        lora = request.lora_request
        name = lora.lora_name if lora is not None else ""
        if self.shares.weights and request not in self._charged:
            # Once, however often it is preempted.
            self._charged[request] = reach(request)
            self._charged_now.add(request)
            self.shares.admit(name, reach(request))
        if lora is not None:
            self.room.take(lora.lora_int_id, self.readiness.rank_of(lora.lora_int_id))
            self.limits.take(name, reach(request))

    def returned(self, request: Request) -> None:
        """Takes back what `taken` counted."""
        self.counters.admitted -= 1
        if request in self._overtook:
            self._overtook.discard(request)
            self.counters.overtakes -= 1
        lora = request.lora_request
        name = lora.lora_name if lora is not None else ""
        if request in self._charged_now:
            self._charged_now.discard(request)
            self.shares.refund(name, self._charged.pop(request))
        if lora is not None:
            self.room.release(lora.lora_int_id)
            self.limits.release(name, reach(request))

    # ---- places where vLLM's schedule() asks ----

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Also for requests that hold KV blocks, which vLLM admits before the waiting queue."""
        if not super()._handle_blocked_waiting_request(request):
            return False
        lora = request.lora_request
        if lora is None or request in self.waiting:
            return True
        self._count_running()
        rank = self._rank(request)
        if not self.readiness.is_ready(lora.lora_int_id, lora.lora_path) or not self.room.fits(lora.lora_int_id, rank):
            return False
        # It comes past `taken`; who is admitted after it in this step must find its room gone.
        self.room.take(lora.lora_int_id, rank)
        return True

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM's last word on the length of a chunk: here the work budget cuts prefill of adapters."""
        if num_new_tokens <= 1 + self.num_spec_tokens or (lora := request.lora_request) is None:
            # A decode, or the base model; without lookahead vLLM has nothing to say either.
            if not self.num_prefill_lookahead:
                return num_new_tokens
            return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        rank = self.readiness.rank_of(lora.lora_int_id)
        allowed = num_new_tokens
        if self._may_cut(request):
            allowed = self.work.allow(num_new_tokens, rank)
            if self.work.bounded:
                others_may_begin = not self.ageing.draining and len(self.running) < self.max_num_running_reqs
                allowed = self.turns.in_halves(request, rank, num_computed_tokens, allowed, others_may_begin)
        if allowed < num_new_tokens:
            self.counters.cut_chunks += 1
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, allowed) if allowed else 0
        self.work.spend(tokens, rank)
        return tokens

    def _may_cut(self, request: Request) -> bool:
        """Encoder inputs and state-aligned chunks have lengths of their own."""
        return not request.has_encoder_inputs and not self.need_mamba_block_aligned_split

    def _rank(self, request: Request) -> int:
        return self.readiness.rank_of(request.lora_request.lora_int_id) if request.lora_request is not None else 0

    # ---- after the step ----

    def _account(self, output: SchedulerOutput, begin: float) -> None:
        counters = self.counters
        self._only_loads = not output.total_num_scheduled_tokens and not self.running and bool(self.waiting.lanes)
        counters.steps += 1
        lanes = self.waiting.lanes
        if not lanes:
            counters.oldest_wait_s = 0.0
        elif begin - self._waits_looked_at > WAITS_EVERY_S:
            self._waits_looked_at = begin
            oldest = min(self.waiting.queued_at(self.waiting.head(lane)[1]) for lane in lanes.values())
            counters.oldest_wait_s = begin - oldest
        total = output.total_num_scheduled_tokens
        if total and self.room.users:
            counters.observe(self.room.used_rows, self.work.spent / total)
        self._publish(begin)
        if self.trace is not None and total:
            self.trace.write(
                t=round(time.time(), 4),
                step=self.current_step,
                running=len(self.running),
                waiting=len(self.waiting),
                after_idle=self._after_idle,
                tokens=total,
                **work_of(output.num_scheduled_tokens, self.requests, self._rank),
                adapters=len(self.room.users),
                rank_rows=self.room.used_rows,
                lora_cost=round(self.work.spent, 2),
                loading=self.readiness.loading,
                waiting_adapters=len(self.waiting.lanes),
                draining=sorted(self.ageing.draining),
                oldest_wait_s=round(counters.oldest_wait_s, 4),
                schedule_us=round((time.monotonic() - begin) * 1e6),
            )
            self._after_idle = False

    def _publish(self, now: float) -> None:
        """Once a second, and once more when no request is left: no step follows then that could say so."""
        ended = self._busy and not self.requests
        self._busy = bool(self.requests)
        if self._publisher is None or not (ended or self._publisher.due(now)):
            return
        readiness, figures = self.readiness, summed(self._figures.values())
        loading = readiness.loading if self._busy else 0
        totals = Totals(
            self.counters, readiness.counters, loading, len(self.waiting.lanes), self.room.used_rows, figures
        )
        self._publisher.publish(totals, now)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """As vLLM; what the request did not generate is given back to its share."""
        self.turns.forget(request)
        if (charged := self._charged.pop(request, None)) is not None:
            lora = request.lora_request
            self.shares.refund(lora.lora_name if lora is not None else "", max(charged - request.num_tokens, 0))
        return super()._free_request(request, *args, **kwargs)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """As vLLM; then ends the requests that can't be served, each with its reason."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.hopeless:
            self.hopeless.end(self.finish_requests, outputs)
        self._after_idle |= not self.requests
        return outputs

    def shutdown(self) -> None:
        """Closes the trace and the channel besides what vLLM closes."""
        if self.trace is not None:
            self.trace.close()
        if self._publisher is not None:
            self._publisher.close()
        if self._end is not None:
            self._end.close()
        super().shutdown()


class RankAwareScheduler(RankAwareMixin, Scheduler):
    """For engines without async scheduling (CPU)."""


class RankAwareAsyncScheduler(RankAwareMixin, AsyncScheduler):
    """For engines with async scheduling."""
