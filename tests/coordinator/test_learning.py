"""Speeds learned from queues: an instance at its limit shows what it sustains."""

import pytest

from vllm_loraserve.cluster.operating_points import OperatingPoints
from vllm_loraserve.coordinator.learning import SpeedLearner, work_of
from vllm_loraserve.coordinator.messages import AdapterDemand, Load

OP = OperatingPoints(points={1: 1000.0, 8: 800.0, 64: 400.0})


def watch(learner: SpeedLearner, name: str, work: float, waiting: int, seconds: float, start: float = 0.0) -> float:
    now = start
    while now < start + seconds:
        learner.observe(name, "gpu/1", work, Load(running=4, waiting=waiting), now)
        now += 1.0
    return now


def test_work_weighs_tokens_by_rank():
    demand = {n: AdapterDemand(name=n, tokens_per_s=200.0) for n in ("", "a", "b")}
    assert work_of(demand, {"a": 8, "b": 64}, OP) == pytest.approx(0.2 + 0.25 + 0.5)


def test_only_a_lasting_queue_teaches():
    learner = SpeedLearner()
    watch(learner, "one", 0.4, waiting=0, seconds=60)
    assert learner.speed("one") == 1.0
    watch(learner, "one", 0.4, waiting=3, seconds=9, start=60)
    assert learner.speed("one") == 1.0
    watch(learner, "one", 0.4, waiting=3, seconds=3, start=69)
    assert learner.speed("one") == pytest.approx(0.4)
    assert learner.live_load()["one"] == pytest.approx(1.75), "the queue counts on top"


def test_instances_of_a_kind_share_it_and_one_that_does_more_corrects_it():
    learner = SpeedLearner()
    watch(learner, "one", 0.01, waiting=1, seconds=20)
    learner.observe("two", "gpu/1", 0.0, Load(), 20.0)
    learner.observe("other", "cpu/1", 0.0, Load(), 20.0)
    assert learner.speed("two") == pytest.approx(0.01), "or everything would go to the instance that was never busy"
    assert learner.speed("other") == 1.0
    learner.observe("one", "gpu/1", 0.05, Load(), 30.0)
    assert learner.speed("one") == pytest.approx(0.05)
    (warning,) = learner.warnings()
    assert "'one' sustains 0.05" in warning
    learner.forget("one")
    assert learner.learned() == {}
    assert learner.speed("two") == 1.0


def test_a_single_odd_observation_does_not_take_over():
    learner = SpeedLearner()
    now = watch(learner, "one", 1.0, waiting=1, seconds=60)
    watch(learner, "one", 0.1, waiting=1, seconds=6, start=now)
    assert learner.speed("one") == pytest.approx(0.7 + 0.03)
    assert not learner.warnings()
