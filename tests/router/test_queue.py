"""Places, the waiting room, and Retry-After; no server, a clock of the test's own."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import msgspec
import pytest

from vllm_loraserve.cluster.operating_points import StepCost
from vllm_loraserve.coordinator.messages import Capacity, Load
from vllm_loraserve.router.directory import Directory, Target
from vllm_loraserve.router.errors import ApiError
from vllm_loraserve.router.prediction import Predictor
from vllm_loraserve.router.queue import Admission, DrainRate

from .conftest import entry, table

BASE = Target("base", {}, 0)
COST = StepCost(base=0.01, prefill_token=1e-4, prefill_token_rank=1e-6, decode_token=1e-3, rank_row=1e-5, adapter=1e-4)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def admission(instances: int = 1, **options: object) -> tuple[Admission, Clock]:
    clock = Clock()
    directory = Directory(clock)
    directory.apply(table([entry("abcdefgh"[i], f"http://x:{i}") for i in range(instances)]))
    options = {"max_concurrency": 1, "max_queue": 2, "rng": random.Random(1)} | options
    made = Admission(directory, clock=clock, **options)  # type: ignore[arg-type]
    directory.on_change = made.grant
    return made, clock


def idle(made: Admission) -> bool:
    return made.waiting == 0 and made.in_flight == 0


async def test_queue_is_first_come_first_served_and_bounded() -> None:
    made, _ = admission()
    first = await made.acquire(BASE)
    order: list[int] = []

    async def request(number: int) -> None:
        upstream = await made.acquire(BASE)
        order.append(number)
        made.release(upstream)

    waiting = [asyncio.ensure_future(request(n)) for n in range(2)]
    await asyncio.sleep(0)
    assert made.waiting == 2
    with pytest.raises(ApiError) as refused:
        await made.acquire(BASE)
    assert refused.value.status == 429
    assert refused.value.headers["Retry-After"] == "60"  # nothing has finished yet
    made.release(first)
    await asyncio.gather(*waiting)
    assert order == [0, 1]
    assert idle(made)


async def test_nobody_overtakes_the_queue() -> None:
    made, _ = admission()
    first = await made.acquire(BASE)
    waiting = asyncio.ensure_future(made.acquire(BASE))
    await asyncio.sleep(0)
    made.release(first)  # the place is the waiting request's before its task has run
    late = asyncio.ensure_future(made.acquire(BASE))
    second = await waiting
    assert not late.done()
    made.release(second)
    made.release(await late)
    assert idle(made)


async def test_a_retry_goes_to_the_head_and_is_never_refused() -> None:
    made, _ = admission(max_queue=1)
    first = await made.acquire(BASE)
    patient = asyncio.ensure_future(made.acquire(BASE))
    await asyncio.sleep(0)
    retry = asyncio.ensure_future(made.acquire(BASE, ["b"], again=True))
    await asyncio.sleep(0)
    made.release(first)
    made.release(await retry)
    made.release(await patient)
    assert idle(made)


async def test_who_can_not_use_a_place_keeps_nobody_from_it() -> None:
    made, _ = admission(2)
    on_a, on_b = await made.acquire(Target("on-a", {"a": 1.0}, 8)), await made.acquire(Target("on-b", {"b": 1.0}, 8))
    picky = asyncio.ensure_future(made.acquire(BASE, ["a"], again=True))  # "a" has failed it
    behind = asyncio.ensure_future(made.acquire(BASE))
    await asyncio.sleep(0)
    assert made.waiting == 2
    made.release(on_a)
    second = await behind
    assert second.name == "a"
    made.release(second)
    assert (await made.acquire(BASE)) is second  # also one that comes while only the picky one waits
    assert not picky.done()
    made.release(on_b)
    assert (await picky).name == "b"
    made.release(second)
    made.release(picky.result())
    assert idle(made)


async def test_an_instance_too_small_for_an_adapter_never_gets_its_requests() -> None:
    made, _ = admission(2)
    small = msgspec.structs.replace(entry("a", "http://x:0"), capacity=Capacity(slots=8, rank_rows=64, max_rank=64))
    made.directory.apply(table([small, entry("b", "http://x:1")], version=2))
    large = Target("large", {}, 128)  # no route: anywhere, but not on "a"
    first = await made.acquire(large)
    waiting = asyncio.ensure_future(made.acquire(large))
    await asyncio.sleep(0)
    assert not waiting.done()
    other = await made.acquire(BASE)
    assert (first.name, other.name) == ("b", "a")
    made.release(other)
    assert not waiting.done()
    made.release(first)
    made.release(await waiting)
    assert idle(made)


@pytest.mark.parametrize("granted", [False, True])
async def test_giving_up_leaves_nothing_behind(granted: bool) -> None:
    """`granted`: the place comes in the same moment as the cancellation."""
    made, _ = admission()
    first = await made.acquire(BASE)
    waiting = asyncio.ensure_future(made.acquire(BASE))
    await asyncio.sleep(0)
    if granted:
        made.release(first)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    if not granted:
        assert made.waiting == 0
        made.release(first)
    assert idle(made)


async def test_a_place_is_not_given_to_one_who_is_just_leaving() -> None:
    made, _ = admission()
    first = await made.acquire(BASE)
    leaving, staying = (asyncio.ensure_future(made.acquire(BASE)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()  # cancelled, but its task has not run yet
    made.release(first)
    made.release(await staying)
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert idle(made)


async def test_waiting_ends_after_its_time() -> None:
    made, _ = admission(queue_timeout_s=0.01)
    first = await made.acquire(BASE)
    with pytest.raises(ApiError) as refused:
        await made.acquire(BASE)
    assert refused.value.status == 429
    made.release(first)
    assert idle(made)


async def test_no_instance_is_told_at_once_even_to_those_who_wait() -> None:
    made, _ = admission()
    first = await made.acquire(BASE)
    waiting = asyncio.ensure_future(made.acquire(BASE))
    await asyncio.sleep(0)
    made.directory.apply(table([], version=2))
    for request in (waiting, made.acquire(BASE)):
        with pytest.raises(ApiError) as refused:
            await request
        assert refused.value.status == 503
    made.release(first)
    assert idle(made)


async def test_a_new_instance_serves_the_queue() -> None:
    made, _ = admission()
    await made.acquire(BASE)
    waiting = asyncio.ensure_future(made.acquire(BASE))
    await asyncio.sleep(0)
    made.directory.apply(table([entry("a", "http://x:0"), entry("b", "http://x:1")], version=2))
    assert (await waiting).name == "b"


async def test_fractions_are_followed() -> None:
    made, _ = admission(2, max_concurrency=1000)
    target = Target("one", {"a": 0.75, "b": 0.25}, 8)
    counts: Counter[str] = Counter()
    for _ in range(1000):
        upstream = await made.acquire(target)
        counts[upstream.name] += 1
        made.release(upstream)
    assert counts["a"] == pytest.approx(750, abs=60)


async def test_less_loaded_of_two_is_chosen() -> None:
    made, _ = admission(1, max_concurrency=1000)
    busy, free = entry("a", "http://x:0", load=Load(running=50)), entry("b", "http://x:1")
    made.directory.apply(table([busy, free], version=2))
    assert {(await made.acquire(BASE)).name for _ in range(20)} == {"b"}  # 20 of our own are still fewer than 50
    for _ in range(60):
        await made.acquire(BASE)
    assert made.directory.upstreams["a"].in_flight > 0


async def test_full_holders_spill_to_any_live_instance() -> None:
    made, _ = admission(2)
    target = Target("one", {"a": 1.0}, 8)
    assert (await made.acquire(target)).name == "a"
    assert (await made.acquire(target)).name == "b"


async def test_failed_instances_are_avoided_then_tried_by_one_request() -> None:
    made, clock = admission(2, max_concurrency=10)
    target = Target("one", {"a": 1.0}, 8)
    broken = made.directory.upstreams["a"]
    broken.failed(clock.now)
    assert (await made.acquire(target)).name == "b"
    clock.now += 1.0
    trial = await made.acquire(target)
    assert trial.name == "a"
    assert (await made.acquire(target)).name == "b"  # one trial at a time
    trial.failed(clock.now)
    made.release(trial)
    clock.now += 1.5
    assert (await made.acquire(target)).name == "b"  # the pause has doubled
    clock.now += 0.5
    trial = await made.acquire(target)
    trial.answered(200, clock.now)
    made.release(trial)
    assert {(await made.acquire(target)).name for _ in range(3)} == {"a"}


async def test_excluded_and_broken_are_better_than_nothing() -> None:
    made, clock = admission(2, max_concurrency=10)
    for upstream in made.directory.live():
        upstream.failed(clock.now)
    assert (await made.acquire(BASE, ["a"])).name == "b"
    assert (await made.acquire(BASE, ["a", "b"])).name in "ab"


async def test_a_sound_instance_is_waited_for_rather_than_a_broken_one_used() -> None:
    made, clock = admission(2)
    made.directory.upstreams["a"].failed(clock.now)
    sound = await made.acquire(BASE)
    waiting = asyncio.ensure_future(made.acquire(BASE))
    await asyncio.sleep(0)
    assert not waiting.done()
    made.release(sound)
    assert (await waiting).name == "b"


async def test_retry_after_follows_the_drain_rate() -> None:
    made, clock = admission(max_concurrency=1000)
    for _ in range(100):
        made.release(await made.acquire(BASE))
        clock.now += 0.04  # 25 requests/s for 4 s
    made.max_concurrency = 0
    for _ in range(2):
        asyncio.ensure_future(made.acquire(BASE))  # noqa: RUF006 - they wait to the end of the test
    await asyncio.sleep(0)
    assert made.retry_after_s() == pytest.approx(3 / 25, rel=0.05)


def test_drain_rate_forgets() -> None:
    clock = Clock()
    rate = DrainRate(clock, window_s=5.0)
    assert rate.per_s() == 0.0
    for _ in range(50):
        clock.now += 0.1
        rate.add()
    assert rate.per_s() == pytest.approx(10, rel=0.1)
    clock.now += 4.0
    assert 0 < rate.per_s() < 10
    clock.now += 20.0
    assert rate.per_s() == 0.0


@pytest.mark.parametrize("predictor", [None, Predictor(COST)], ids=["phi", "finish-time"])
async def test_random_lives_of_many_requests_end_at_zero(predictor: Predictor | None) -> None:
    """Requests that succeed, fail, wait, give up and retry in random order never leak a place or pass the cap."""
    rng = random.Random(7)
    made, clock = admission(3, max_concurrency=2, max_queue=5, queue_timeout_s=0.02, predictor=predictor)
    targets = [BASE, Target("one", {"a": 1.0}, 64), Target("two", {"b": 0.5, "c": 0.5}, 8)]
    peak = 0

    async def one() -> None:
        nonlocal peak
        tried: list[str] = []
        target = rng.choice(targets)
        work = None if predictor is None else predictor.work(target, 400, 16, streams=rng.random() < 0.5)
        try:
            for attempt in range(3):
                upstream = await made.acquire(target, tried, again=attempt > 0, work=work)
                peak = max(peak, upstream.in_flight)
                try:
                    await asyncio.sleep(rng.random() * 0.005)
                    if work is not None and rng.random() < 0.5:
                        work.first_token()
                    if rng.random() < 0.7:
                        upstream.answered(200, clock.now)
                        return
                    upstream.failed(clock.now)
                    tried.append(upstream.name)
                finally:
                    made.release(upstream, work)
        except ApiError:
            return

    tasks = []
    for _ in range(300):
        tasks.append(asyncio.ensure_future(one()))
        clock.now += 0.05
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        await asyncio.sleep(rng.random() * 0.002)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert idle(made)
    assert all(upstream.ledger.idle() for upstream in made.directory.live())
    assert peak <= 2
