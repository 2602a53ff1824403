"""The wire protocol between coordinator, instances, routers and tools: one msgspec struct per message.

Requests go DEALER -> ROUTER as three frames: header, correlation id (8 bytes, chosen by the sender), msgpack payload;
the reply carries the same correlation id. The header is b"LRS" and one version byte. The routing table is published
by PUB as (TABLE_TOPIC, header, payload) on every change and once a second besides, so that a subscriber that joined
late or missed one is right again within a second. Times are seconds since the epoch of the sender's clock; rates are
tokens (prompt + generated) per second; sizes are bytes; ranks are rank rows.

Every struct is tagged with its name. Unknown fields are ignored and new fields need defaults: both sides of an upgrade
understand each other within one PROTOCOL_VERSION.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from vllm_loraserve.cluster.operating_points import StepCost
from vllm_loraserve.cluster.routing_plus import Choice

PROTOCOL_VERSION = 1
HEADER = b"LRS" + bytes([PROTOCOL_VERSION])
TABLE_TOPIC = b"table"
MAX_MESSAGE_BYTES = 64 << 20

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*(/[A-Za-z0-9][A-Za-z0-9_.\-]*)?\Z", max_length=160)]
"""Adapter or instance name: what may stand in a URL, a metric label and a file name without escaping."""

Finite = Annotated[float, Meta(ge=-1e15, le=1e15)]
"""A number that can be reckoned with: one report of NaN or infinity would spoil every sum and forecast it goes into."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of every message."""


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything that travels inside a message."""


# ---- parts ----


class AdapterRecord(Part, frozen=True):
    """One registered adapter, as the durable registry holds it."""

    name: Name
    source: str
    """Directory of a PEFT checkpoint, or a hub id."""
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    sha256: str
    """Content identity: weights and configuration. Another digest under the same name is another adapter."""
    base_model: str
    added_at: float
    state: Literal["active", "draining", "failed"] = "active"
    reason: str = ""
    """Why it is `failed`: it was registered before any instance was there, and does not fit the base model."""
    adapter_id: int = 0
    """Never used twice, not even for other content under the same name. Engines number adapters by themselves."""


class PageGroup(Part, frozen=True):
    """Modules whose rank rows lie in the same pages: an adapter that targets one of them takes pages for all."""

    modules: tuple[str, ...]
    """Suffixes (`q_proj`)."""
    row_bytes: int
    """Of one rank row of these modules in all layers, on all tensor-parallel workers together."""


class Capacity(Part, frozen=True):
    """What an instance can hold and do; fixed while it lives."""

    slots: int
    """Adapters that one batch may mix."""
    rank_rows: int
    """Rank rows its device arena holds."""
    host_bytes: int = 0
    """Bytes of adapters that its host memory holds, all workers together; 0: no host tier, or not known."""
    host_adapters: int = 0
    """Adapters that it can hold at a time, in slots or ready beside them; 0: as many as slots."""
    device: str = ""
    tensor_parallel: int = 1
    kv_tokens: int = 0
    max_rank: int = 256
    max_model_len: int = 0
    """Tokens of prompt and answer together; 0: not known."""
    dtype: str = ""
    """Of the base model."""
    kernels: str = ""
    """LoRA kernels it runs, such as `rank-aware cuda`."""
    max_batched_tokens: int = 0
    """Most tokens of a step; 0: not known."""
    max_seqs: int = 0
    """Most requests that run at a time; 0: not known."""
    page_rows: int = 8
    """Rank rows in a page."""
    page_groups: tuple[PageGroup, ...] = ()
    """How pages are made up; empty: not known for this model."""

    def adapters(self) -> int:
        """Adapters that it can hold at a time."""
        return max(self.slots, self.host_adapters)


class Load(Part, frozen=True):
    """What an instance is doing now."""

    running: int = 0
    waiting: int = 0
    kv_usage: Finite = 0.0
    """0..1."""
    tokens_per_s: Finite = 0.0


class AdapterDemand(Part, frozen=True):
    """Tokens and requests of one adapter (`""`: the base model) on one instance in the last window."""

    name: str
    tokens_per_s: Finite
    requests_per_s: Finite = 0.0
    running: int = 0
    """Requests inside the instance now; an adapter is released only when this is 0 everywhere."""
    tokens: int = 0
    """Tokens since the last heartbeat that was answered."""


class Residency(Part, frozen=True):
    """An adapter that an instance holds, and where."""

    name: Name
    sha256: str
    tier: Literal["arena", "host"] = "arena"
    generation: int = 0
    """Of the copy that peers may read, over all ranks: rises whenever it is replaced; 0: there is none, or it does not
    lie in pages."""


class Location(Part, frozen=True):
    """A live instance that holds an adapter of exactly the registered content, and lets peers read it."""

    instance: Name
    endpoint: str
    """Where its transfer service listens: host:port, one for each tensor-parallel rank, separated by commas."""
    generation: int = 0
    """As the instance last reported it (`Residency`)."""


class Command(Part, frozen=True):
    """What the coordinator wants an instance to do with one adapter; repeated until acknowledged."""

    id: int
    action: Literal["prefetch", "release"]
    adapter: AdapterRecord
    locations: tuple[Location, ...] = ()
    """Prefetch: where else the adapter is, least busy first."""
    superseded: bool = False
    """Release: other content has the name. It is answered when no new request gets this one; else when the last has
    ended."""


class CommandResult(Part, frozen=True):
    """An instance's answer to a Command."""

    id: int
    ok: bool
    error: str = ""


