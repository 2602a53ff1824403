"""Scheduler objects without a model: configuration, requests, steps with made-up sampled tokens, what must hold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from fake_workers import Clock, SettlingEnd
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_loraserve.engine import scheduler as scheduler_module
from vllm_loraserve.engine.scheduler import RankAwareAsyncScheduler, RankAwareScheduler

BLOCK = 16
STEP_S = 0.01
"""What a step takes on the scheduler's clock."""
MOST_STEPS = 100_000


@functools.cache
def _engine_config(model: str, max_loras: int, policy: str, drafts: int) -> Any:
    speculative = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 4} if drafts else None
    return EngineArgs(
        speculative_config=speculative,
        model=model,
        enable_lora=True,
        max_loras=max_loras,
        scheduling_policy=policy,
        max_model_len=2048,
        enforce_eager=True,
        block_size=BLOCK,
    ).create_engine_config()


def make_scheduler(
    cls: type,
    model: str,
    *,
    blocks: int = 1000,
    max_seqs: int = 16,
    max_tokens: int = 256,
    max_loras: int = 4,
    policy: str = "fcfs",
    caching: bool = True,
    chunked: bool = True,
    drafts: int = 0,
    options: dict[str, Any] | None = None,
    world_size: int = 1,
) -> Any:
    """A scheduler of class `cls`, as EngineCore makes it; `drafts`: speculative tokens for each request and step."""
    config = copy.deepcopy(_engine_config(model, max_loras, policy, drafts))
    config.scheduler_config.max_num_seqs = max_seqs
    config.scheduler_config.max_num_batched_tokens = max_tokens
    config.scheduler_config.max_num_scheduled_tokens = None
    config.scheduler_config.enable_chunked_prefill = chunked
    config.scheduler_config.async_scheduling = issubclass(cls, RankAwareAsyncScheduler) or "Async" in cls.__name__
    config.parallel_config.world_size = world_size
    config.cache_config.enable_prefix_caching = caching
    config.cache_config.num_gpu_blocks = blocks
    config.additional_config = (
        {"loraserve": options or {}} if issubclass(cls, RankAwareScheduler | RankAwareAsyncScheduler) else {}
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return cls(
        vllm_config=config,
        kv_cache_config=cache,
        block_size=BLOCK,
        log_stats=True,
        structured_output_manager=StructuredOutputManager(config),
    )


def make_request(
    name: str,
    prompt: int | list[int] = 20,
    max_tokens: int = 8,
    *,
    adapter: int = 0,
    priority: int = 0,
    arrival: float = 0.0,
    path: str = "",
    adapter_name: str = "",
    pooling: bool = False,
    grammar: Any = None,
) -> Request:
    """A request of `prompt` tokens (or these tokens) that generates exactly `max_tokens`; `grammar`: of its structured
    output, or the future of it."""
    init_none_hash(sha256)
    tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
    lora = None
    if adapter:
        lora = LoRARequest(adapter_name or f"a{adapter}", adapter, path or f"/adapters/{adapter}")
    form = StructuredOutputsParams(regex="x*") if grammar is not None else None
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, structured_outputs=form)
    request = Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=None if pooling else sampling,
        pooling_params=PoolingParams(task="embed") if pooling else None,
        lora_request=lora,
        priority=priority,
        arrival_time=arrival,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    if request.structured_output_request is not None:
        request.structured_output_request.grammar = grammar
    return request


def model_output(scheduler: Any, output: SchedulerOutput) -> ModelRunnerOutput:
    """One token for each request whose known tokens are all computed after this step; of its drafts every other
    request's are taken, but for the last."""
    ids = list(output.num_scheduled_tokens)
    if isinstance(scheduler._end if hasattr(scheduler, "_end") else None, SettlingEnd):
        loras = (scheduler.requests[i].lora_request for i in ids if i in scheduler.requests)
        scheduler._end.workers.activate({lora.lora_int_id for lora in loras if lora is not None})
    sampled = []
    for request_id in ids:
        request = scheduler.requests.get(request_id)
        drafts = output.scheduled_spec_decode_tokens.get(request_id, ())
        taken = [9] * (len(drafts) - 1) if len(request_id) % 2 else []
        sampled.append([*taken, 7] if request is not None and not request.is_prefill_chunk else [])
    return ModelRunnerOutput(req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=sampled)


