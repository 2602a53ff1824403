"""Adapters from other instances, inside a worker: serves its host tier to peers, and brings adapters in from theirs.

One `PeerSources` per worker process, between the LoRA manager and `transfer/`. What it needs to know comes from
outside: the coordinator's location table reaches it through the API server (`locate`), so that it goes on with what it
last heard. Where peers are known the pool has the checkpoint as its last source, and as the second one beside a slow
peer; where none are, the caller reads the checkpoint itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

from prometheus_client import CollectorRegistry
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from vllm_loraserve.config import ConfigError, LoRAServeConfig
from vllm_loraserve.engine import channel
from vllm_loraserve.engine.adapter_loader import AdapterLoader, ServedAdapter
from vllm_loraserve.engine.load_threads import ensure_wanted, ordered
from vllm_loraserve.memory.host_tier import HostEntry, HostTier
from vllm_loraserve.transfer.auth import load_key
from vllm_loraserve.transfer.errors import AdapterUnavailableError, CancelledError, DeadlineError, TransferError
from vllm_loraserve.transfer.flight import Flight
from vllm_loraserve.transfer.handover import Handover
from vllm_loraserve.transfer.host_store import HostTierStore
from vllm_loraserve.transfer.metrics import PoolMetrics
from vllm_loraserve.transfer.pages import AdapterPages, Landing, Wanted
from vllm_loraserve.transfer.peers import PeerTable
from vllm_loraserve.transfer.pool import AdapterPool, Location, PoolOptions
from vllm_loraserve.transfer.rungs import nixl
from vllm_loraserve.transfer.server import TransferServer

logger = init_logger("vllm.loraserve.peer_sources")

CHECKPOINTS_EVERY_S = 5.0
"""How old the knowledge may be whether the checkpoints of the adapters held here can be read."""
LOOK_S = 1.0
"""Longest that a load which has to evict waits for that knowledge."""


class PeerSources:
    """Transfer server and adapter pool of one worker.

    tier: the host tier that is served and filled. whole: whether an adapter (by its integer id) is in its pages
    altogether; others are not offered. rank: tensor-parallel rank; peers are asked at the same rank. loader: reads
    checkpoints into the tier; without one `bring` knows peers only. Raises ConfigError for a way that can't be offered,
    AuthenticationError for a key that can't be used.
    """

    def __init__(
        self,
        config: LoRAServeConfig,
        tier: HostTier,
        whole: Callable[[int], bool],
        *,
        rank: int = 0,
        loader: AdapterLoader | None = None,
    ) -> None:
        assert config.transfer_key_file is not None
        key, instance = load_key(config.transfer_key_file), config.instance or "instance"
        ways = set(config.transfer_ways)
        if "nixl" in ways and (reason := nixl.unusable()):
            raise ConfigError(f"loraserve-config: transfer_ways={config.transfer_ways!r}: no nixl here: {reason}")
        rdma = "off" if ways.isdisjoint(("verbs", "verbs_gpudirect")) else config.transfer_rdma
        self._tier, self._whole, self._rank, self._loader = tier, whole, rank, loader
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._located: dict[tuple[str, str], tuple[str, tuple[Location, ...]]] = {}
        self._landings: dict[tuple[str, str], int] = {}
        """(name, digest) -> the id under which this content is to land."""
        self._asked: dict[str, LoRARequest] = {}
        """Name -> the request that it is being brought in for."""
        self._loaded: dict[str, ServedAdapter] = {}
        self._failed: dict[str, Exception] = {}
        """Name -> what its last reading from the checkpoint, by the pool, gave."""
        self._paths: dict[str, str] = {}
        self._readable: dict[str, bool] = {}
        self._looked_at = -CHECKPOINTS_EVERY_S
        self._looker: threading.Thread | None = None
        self._handover = Handover()
        self._store = HostTierStore(
            tier,
            name_of=self._name_of,
            key_of=self._ids.get,
            on_landed=self._handover.landed,
            landing_key=lambda name, digest: self._landings.get((name, digest)),
        )
        tier.may_evict = self._may_evict
        tier.before_evicting = lambda: self.look_at_checkpoints(every_s=CHECKPOINTS_EVERY_S, patience_s=LOOK_S)
        self._server = TransferServer(
            [self._store],
            key,
            instance,
            host=config.transfer_host,
            advertise=config.transfer_advertise,
            verbs=rdma,
            offer_unix=not ways.isdisjoint(("memfd", "cuda_ipc")),
            offer_nixl="nixl" in ways,
        )
        options = PoolOptions(
            deadline_s=config.load_timeout_s if loader is not None else config.transfer_deadline_s,
            peer_deadline_s=config.transfer_deadline_s,
            rate=config.transfer_gib_s * 2**30,
        )
        self._peers = PeerTable(key, instance, order=config.transfer_ways, verbs=rdma)
        # A registry of its own: no server shows a worker's default one.
        self._metrics = CollectorRegistry()
        self._pool = AdapterPool(
            self._store,
            self._peers,
            tiers=[("host", self._store.find)],
            load=self._from_checkpoint if loader is not None else None,
            options=options,
            metrics=PoolMetrics(self._metrics),
            on_progress=lambda: self.on_progress(),
        )
        self.on_progress: Callable[[], None] = lambda: None
        """Called about once a second, on a thread that loads, while an adapter is on its way."""

    @property
    def endpoint(self) -> str:
        """host:port where peers find this worker."""
        return self._server.endpoint

    def metrics(self) -> list[channel.Family]:
        """The pool's counters since the start, and how far what is on its way has come."""
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
        self.locate_all([(name, path, digest, holders)])

    def locate_all(self, rows: Iterable[tuple[str, str, str, Sequence[tuple[str, str]]]]) -> None:
        """The same for many: (name, path, digest, holders)."""
        news = {}
        for name, path, digest, holders in rows:
            ranks = ((instance, endpoints.split(",")) for instance, endpoints in holders)
            found = tuple(Location(instance, at[self._rank]) for instance, at in ranks if self._rank < len(at))
            news[name, path] = (digest, found)
        with self._lock:
            self._replace_rows(self._located | news)
        for (name, _), (digest, found) in news.items():
            self._handover.located(name, digest, [location.instance for location in found])

    def retain(self, adapters: Collection[str], instances: Collection[str]) -> None:
        """These adapters and instances the cluster has now: rows of others are forgotten, peers without rows let go."""
        with self._lock:
            before = self._located
            self._replace_rows(
                {
                    (name, path): (digest, tuple(x for x in row if x.instance in instances))
                    for (name, path), (digest, row) in before.items()
                    if name in adapters
                }
            )
            lost = [
                (name, digest, [x.instance for x in row])
                for (name, path), (digest, row) in self._located.items()
                if self._paths.get(name) == path and row != before[name, path][1]
            ]
        for name, digest, holders in lost:
            self._handover.located(name, digest, holders)

    def _replace_rows(self, rows: dict[tuple[str, str], tuple[str, tuple[Location, ...]]]) -> None:
        """With the lock held: the location table is `rows` now; peers that it no longer names are let go."""
        before, self._located = self._located, rows
        gone, named = ({x.endpoint for _, row in table.values() for x in row} for table in (before, rows))
        for endpoint in gone - named:
            self._peers.forget(endpoint)

    def knows(self, request: LoRARequest) -> bool:
        """Whether the adapter is one of the cluster's, so that it may come though its checkpoint is gone here."""
        with self._lock:
            return (request.lora_name, request.lora_path) in self._located

    def served(self, request: LoRARequest) -> None:
        """The adapter is in the host tier under the request's id: peers may have it by its name."""
        with self._lock:
            self._ids[request.lora_name] = request.lora_int_id
            self._names[request.lora_int_id] = request.lora_name
            self._paths[request.lora_name] = request.lora_path

    def removed(self, lora_id: int) -> None:
        """The adapter is gone; whoever reads it now gets an error and takes another source."""
        with self._lock:
            self._landings = {content: key for content, key in self._landings.items() if key != lora_id}
            name = self._names.pop(lora_id, None)
            current = name is not None and self._ids.get(name) == lora_id
            if name is not None and current:
                del self._ids[name]
                self._paths.pop(name, None)
                self._readable.pop(name, None)
                self._loaded.pop(name, None)
                self._failed.pop(name, None)
        if name is not None and current:
            self._handover.forget(name)
            self._server.revoke(name)

    # ---- the last copy stays ----

    def _may_evict(self, key: Hashable) -> bool:
        """Asked by the tier, under its lock: nothing here waits for a disk."""
        with self._lock:
            name = self._names.get(key) if isinstance(key, int) else None
            readable = name is None or self._readable.get(name, True)
        entry = self._tier.get(key)
        if name is None or entry is None:
            return True
        return self._handover.may_go(name, entry.digest, checkpoint_readable=readable)

    def look_at_checkpoints(self, *, every_s: float = 0.0, patience_s: float | None = None) -> None:
        """Learns whether the checkpoints of the adapters held here can be read, unless that is known since `every_s`.

        Their file systems may not answer, and are not those of the adapter that a caller loads: it waits until a look
        is `patience_s` old at most (None: for ever), and goes on with what was known. One that is under way counts if
        it began within `every_s`.
        """
        while True:
            with self._lock:
                now = time.monotonic()
                looker = self._looker if self._looker is not None and self._looker.is_alive() else None
                counts = now - self._looked_at < every_s
                if looker is None:
                    if counts:
                        return
                    counts, self._looked_at = True, now
                    looker = self._looker = threading.Thread(
                        target=self._look, args=(dict(self._paths),), name="loraserve-look", daemon=True
                    )
                    try:
                        looker.start()
                    except RuntimeError:  # can't start new thread: what was known stands
                        return
                began = self._looked_at
            looker.join(None if patience_s is None else max(began + patience_s - now, 0.0))
            if counts or looker.is_alive():
                return

    def _look(self, paths: dict[str, str]) -> None:
        # What is no local path is a name in a hub's cache, and stays there.
        seen = {
            name: os.path.exists(os.path.join(path, "adapter_config.json")) or not os.path.isabs(path)
            for name, path in paths.items()
        }
        with self._lock:
            self._readable.update({name: found for name, found in seen.items() if self._paths.get(name) == paths[name]})

    # ---- bringing in ----

    def bring(self, request: LoRARequest) -> ServedAdapter | None:
        """The adapter of `request`, in the host tier; None: it is not the cluster's, or was read here before, so take
        it from its checkpoint. Blocks.

        Raises AdapterUnavailableError where neither a peer nor its checkpoint has it, else what reading that raised.
        """
        try:
            return self._bring(request)
        finally:
            # Here nobody waits for it any more; a load that has to evict looks for itself.
            self.look_at_checkpoints(every_s=CHECKPOINTS_EVERY_S, patience_s=0)

    def _bring(self, request: LoRARequest) -> ServedAdapter | None:
        name = request.lora_name
        with self._lock:
            digest, locations = self._located.get((name, request.lora_path), ("", ()))
        entry = self._tier.get(request.lora_int_id)
        if request.load_inplace:
            return None
        if entry is not None and entry.digest == digest:
            # Came from a peer for a load that was given up since: this instance may have no checkpoint of it.
            return self._landed(request, entry) if entry.from_peer else None
        if not locations:
            return self._without_peers(request) if digest else None
        # Who had a copy of what was here before has none of what comes now.
        self._handover.forget(name)
        # The landing asks under which key to put it, before anybody may have it from here.
        with self._lock:
            self._ids[name] = request.lora_int_id
            self._landings[name, digest] = request.lora_int_id
            self._asked[name] = request
            self._failed.pop(name, None)
        wanted = Wanted(name=name, layout=self._tier.layout.fingerprint, digest=digest)
        try:
            brought = self._pool.bring(wanted, locations, ahead=not ordered())
        except (AdapterUnavailableError, TransferError, CancelledError, TimeoutError) as error:
            logger.warning("'%s' does not come from a peer: %s", name, error)
            if self._loader is None:
                return None
            with self._lock:
                failure = self._failed.pop(name, None)
            if failure is not None and not is_missing(failure):
                raise failure from None
            raise
        if brought.source == "checkpoint":
            with self._lock:
                loaded = self._loaded.pop(name, None)
            # Somebody who waited for the same one finds it in the tier.
            return loaded if loaded is not None and loaded.id == request.lora_int_id else None
        entry = self._tier.get(request.lora_int_id)
        if entry is None:
            return None  # evicted as soon as it was here
        # Before the verdict whether this load still counts: where it does not, its successor finds the adapter here.
        logger.info("Adapter %s: from %s %s in %.0f ms", name, brought.source, brought.via, brought.seconds * 1e3)
        return self._landed(request, entry)

    def _landed(self, request: LoRARequest, entry: HostEntry) -> ServedAdapter:
        """An adapter that came from a peer, as the manager sees it; from now on we serve it, too."""
        adapter = ServedAdapter(request.lora_int_id, max(entry.ranks, default=0), {})
        adapter.request, adapter.ranks, adapter.pages = request, tuple(entry.ranks), tuple(entry.pages)
        ensure_wanted()
        self.served(request)
        return adapter

    def _without_peers(self, request: LoRARequest) -> ServedAdapter | None:
        """An adapter of the cluster that nobody holds now, from its checkpoint."""
        if self._loader is None:
            return None
        try:
            return self._loader.prepare(request)
        except Exception as error:
            if not is_missing(error):
                raise
            failures = [("peers", "none holds it"), ("checkpoint", str(error))]
            raise AdapterUnavailableError(request.lora_name, failures) from None

    def _from_checkpoint(self, wanted: Wanted, landing: Landing, flight: Flight) -> AdapterPages:
        """The pool's last source (`LoadCheckpoint`)."""
        assert self._loader is not None
        with self._lock:
            request = self._asked[wanted.name]

        def commit(entry: HostEntry) -> None:
            pages, destination = self._store.adopt(wanted.name, entry)
            try:
                flight.check()
                landing.commit(pages, destination)
            except BaseException:
                landing.abandon(destination)
                raise

        try:
            adapter = self._loader.prepare(request, commit)
        except (CancelledError, DeadlineError):
            raise
        except Exception as error:
            with self._lock:
                self._failed[wanted.name] = error
            raise
        found = self._store.find(Wanted(name=wanted.name, layout=wanted.layout))
        if found is None:
            raise TransferError(f"{wanted.name} was evicted as soon as it was here")
        with self._lock:
            self._loaded[wanted.name] = adapter
        return found

    def close(self) -> None:
        """Ends all connections."""
        self._pool.close()
        self._peers.close()
        self._server.close()


def is_missing(error: Exception) -> bool:
    """Whether a checkpoint could not be read because it is not there: elsewhere, or later, it may be."""
    return isinstance(error, FileNotFoundError | NotADirectoryError) or getattr(error, "kind", "") == "not_found"
