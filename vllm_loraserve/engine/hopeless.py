"""Requests that can't be served: whose adapter can't be had, or who waited too long over their limit; and their end.

Such a request is named before a step and ended after it, since vLLM's `schedule()` goes over the waiting queue in
between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_loraserve.engine.admission import AdmissionQueue
from vllm_loraserve.engine.fairness import Limits, reach
from vllm_loraserve.engine.readiness import Readiness
from vllm_loraserve.engine.request_errors import stop_reason
from vllm_loraserve.engine.trace import StepCounters

logger = init_logger("vllm.loraserve.scheduler")

LIMITS_EVERY_S = 0.25


class Hopeless:
    """Over the scheduler's own queue, readiness, limits and counters."""

    def __init__(
        self,
        readiness: Readiness,
        waiting: AdmissionQueue,
        limits: Limits,
        counters: StepCounters,
        *,
        limit_wait_s: float,
    ) -> None:
        self.readiness, self.waiting, self.limits, self.counters = readiness, waiting, limits, counters
        self.limit_wait_s = limit_wait_s
        self._reasons: dict[str, tuple[HTTPStatus, str]] = {}
        """Request id -> what its client will be told."""
        self._limits_looked_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._reasons)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._reasons

    def survey(self, holders: Sequence[Request], now: float) -> None:
        """Names them. `holders`: waiting requests of adapters that hold KV blocks, beside those of the queue."""
        self._name_failed_loads(holders)
        if self.limits.most and now - self._limits_looked_at >= LIMITS_EVERY_S:
            self._limits_looked_at = now
            self._name_over_limit(now)

    def _name_failed_loads(self, holders: Sequence[Request]) -> None:
        for adapter, path, status, reason in self.readiness.failed():
            lane = self.waiting.lanes.get((adapter, path))
            if lane is not None:
                self._name(self.waiting.live_in(lane), HTTPStatus(status), reason)
            held = [r for r in holders if (r.lora_request.lora_int_id, r.lora_request.lora_path) == (adapter, path)]
            self._name(held, HTTPStatus(status), reason)
            self.readiness.forget_failure(adapter)

    def _name_over_limit(self, now: float) -> None:
        for lane in self.waiting.lanes.values():
            if self.limits.allows(lane.name, reach(self.waiting.head(lane)[1])):
                lane.over_since = None
            if lane.over_since is None:
                continue
            # Who has run is served to the end.
            late = [
                request
                for request in self.waiting.live_in(lane)
                if now - max(self.waiting.queued_at(request), lane.over_since) > self.limit_wait_s
                and not request.num_preemptions
                and not request.num_output_tokens
            ]
            reason = f"Too many tokens of LoRA adapter '{lane.name}' are in flight; try again later"
            self._name(late, HTTPStatus.TOO_MANY_REQUESTS, reason)

    def _name(self, requests: Iterable[Request], status: HTTPStatus, reason: str) -> None:
        for request in requests:
            self._reasons.setdefault(request.request_id, (status, reason))

    def end(
        self,
        finish_requests: Callable[[Iterable[str], RequestStatus], Iterable[Request]],
        outputs: dict[int, EngineCoreOutputs],
    ) -> None:
        """Ends the requests that were named by the scheduler's `finish_requests`; adds each one's last output, with the
        reason, to `outputs` (by client)."""
        reasons, self._reasons = self._reasons, {}
        for request in finish_requests(reasons, RequestStatus.FINISHED_ERROR):
            status, reason = reasons[request.request_id]
            if status == HTTPStatus.TOO_MANY_REQUESTS:
                self.counters.limited_requests += 1
            else:
                self.counters.failed_requests += 1
            logger.warning("Request %s ends with %d: %s", request.request_id, status, reason)
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                _last_output(request, status, reason)
            )


def _last_output(request: Any, status: HTTPStatus, reason: str) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=stop_reason(status, reason),
        # vLLM's front end takes an output without one for that of a generating request.
        pooling_output=torch.empty(0) if request.pooling_params is not None else None,
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )
