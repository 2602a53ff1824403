"""Every option of `--loraserve-config`, with its unit, default and limits, in one struct."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from vllm_loraserve.transfer.rungs import DEFAULT_ORDER, WAYS

InstanceName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}\Z")]


ADDITIONAL_CONFIG_KEY = "loraserve"
"""Where vLLM's `additional_config` carries the options; its presence is what turns the plugin on."""


CPU_SLOTS, GPU_SLOTS = 8, 32
"""Adapters that a batch may mix where `vllm serve` is given no --max-loras."""
ARENA_RANK_ROWS = 512
"""Rank rows of the arena beside those slots: 32 adapters of rank 16, say, or 2 of rank 256."""
ARENA_SHARE = 0.05
"""Of a GPU's memory, at most, for them: a large model may leave little."""


class ConfigError(ValueError):
    """An option that can't be used; the message is one line naming key, value and limit."""


class LoRAServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Options of one vLLM instance; the value of `--loraserve-config` and of `additional_config["loraserve"]`."""

    max_rank: Annotated[int, Meta(ge=1, le=512, description="Largest adapter rank accepted, in rank rows.")] = 256
    adapter_roots: Annotated[
        tuple[str, ...],
        Meta(description="Directories that adapter checkpoints may be read from; empty: any path."),
    ] = ()
    arena_gib: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="Device memory for adapters, in GiB a worker; unset: what stock vLLM takes for --max-loras of "
            f"--max-lora-rank, and without --max-loras {ARENA_RANK_ROWS} rank rows."
        ),
    ] = None
    arena_rank_rows: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Device memory for adapters, in rank rows of all modules; not with arena_gib."),
    ] = None
    arena_share: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(
            description="Most of a GPU's memory that arena_rank_rows may take, as a fraction; unset: no bound, and "
            f"{ARENA_SHARE} where neither --max-loras nor an arena is given."
        ),
    ] = None
    host_gib: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="Host memory for adapters, in GiB a worker; unset: --max-cpu-loras + 1 of --max-lora-rank, and "
            "one of max_rank."
        ),
    ] = None
    page_rows: Annotated[int, Meta(ge=1, le=64, description="Rank rows in a page.")] = 8
    page_cache_dir: Annotated[
        str | None,
        Meta(description="Directory that keeps converted adapters for the next start; unset: none is kept."),
    ] = None
    page_cache_gib: Annotated[
        float,
        Meta(gt=0, description="Most disk that page_cache_dir takes, in GiB; what was used least recently goes first."),
    ] = 64.0
    coordinator: Annotated[
        str | None,
        Meta(description="ZMQ endpoint of the coordinator, such as tcp://127.0.0.1:5700; unset: stand alone."),
    ] = None
    instance: Annotated[
        InstanceName | None, Meta(description="This instance's name in the cluster; unset: host-port of its server.")
    ] = None
    advertise_url: Annotated[
        str | None,
        Meta(description="HTTP base URL under which routers reach this instance; unset: from --host/--port."),
    ] = None
    transfer_key_file: Annotated[
        str | None,
        Meta(description="File (mode 600) with the cluster's transfer key; unset: no adapters from or to peers."),
    ] = None
    transfer_host: Annotated[str, Meta(description="Address to serve adapters to peers on.")] = "127.0.0.1"
    transfer_advertise: Annotated[
        str | None, Meta(description="Host under which peers reach transfer_host; unset: transfer_host itself.")
    ] = None
    transfer_ways: Annotated[
        tuple[str, ...],
        Meta(min_length=1, description=f"Ways between peers that may be taken, best first, of {', '.join(WAYS)}."),
    ] = DEFAULT_ORDER
    transfer_rdma: Annotated[str, Meta(description="RDMA device to use, or auto, or off.")] = "auto"
    transfer_gib_s: Annotated[
        float, Meta(ge=0, description="Most GiB/s that fetches from peers take together; 0: no bound.")
    ] = 0.0
    transfer_deadline_s: Annotated[
        float, Meta(gt=0, le=3600, description="Seconds for one adapter from peers, then its checkpoint is read.")
    ] = 30.0
    heartbeat_s: Annotated[float, Meta(gt=0, le=60, description="Seconds between heartbeats to the coordinator.")] = 1.0
    prefetch: Annotated[
        int, Meta(ge=1, le=1024, description="Adapters that may be loading, or loaded and not yet running, at a time.")
    ] = 8
    concurrent_loads: Annotated[int, Meta(ge=1, le=64, description="Adapters read from their source at a time.")] = 2
    load_timeout_s: Annotated[
        float, Meta(gt=0, le=3600, description="Seconds after which a load that has not ended counts as failed.")
    ] = 120.0
    load_retries: Annotated[
        int, Meta(ge=0, le=100, description="Times that a load is tried again when its source is slow or away.")
    ] = 3
    skip_window: Annotated[
        int,
        Meta(
            ge=0,
            description="Requests admitted since one was first seen whose adapter finds no room, before room is made.",
        ),
    ] = 64
    max_skip_s: Annotated[
        float, Meta(ge=0, description="Seconds that a request may be overtaken before room is made for its adapter.")
    ] = 2.0
    operating_points: Annotated[
        str | None,
        Meta(
            description="File of `vllm-loraserve profile` that says what LoRA adds to a step; unset: shipped defaults."
        ),
    ] = None
    lora_cost_per_rank: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(
            description="Work that one rank row adds to a token, as a fraction of a base token's work; unset: from "
            "operating_points.",
        ),
    ] = None
    lora_share: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="Most work that LoRA prefill may add to a step while others decode, as a fraction of the "
            "step's token budget; null: no bound, and no halving of prefill of high ranks.",
        ),
    ] = 0.25
    shares: Annotated[
        dict[str, Annotated[float, Meta(gt=0)]],
        Meta(description="Weighted shares by adapter name, tenant (what precedes / in the name) or *; empty: none."),
    ] = {}
    max_inflight_tokens: Annotated[
        dict[str, Annotated[int, Meta(gt=0)]],
        Meta(description="Most tokens (prompt + max_tokens) running at a time by adapter name, tenant or *."),
    ] = {}
    limit_wait_s: Annotated[
        float, Meta(ge=0, description="Seconds that a request over its max_inflight_tokens waits before it gets 429.")
    ] = 30.0
    cpu_poll_s: Annotated[
        float,
        Meta(
            ge=0.002,
            le=1,
            description="Seconds that an engine core on a CPU looks for its workers' next message without a pause, on "
            "a whole core, before it sleeps; vLLM's own: 1.",
        ),
    ] = 0.003
    trace_schedule: Annotated[
        str | None, Meta(description="File that gets one JSON line per step of the scheduler; unset: none.")
    ] = None


def parse_config(raw: Mapping[str, Any] | LoRAServeConfig | None) -> LoRAServeConfig:
    """The struct for a decoded JSON object (None: all defaults).

    Raises ConfigError, in one line naming the key, its value and the limit, for an unknown key, a wrong type or a
    value out of range.
    """
    if isinstance(raw, LoRAServeConfig):
        return raw
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"loraserve-config: expected a JSON object, got {raw!r}")
    known = {f.encode_name: f for f in msgspec.structs.fields(LoRAServeConfig)}
    for key, value in raw.items():
        if key not in known:
            raise ConfigError(f"loraserve-config: unknown key {key!r}; known keys: {', '.join(sorted(known))}")
        try:
            msgspec.convert(value, known[key].type, strict=True)
        except msgspec.ValidationError as error:
            raise ConfigError(f"loraserve-config: {key}={value!r}: {error}") from None
        if (problem := _problem(key, value)) is not None:
            raise ConfigError(f"loraserve-config: {key}={value!r}: {problem}")
    config = msgspec.convert(dict(raw), LoRAServeConfig, strict=True)
    if config.arena_gib is not None and config.arena_rank_rows is not None:
        raise ConfigError(
            f"loraserve-config: arena_gib={config.arena_gib:g} and arena_rank_rows={config.arena_rank_rows} are both "
            "given; give the arena one size"
        )
    if config.transfer_key_file is not None and config.transfer_advertise is None:
        host = config.transfer_host.strip("[]")
        if host in ("", "0.0.0.0", "::", "*"):
            raise ConfigError(
                f"loraserve-config: transfer_host={config.transfer_host!r} is no address that peers can reach; set "
                "transfer_advertise to this host's name or address"
            )
    return config


def _problem(key: str, value: Any) -> str | None:
    """What types can't say about the value of a key, as a clause; None: nothing is wrong with it."""
    if not all(math.isfinite(number) for number in _floats(value)):
        return "expected a finite number"
    if value is not None and key == "coordinator" and not _is_endpoint(value):
        return "expected a ZMQ endpoint, tcp://HOST:PORT or ipc://PATH"
    if key == "transfer_ways" and (unknown := [way for way in value if way not in WAYS]):
        return f"there is no way {unknown[0]!r}; choose among {', '.join(WAYS)}"
    if value is not None and key == "advertise_url" and not _is_base_url(value):
        return "expected an HTTP base URL, http://HOST:PORT"
    return None


def _floats(value: Any) -> Iterator[float]:
    for one in value.values() if isinstance(value, Mapping) else (value,):
        if isinstance(one, float):
            yield one


def _is_endpoint(text: str) -> bool:
    if text.startswith("ipc://"):
        return text != "ipc://"
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    # The table is published on the next port.
    return text.startswith("tcp://") and bool(host) and port.isdecimal() and 0 < int(port) < 65535


def _is_base_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:  # of a port
        return False