class Route(Part, frozen=True):
    """One choice for an adapter: instance and fraction phi of its requests; the fractions of an adapter sum to 1."""

    instance: Name
    phi: float


class AdapterRoutes(Part, frozen=True):
    """Where an adapter's requests go."""

    adapter: AdapterRecord
    routes: tuple[Route, ...]


class InstanceEntry(Part, frozen=True):
    """One live instance as routers see it."""

    name: Name
    incarnation: str
    url: str
    load: Load
    capacity: Capacity
    resident: tuple[Residency, ...] = ()
    transfer: str = ""
    """Endpoint of its transfer service, or empty."""
    last_seen: float = 0.0
    speed: float = 1.0
    """Learned, relative to the operating points; 1.0 where nothing is."""
    draining: bool = False
    """It is about to stop: it gets no new requests, and those that it has are left to it."""


class Prediction(Part, frozen=True):
    """By what routers predict what a choice of instance would lead to."""

    step_cost: StepCost
    """Of an instance of speed 1.0."""
    measured: bool = False
    """By `vllm-loraserve profile`; else shipped values."""
    choice: Choice = "finish-time"


# ---- requests of instances ----


class Register(Message, frozen=True):
    """An instance joins, or joins again after either side restarted. Reply: Registered or Error."""

    instance: Name
    incarnation: str
    """Random per process: tells a restarted instance from a slow one."""
    url: str
    base_model: str
    capacity: Capacity
    modules: dict[str, tuple[tuple[int, int], ...]] = {}
    """`adapters.shapes.ModuleShapes` of the base model: adapters are checked against it. Empty: not known."""
    resident: tuple[Residency, ...] = ()
    transfer: str = ""
    draining: bool = False
    """As in Heartbeat."""


class Registered(Message, frozen=True):
    """`epoch` rises with every coordinator start; `expiry_s` of silence ends the membership."""

    epoch: int
    expiry_s: float


class Heartbeat(Message, frozen=True):
    """State of an instance since the last one. Reply: HeartbeatReply, or Error `unknown_instance`: register again."""

    instance: Name
    incarnation: str
    load: Load
    demand: tuple[AdapterDemand, ...] = ()
    resident: tuple[Residency, ...] = ()
    results: tuple[CommandResult, ...] = ()
    draining: bool = False
    """It is about to stop, and finishes what it has."""


class HeartbeatReply(Message, frozen=True):
    """What the coordinator wants done."""

    epoch: int
    commands: tuple[Command, ...] = ()


class Leave(Message, frozen=True):
    """An instance goes in good order. Reply: Ok."""

    instance: Name
    incarnation: str


# ---- requests of routers and tools ----


class AddAdapter(Message, frozen=True):
    """Registers an adapter cluster-wide. Reply: AdapterReply, or Error (`conflict`: same name, other content).

    With `replace`, other content takes the name over: new requests get it, running ones finish with the weights that
    they began with. The reply then comes when no instance gives the old content to new requests.
    """

    name: Name
    source: str
    replace: bool = False


