"""What the router does with each path that vLLM 0.32 serves: forwards it, answers it, or says why it does neither."""

from __future__ import annotations

import re

FORWARDED_PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v2/embed",
    "/v1/score",
    "/v1/rerank",
    "/v2/rerank",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/generative_scoring",
    "/v1/systemone",
    "/tokenize",
    "/detokenize",
    "/invocations",
    "/inference/v1/generate",
    "/v1/completions/render",
    "/v1/completions/derender",
    "/v1/chat/completions/render",
    "/v1/chat/completions/derender",
    "/v1/responses/render",
    "/v1/messages/render",
)
"""POST, a JSON body with `model`, and nothing that a later request would have to find on the same instance."""

OWN_PATHS = ("/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/health", "/ping", "/metrics")
"""Answered by the router itself, for the whole cluster."""

_NOT_FORWARDED = (
    (
        r"/v1/responses/(?!render$).+|(/inference/v1)?/abort_requests",
        "what it asks for is on the instance that answered before, and the router keeps no memory of which",
    ),
    (r"/v1/audio/.+|/v1/realtime", "its model is not in a JSON body; ask an instance directly"),
    (
        r"/load|/version|/server_info|/tokenizer_info|/kv_event_sources|/get_world_size|/weight_info|/is_.+"
        r"|/fault_tolerance/status",
        "it is about one instance; ask that, or see /metrics and `vllm-loraserve status` for all",
    ),
    (
        r"/sleep|/release_kv_cache_memory|/wake_up|/pause|/resume|/collective_rpc|/reset_.+|/(start|stop)_profile"
        r"|/scale_elastic_ep|/fault_tolerance/.+|/.+_weight_.+|/update_weights|/weight_checker|/adapters(/.+)?",
        "it administers one instance; ask that directly",
    ),
)


def why_not_forwarded(path: str) -> str | None:
    """Why a path that vLLM serves is not to be had here; None for a path that neither knows."""
    for pattern, why in _NOT_FORWARDED:
        if re.fullmatch(pattern, path):
            return why
    return None
