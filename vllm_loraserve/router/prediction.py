"""Choice by predicted finish time (`loraserve+`): the instance that would be done with a request first gets it.

The routing table says what a step costs where the coordinator's policy wants this choice (measured by
`vllm-loraserve profile`, else shipped values; an operator may give a file to the router itself). From its ledgers (what
it has under way on each instance) and the load, limits and speed in the table it asks `cluster.routing_plus` who would
finish first. An instance that does not hold the adapter is a candidate too, with the time of the fetch added, so that a
hot spot spills over only when that is faster.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from vllm_loraserve.cluster.operating_points import StepCost
from vllm_loraserve.cluster.routing import rendezvous_weighted
from vllm_loraserve.cluster.routing_plus import (
    EXTERNALITY,
    Choice,
    ServerView,
    choose_finish_time,
    choose_least_added_cost,
    predict_wait,
    spill_candidates,
)
from vllm_loraserve.coordinator.messages import RoutingTable
from vllm_loraserve.router.directory import Target
from vllm_loraserve.router.ledger import Work
from vllm_loraserve.router.upstream import Upstream

MOST_CANDIDATES = 16
"""Of all that could take a request (for the base model: all), those with the fewest requests are looked at."""
FETCH_BYTES_S, FETCH_LATENCY_S = 1e9, 5e-3
"""A modest guess of what it takes to bring in an adapter that an instance lacks."""
AFFINITY_SHARE = 0.5
"""Share of the prompt that a session's own instance is expected to have in its prefix cache."""
FIRST_MEAN_OUTPUT = 128.0
SLOWEST = 1e-6
"""Of speeds that are divided by."""


class Predictor:
    """Chooses by predicted finish time, or by least added cost where the table's policy is Toppings', while it has a
    step cost. One per router.

    `given`: the operator's step cost for this router; it goes before that of the table.
    """

    def __init__(self, given: StepCost | None = None) -> None:
        self._given = given
        self.cost = given
        """Of a step of an instance of speed 1.0; None: nothing is predicted."""
        self._externality = EXTERNALITY
        self._choice: Choice = "finish-time"
        self.mean_output = FIRST_MEAN_OUTPUT
        """Tokens of an answer, a running mean over streams."""

    def follow(self, table: RoutingTable) -> None:
        """Takes the step cost of a table that comes into force."""
        told = table.prediction
        if self._given is None:
            self.cost = told.step_cost if told is not None else None
            self._choice = told.choice if told is not None else "finish-time"
            # Values of another device may be wrong about what a batch costs, and requests of an adapter would then
            # pile up on one of its holders while another is idle: unmeasured, one's own finish time alone decides.
            self._externality = EXTERNALITY if told is None or told.measured else 0.0

    def work(self, target: Target, body_bytes: int, max_tokens: int | None, streams: bool) -> Work | None:
        """The prediction's view of a new request; None while nothing is predicted."""
        if self.cost is None:
            return None
        return Work(target, body_bytes, max_tokens, self.mean_output, streams)

    def saw_output(self, tokens: int) -> None:
        """A stream of so many events has ended."""
        self.mean_output += 0.02 * (tokens - self.mean_output)

    def choose(self, work: Work, usable: Mapping[str, Upstream], affinity: str | None = None) -> str | None:
        """The instance for `work` among `usable` (those with a free place); None when there is none, or no step cost.

        `affinity`: the session's key; its instance is favoured by what its prefix cache saves. Sets `work.wait_s`.
        """
        if (cost := self.cost) is None:
            return None
        routes, rank = work.target.routes, work.target.rank
        candidates = {name: phi for name, phi in routes.items() if name in usable}
        if candidates and self._choice == "finish-time":
            spilled = spill_candidates(
                [u for n, u in usable.items() if n not in candidates],
                in_use=lambda u: work.target.name in u.ledger.adapters,
                room=lambda u: u.entry.capacity.rank_rows - u.ledger.rows,
                load=lambda u: (u.load(),),
            )
            candidates |= {u.name: 0.0 for u in spilled}
        candidates = candidates or dict.fromkeys(usable, 1.0)
        if not candidates:
            return None
        own = None if affinity is None else rendezvous_weighted(affinity, candidates)
        if len(candidates) > MOST_CANDIDATES:
            least = heapq.nsmallest(MOST_CANDIDATES, candidates, key=lambda name: (usable[name].load(), name))
            candidates = {name: candidates[name] for name in (*least, *filter(None, (own,)))}
        views = {name: self._view(usable[name], phi, work) for name, phi in candidates.items()}
        if len(views) == 1:
            (chosen,) = views
        elif self._choice == "least-added-cost":
            chosen = choose_least_added_cost(views.values(), cost, work.prompt, work.output, rank)
        else:
            gain = AFFINITY_SHARE * work.prompt * cost.prefill_token
            chosen = choose_finish_time(
                views.values(),
                cost,
                work.prompt,
                work.output,
                rank,
                work.rank_rows,
                own=own,
                affinity_gain_s=gain,
                externality=self._externality,
            )
        work.wait_s, _ = predict_wait(views[chosen], cost, work.prompt, work.output, rank)
        return chosen

    def _view(self, upstream: Upstream, phi: float, work: Work) -> ServerView:
        ledger, entry = upstream.ledger, upstream.entry
        view = ServerView(entry.name)
        view.phi = phi
        # The base model needs no room in the arena.
        view.demanded = not work.target.rank or work.target.name in ledger.adapters
        view.blocked = ledger.blocked(work.target.name)
        view.ready_s = 0.0 if view.demanded else _fetch_s(upstream, work.target)
        # What other routers have sent: reported, and not ours. It counts as decoding requests of our mean size.
        foreign = max(0, entry.load.running + entry.load.waiting - upstream.in_flight)
        mean = ledger.context / ledger.running if ledger.running else work.prompt
        view.queued = ledger.queued
        view.queued_tokens = ledger.prompts
        view.queued_token_ranks = ledger.prompt_ranks
        view.running = ledger.running + foreign
        view.decode_rank_sum = ledger.decode_ranks
        view.context_tokens = ledger.context + foreign * mean
        view.distinct = len(ledger.adapters)
        view.distinct_rows = ledger.rows
        view.rows_demanded = ledger.rows
        capacity = entry.capacity
        if capacity.rank_rows:
            view.arena_rows = capacity.rank_rows
        if capacity.kv_tokens:
            view.kv_free = capacity.kv_tokens * (1.0 - entry.load.kv_usage)
            view.kv_queued = ledger.prompts
        if capacity.max_batched_tokens:
            view.max_batched_tokens = capacity.max_batched_tokens
        if capacity.max_seqs:
            view.seats_free = max(0, capacity.max_seqs - view.running)
        view.speed = max(entry.speed, SLOWEST)
        return view


def _fetch_s(upstream: Upstream, target: Target) -> float:
    """Seconds until the adapter could run there: 0 when it is in the arena or the host tier, else the fetch."""
    if any(held.name == target.name for held in upstream.entry.resident):
        return 0.0
    return FETCH_LATENCY_S + target.size_bytes / FETCH_BYTES_S