class RemoveAdapter(Message, frozen=True):
    """Stops routing to the adapter, lets running requests finish (up to `drain_s`), then releases it.

    Reply: Ok when it is gone, so wait longer than `drain_s` (the client does); the removal goes on if nobody waits.
    """

    name: Name
    drain_s: Finite = 30.0


class GetAdapter(Message, frozen=True):
    """Reply: AdapterReply or Error `not_found`."""

    name: str


class GetPlan(Message, frozen=True):
    """A dry run: what would a policy change now? Reply: Plan, or Error `invalid` (unknown policy, nothing to place)."""

    policy: str = ""
    """Empty: the one in force."""


class PlannedMove(Part, frozen=True):
    """One copy that would be fetched (`bytes` to move) or released."""

    adapter: Name
    instance: Name
    action: Literal["prefetch", "release"]
    bytes: int = 0


class Forecast(Part, frozen=True):
    """One instance under a placement: load by the policy's measure (1.0: at its operating point), adapters placed."""

    instance: Name
    load: float
    adapters: int


class Plan(Message, frozen=True):
    """What `vllm-loraserve plan` shows."""

    policy: str
    adopt: bool
    """Whether the loop would do it; else the damping keeps the placement as it is."""
    why: str
    moves: tuple[PlannedMove, ...]
    bytes: int
    now: tuple[Forecast, ...]
    then: tuple[Forecast, ...]
    p95_now_s: float
    """Predicted P95 of the time to first token over all requests; -1: an instance is overloaded."""
    p95_then_s: float
    measured: bool = False
    """Whether the operating points were measured (else shipped defaults)."""
    demand: str = ""
    """How demand was forecast."""


class Explain(Message, frozen=True):
    """Why an adapter is where it is. Reply: Explanation, or Error `not_found`."""

    name: str


class Explanation(Message, frozen=True):
    """Sentences, most general first."""

    lines: tuple[str, ...]


class AdapterReply(Message, frozen=True):
    """One registry record; `created` is False when the same content was registered before."""

    adapter: AdapterRecord
    created: bool = False
    locations: tuple[Location, ...] = ()
    """GetAdapter: who holds it, least busy first."""


class GetTable(Message, frozen=True):
    """Reply: RoutingTable."""


class GetStatus(Message, frozen=True):
    """Reply: Status."""


class RoutingTable(Message, frozen=True):
    """The whole routing table. Newer = larger (epoch, version). Adapters with no live instance have no routes."""

    epoch: int
    version: int
    base_model: str
    instances: tuple[InstanceEntry, ...]
    adapters: tuple[AdapterRoutes, ...]
    made_at: float = 0.0
    settled: bool = True
    """False only in a reply to GetTable just after a restart: instances are still coming back; not published."""
    prediction: Prediction | None = None
    """Where the policy wants routers to choose by prediction; None: by phi and load."""


class Status(Message, frozen=True):
    """What `vllm-loraserve status` shows."""

    table: RoutingTable
    uptime_s: float
    demand: tuple[AdapterDemand, ...]
    counters: dict[str, int]
    """Messages handled, malformed, unknown, by name."""
    pending: tuple[tuple[str, Command], ...] = ()
    """(instance, command) not answered yet."""
    policy: str = ""
    problems: tuple[str, ...] = ()
    """One sentence each: what an operator should know."""
    decisions: tuple[tuple[float, str], ...] = ()
    """The last placement decisions: time and reason."""
    speeds: dict[str, float] = {}
    """Instance -> observed speed relative to the operating points, where it was seen at its limit."""


class Ok(Message, frozen=True):
    """Done."""


ErrorCode = Literal[
    "malformed",
    "unknown_message",
    "version",
    "unknown_instance",
    "not_found",
    "conflict",
    "invalid",
    "forbidden",
    "internal",
]


class Error(Message, frozen=True):
    """The request was not carried out; `message` is one sentence for a person."""

    code: ErrorCode
    message: str


Request = (
    Register | Heartbeat | Leave | AddAdapter | RemoveAdapter | GetAdapter | GetTable | GetStatus | GetPlan | Explain
)
Reply = Registered | HeartbeatReply | AdapterReply | RoutingTable | Status | Plan | Explanation | Ok | Error
