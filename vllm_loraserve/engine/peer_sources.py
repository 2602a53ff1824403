"""Adapters from other instances, inside a worker: serves its host tier to peers, and brings adapters in from theirs.

One `PeerSources` per worker process, between the LoRA manager and `transfer/`. What it needs to know comes from
outside: the coordinator's location table reaches it through the API server (`locate`), so that it goes on with what it
last heard. A fetch that fails, or finds nobody, is no error here: the checkpoint is the next source.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

from prometheus_client import CollectorRegistry
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from vllm_loraserve.config import LoRAServeConfig
from vllm_loraserve.engine import channel
from vllm_loraserve.engine.adapter_loader import ServedAdapter
from vllm_loraserve.memory.host_tier import HostTier
from vllm_loraserve.transfer.auth import load_key
from vllm_loraserve.transfer.errors import AdapterUnavailableError, CancelledError, TransferError
from vllm_loraserve.transfer.host_store import HostTierStore
from vllm_loraserve.transfer.metrics import PoolMetrics
from vllm_loraserve.transfer.pages import Wanted
from vllm_loraserve.transfer.peers import PeerTable
from vllm_loraserve.transfer.pool import AdapterPool, Location, PoolOptions
from vllm_loraserve.transfer.server import TransferServer

logger = init_logger("vllm.loraserve.peer_sources")


class PeerSources:
    """Transfer server and adapter pool of one worker.

    tier: the host tier that is served and filled. whole: whether an adapter (by its integer id) is in its pages
    altogether; others are not offered. rank: tensor-parallel rank; peers are asked at the same rank.
    """

    def __init__(self, config: LoRAServeConfig, tier: HostTier, whole: Callable[[int], bool], *, rank: int = 0) -> None:
        assert config.transfer_key_file is not None
        key, instance = load_key(config.transfer_key_file), config.instance or "instance"
        self._tier, self._whole, self._rank = tier, whole, rank
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._located: dict[tuple[str, str], tuple[str, tuple[Location, ...]]] = {}
        self._store = HostTierStore(tier, name_of=self._name_of, key_of=self._ids.get)
        self._server = TransferServer(
            [self._store],
            key,
            instance,
            host=config.transfer_host,
            advertise=config.transfer_advertise,
            verbs=config.transfer_rdma,
        )
        options = PoolOptions(deadline_s=config.transfer_deadline_s, rate=config.transfer_gib_s * 2**30)
        self._peers = PeerTable(key, instance, verbs=config.transfer_rdma)
        # A registry of its own: no server shows a worker's default one.
        self._metrics = CollectorRegistry()
        self._pool = AdapterPool(
            self._store,
            self._peers,
            tiers=[("host", self._store.find)],
            options=options,
            metrics=PoolMetrics(self._metrics),
        )

    @property
    def endpoint(self) -> str:
        """host:port where peers find this worker."""
        return self._server.endpoint

    def metrics(self) -> list[channel.Family]:
        """The pool's counters since the start."""
        return [
            channel.Family(
                family.name,
                family.documentation,
                family.type,
                [(s.name, dict(s.labels), s.value) for s in family.samples if not s.name.endswith("_created")],
            )
            for family in self._metrics.collect()
        ]

    def _name_of(self, key: Hashable) -> str | None:
        with self._lock:
            name = self._names.get(key) if isinstance(key, int) else None
        return name if name is not None and isinstance(key, int) and self._whole(key) else None

    def locate(self, name: str, path: str, digest: str, holders: Sequence[tuple[str, str]]) -> None:
        """The content `digest`, served as (name, path), is at these peers: (instance, host:port of each rank)."""
        locations = []
        for instance, endpoints in holders:
            ranks = endpoints.split(",")
            if self._rank < len(ranks):
                locations.append(Location(instance, ranks[self._rank]))
        with self._lock:
            self._located[name, path] = (digest, tuple(locations))

    def knows(self, request: LoRARequest) -> bool:
        """Whether some peer was named for the adapter, so that it may come though its checkpoint is gone."""
        with self._lock:
            _, locations = self._located.get((request.lora_name, request.lora_path), ("", ()))
        return bool(locations)

    def served(self, request: LoRARequest) -> None:
        """The adapter is in the host tier under the request's id: peers may have it by its name."""
        with self._lock:
            self._ids[request.lora_name] = request.lora_int_id
            self._names[request.lora_int_id] = request.lora_name

    def removed(self, lora_id: int) -> None:
        """The adapter is gone; whoever reads it now gets an error and takes another source."""
        with self._lock:
            name = self._names.pop(lora_id, None)
            current = name is not None and self._ids.get(name) == lora_id
            if name is not None and current:
                del self._ids[name]
        if name is not None and current:
            self._server.revoke(name)

    def bring(self, request: LoRARequest) -> ServedAdapter | None:
        """The adapter of `request` from a peer, in the host tier; None: take it from its checkpoint. Blocks."""
        with self._lock:
            digest, locations = self._located.get((request.lora_name, request.lora_path), ("", ()))
        entry = self._tier.get(request.lora_int_id)
        if not locations or request.load_inplace or (entry is not None and entry.digest == digest):
            return None
        # The landing asks under which key to put it, before anybody may have it from here.
        with self._lock:
            self._ids[request.lora_name] = request.lora_int_id
        wanted = Wanted(name=request.lora_name, layout=self._tier.layout.fingerprint, digest=digest)
        try:
            brought = self._pool.bring(wanted, locations)
        except (AdapterUnavailableError, TransferError, CancelledError, TimeoutError) as error:
            logger.warning("'%s' does not come from a peer: %s", request.lora_name, error)
            return None
        entry = self._tier.get(request.lora_int_id)
        if entry is None:
            return None  # evicted as soon as it was here
        adapter = ServedAdapter(request.lora_int_id, max(entry.ranks, default=0), {})
        adapter.request, adapter.ranks, adapter.pages = request, tuple(entry.ranks), tuple(entry.pages)
        self.served(request)
        logger.info(
            "Adapter %s: rank %d from %s %s in %.0f ms",
            request.lora_name, adapter.page_rank, brought.source, brought.via, brought.seconds * 1e3,
        )  # fmt: skip
        return adapter

    def close(self) -> None:
        """Ends all connections."""
        self._pool.close()
        self._peers.close()
        self._server.close()