def draft(scheduler: Any, output: SchedulerOutput, count: int) -> None:
    """`count` draft tokens for every request of the step, as the worker hands them to the scheduler after it."""
    ids = list(output.num_scheduled_tokens)
    scheduler.update_draft_token_ids(DraftTokenIds(ids, [[9] * count for _ in ids]))


def decisions(output: SchedulerOutput) -> dict[str, Any]:
    """Everything a step decided, comparable between two schedulers."""
    cached = output.scheduled_cached_reqs
    return {
        "tokens": dict(output.num_scheduled_tokens),
        "drafts": dict(output.scheduled_spec_decode_tokens),
        "new": [(r.req_id, r.block_ids, r.num_computed_tokens) for r in output.scheduled_new_reqs],
        "cached": (cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, sorted(cached.resumed_req_ids)),
        "finished": sorted(output.finished_req_ids),
        "preempted": sorted(output.preempted_req_ids or ()),
    }


def step(scheduler: Any) -> tuple[SchedulerOutput, list[Any]]:
    """One whole step; (what was scheduled, EngineCoreOutputs' outputs)."""
    output = scheduler.schedule()
    outs = scheduler.update_from_output(output, model_output(scheduler, output))
    return output, [o for core in outs.values() for o in core.outputs]


def settle(scheduler: Any) -> None:
    """Waits until every load that is not held is answered; the next step knows it, and is one step's time later."""
    if isinstance(scheduler._end, SettlingEnd):
        scheduler._end.settle()
    clock = scheduler_module.time
    if isinstance(clock, Clock):
        clock.advance(STEP_S)


def settled_step(scheduler: Any) -> tuple[SchedulerOutput, list[Any]]:
    """A step, and the loads that it starts: how many steps pass while a load runs is up to the test alone."""
    result = step(scheduler)
    settle(scheduler)
    return result


def run_until(scheduler: Any, done: Callable[[], bool], check: Callable[[SchedulerOutput], None]) -> list[Any]:
    """Settled steps until `done`; every output of every request."""
    outputs: list[Any] = []
    for _ in range(MOST_STEPS):
        if done():
            return outputs
        output, outs = settled_step(scheduler)
        outputs += outs
        check(output)
    raise AssertionError(f"it did not end in {MOST_STEPS} steps")


def checker(scheduler: Any) -> Callable[[SchedulerOutput], None]:
    """Invariants of every step: room is never overdrawn, nothing runs that isn't ready."""

    def check(output: SchedulerOutput) -> None:
        adapters = running_adapters(scheduler)
        assert len(adapters) <= scheduler.room.slots
        rows = sum(scheduler.room.rows_of(scheduler.readiness.rank_of(a)) for a in adapters)
        assert scheduler.room.rank_rows is None or rows <= scheduler.room.rank_rows
        for name in output.num_scheduled_tokens:
            if name in scheduler.requests and (lora := scheduler.requests[name].lora_request) is not None:
                assert scheduler.readiness.rank_of(lora.lora_int_id) > 0

    return check


def running_adapters(scheduler: Any) -> set[int]:
    """Adapters of the requests that run."""
    return {r.lora_request.lora_int_id for r in scheduler.running if r.lora_request is not None}


def finished(scheduler: Any) -> Callable[[], bool]:
    """Whether no request is left."""
    return lambda: not scheduler.requests


def reasons(outputs: list[Any]) -> dict[str, str]:
    """Request -> why it ended."""
    return {o.request_id: str(o.finish_reason) for o in outputs if o.finish_reason is not None}
