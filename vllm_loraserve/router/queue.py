"""Admission: how many requests run on each instance, how many may wait, and when to tell a client to come back.

A request takes a place on an instance: one of its adapter's by phi and live load (`cluster.routing.choose`), else, when
those are full or failing, any live one that can take its rank (its resolver loads the adapter). With every instance
full it waits in one first-come queue of bounded length; a place that comes free goes to the head of the queue. Nobody
overtakes, but past a request that can't use the place: its instance has failed that request, or is too small. A full
queue is an ApiError 429 whose Retry-After comes from the rate at which requests have been finishing. With a step cost,
the table's or the operator's, the instance is chosen by predicted finish time instead (`prediction`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Collection

from vllm_loraserve.cluster.routing import choose
from vllm_loraserve.router.directory import NO_INSTANCE_RETRY_S, Directory, Target
from vllm_loraserve.router.errors import overloaded, unavailable
from vllm_loraserve.router.ledger import Work
from vllm_loraserve.router.prediction import Predictor
from vllm_loraserve.router.upstream import Upstream

LONGEST_RETRY_S = 60.0


class DrainRate:
    """Requests finished per second, over the last one to two windows of `window_s`."""

    def __init__(self, clock: Callable[[], float], window_s: float = 5.0) -> None:
        self._clock = clock
        self._window = window_s
        self._start = clock()
        self._count = 0
        self._previous = 0

    def add(self) -> None:
        """One request finished."""
        self._roll()
        self._count += 1

    def per_s(self) -> float:
        """The rate now; 0 when nothing has finished lately."""
        elapsed = self._roll()
        return (self._previous + self._count) / (self._window + elapsed if self._previous else max(elapsed, 1.0))

    def _roll(self) -> float:
        elapsed = self._clock() - self._start
        if elapsed >= self._window:
            self._previous = self._count if elapsed < 2 * self._window else 0
            self._count = 0
            self._start += elapsed - elapsed % self._window
            elapsed %= self._window
        return elapsed


class _Waiter:
    """What is asked for, and the future place of a request that waits."""

    __slots__ = ("affinity", "exclude", "place", "target", "work")

    def __init__(self, target: Target, exclude: Collection[str], affinity: str | None, work: Work | None) -> None:
        self.target = target
        self.exclude = exclude
        self.affinity = affinity
        self.work = work
        self.place: asyncio.Future[Upstream] = asyncio.get_running_loop().create_future()


class Admission:
    """Hands out places on instances. Every `acquire` that returns is paired with one `release`."""

    def __init__(
        self,
        directory: Directory,
        *,
        max_concurrency: int = 256,
        max_queue: int = 1024,
        queue_timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        self.directory = directory
        self.predictor = predictor if predictor is not None else Predictor()
        self.max_concurrency = max_concurrency
        self.max_queue = max_queue
        self.queue_timeout_s = queue_timeout_s
        self.drain = DrainRate(clock)
        self._clock = clock
        self._rng = rng or random.Random()
        self._queue: deque[_Waiter] = deque()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Requests that hold a place on an instance of the table."""
        return sum(upstream.in_flight for upstream in self.directory.live())

    async def acquire(
        self,
        target: Target,
        exclude: Collection[str] = (),
        affinity: str | None = None,
        again: bool = False,
        work: Work | None = None,
    ) -> Upstream:
        """A place for one request (`work`: its size, where times are predicted), waiting when there is none free.

        `exclude`: instances that failed this request; they are taken only when no other is left. `again`: a retry of
        an admitted request goes to the head of the queue and is never refused by its length. Raises ApiError 429
        (queue full, or waited `queue_timeout_s`) or 503 (no live instance); cancelling gives up the wait.
        """
        if not self._queue or again:
            upstream = self._take(target, exclude, affinity, work)
            if upstream is not None:
                return upstream
        if not self.directory.upstreams:
            raise unavailable("No instance is alive; try again shortly.", NO_INSTANCE_RETRY_S)
        if not again and len(self._queue) >= self.max_queue:
            raise overloaded(
                f"All instances are busy and {len(self._queue)} requests wait; try again later.", self.retry_after_s()
            )
        waiter = _Waiter(target, exclude, affinity, work)
        place = waiter.place
        (self._queue.appendleft if again else self._queue.append)(waiter)
        self.grant()  # all that wait before it may be held up by what is no hindrance to it
        try:
            async with asyncio.timeout(self.queue_timeout_s):
                return await place
        except (TimeoutError, asyncio.CancelledError) as error:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.release(place.result(), work)  # granted in the very moment of giving up
            else:
                self._forget(waiter)
            if isinstance(error, TimeoutError):
                raise overloaded(
                    f"Waited {self.queue_timeout_s:g} s for a free instance; try again later.", self.retry_after_s()
                ) from None
            raise

    def release(self, upstream: Upstream, work: Work | None = None) -> None:
        """Gives a place back; the head of the queue gets it."""
        upstream.finished()
        if work is not None:
            work.done()
        self.drain.add()
        if self._queue:
            self.grant()

    def grant(self) -> None:
        """Serves the queue while there are places; also called when the table changes."""
        held: list[_Waiter] = []
        while self._queue:
            waiter = self._queue.popleft()
            if waiter.place.done():  # given up; its task has not run yet to leave the queue
                continue
            if not self.directory.upstreams:
                waiter.place.set_exception(unavailable("No instance is alive; try again shortly.", NO_INSTANCE_RETRY_S))
                continue
            upstream = self._take(waiter.target, waiter.exclude, waiter.affinity, waiter.work)
            if upstream is not None:
                waiter.place.set_result(upstream)
                continue
            held.append(waiter)
            if not waiter.exclude and waiter.target.rank <= self.directory.smallest_max_rank:
                break  # it could go anywhere: there is no place for those behind it either
        self._queue.extendleft(reversed(held))

    def retry_after_s(self) -> float:
        """When the queue of now will have drained, at the rate of the last seconds."""
        rate = self.drain.per_s()
        return min(LONGEST_RETRY_S, (len(self._queue) + 1) / rate) if rate > 0 else LONGEST_RETRY_S

    def _forget(self, waiter: _Waiter) -> None:
        with contextlib.suppress(ValueError):
            self._queue.remove(waiter)

    def _take(
        self, target: Target, exclude: Collection[str], affinity: str | None, work: Work | None
    ) -> Upstream | None:
        """`_pick`, and the place is taken."""
        upstream = self._pick(target, exclude, affinity, work)
        if upstream is not None:
            upstream.started()
            if work is not None:
                work.sent(upstream.ledger)
                if not work.streams:  # nothing will show its first token: it comes when it is predicted to
                    asyncio.get_running_loop().call_later(work.wait_s, work.first_token)
        return upstream

    def _pick(
        self, target: Target, exclude: Collection[str], affinity: str | None, work: Work | None
    ) -> Upstream | None:
        """An instance with a free place, or None when all are full.

        Held back as long as another can serve: those that failed this request, and those with an open breaker.
        """
        now = self._clock()
        limit = self.max_concurrency
        known = self.directory.upstreams
        if target.rank > self.directory.smallest_max_rank:
            able = {name: u for name, u in known.items() if u.entry.capacity.max_rank >= target.rank}
            known = able or known  # none: any one of them says what is wrong better than we can
        if work is not None:
            free = {
                name: u for name, u in known.items() if u.in_flight < limit and name not in exclude and u.available(now)
            }
            predicted = self.predictor.choose(work, free, affinity)
            if predicted is not None:
                return known[predicted]
        routes = {
            name: phi
            for name, phi in target.routes.items()
            if (u := known.get(name)) and u.in_flight < limit and name not in exclude and u.available(now)
        }
        if not routes:
            usable = [u for n, u in known.items() if n not in exclude and u.available(now)]
            if not usable:
                usable = [u for n, u in known.items() if n not in exclude] or list(known.values())
            routes = {u.entry.name: 1.0 for u in usable if u.in_flight < limit}
        if not routes:
            return None
        if len(routes) == 1:
            (name,) = routes
        else:
            loads = {name: known[name].load() for name in routes}
            name = choose(routes, loads, self._rng, affinity) or next(iter(routes))
        return known[name]
