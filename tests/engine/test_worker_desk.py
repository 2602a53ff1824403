"""The agent's questions to workers over their desks: real sockets, managers that only hold books."""

import asyncio
import itertools
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm_loraserve.engine import worker_desk  # noqa: E402
from vllm_loraserve.engine.worker_desk import WorkerDesk, Workers  # noqa: E402

NUMBERS = itertools.count()


def vllm_config(workers=2, engines=1, machines=1):
    parallel = SimpleNamespace(world_size=workers, data_parallel_size=engines, data_parallel_index=0, nnodes=machines)
    return SimpleNamespace(parallel_config=parallel, instance_id=f"desk{next(NUMBERS)}")


class Manager:
    """What the questions look at."""

    def __init__(self, active, listed):
        self._adapter_manager = SimpleNamespace(_active_adapters=dict.fromkeys(active))
        self.listed = set(listed)
        self.load_errors = {9: "no such file"}
        self.located = []
        self.loader = SimpleNamespace(registered=SimpleNamespace(expect=lambda *row: self.located.append(row)))
        self.gate = threading.Event()
        self.gate.set()

    def list_adapters(self):
        self.gate.wait(30)
        return self.listed


class Engine:
    """Fails where it is asked."""

    async def collective_rpc(self, method, args=()):
        raise AssertionError("asked through the engine")


class AskedEngine:
    """Answers, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    async def collective_rpc(self, method, args=()):
        self.asked.append((method, args))
        return ["through the engine"]


@pytest.fixture
def managers():
    return [Manager([1], [1, 2]), Manager([1, 2], [1, 2, 3])]


@pytest.fixture
def workers(managers):
    config = vllm_config()
    for address, manager in zip(worker_desk.addresses(config), managers, strict=True):
        WorkerDesk(address, manager)
    workers = Workers(Engine(), config)
    yield workers
    workers.close()


async def test_every_worker_answers_by_rank(workers):
    answers = await workers.ask("loraserve_residency")
    assert [(a[0], a[1]) for a in answers] == [([1], [2]), ([1, 2], [3])]
    assert answers[0][2] == {9: "no such file"}


async def test_arguments_arrive(workers, managers):
    await workers.ask("loraserve_locate", [("a", "/a", "digest", [("peer", "host:1")])])
    assert [m.located for m in managers] == [[("a", "/a", "digest")]] * 2


async def test_only_questions_are_answered_and_errors_come_back(workers, managers):
    with pytest.raises(RuntimeError, match="no question called '__init__'"):
        await workers.ask("__init__")
    del managers[1].listed
    with pytest.raises(RuntimeError, match="AttributeError"):
        await workers.ask("loraserve_residency")
    assert await workers.ask("loraserve_transfer_endpoint") == ["", ""], "the desks go on"


async def test_answer_of_a_question_that_was_given_up_is_not_taken_for_the_next_ones(workers, managers):
    managers[0].gate.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await workers.ask("loraserve_residency")
    managers[0].gate.set()
    assert await workers.ask("loraserve_transfer_endpoint") == ["", ""]


async def test_worker_that_answers_no_more_is_noticed(workers, managers, monkeypatch):
    await workers.ask("loraserve_residency")
    monkeypatch.setattr(worker_desk, "ANSWER_S", 0.2)
    managers[1].gate.clear()
    with pytest.raises(TimeoutError):
        await workers.ask("loraserve_residency")
    managers[1].gate.set()


async def test_workers_that_never_answered_are_asked_through_the_engine(monkeypatch):
    monkeypatch.setattr(worker_desk, "ANSWER_S", 0.2)
    workers = Workers(AskedEngine(), vllm_config(workers=1))
    assert workers.beside_the_engine
    for _ in range(2):
        assert await workers.ask("loraserve_transfer_endpoint") == ["through the engine"]
    assert not workers.beside_the_engine


async def test_what_changes_while_it_is_looked_at_is_looked_at_again(workers, managers):
    looks = []

    def list_adapters():
        looks.append(None)
        if len(looks) < 3:
            raise RuntimeError("dictionary changed size during iteration")
        return {1}

    managers[0].list_adapters = list_adapters
    assert (await workers.ask("loraserve_residency"))[0][:2] == [[1], []]


@pytest.mark.parametrize("where", [{"machines": 2}, {"engines": 2}])
async def test_engines_without_desks_are_asked_by_collective_rpc(where):
    engine = AskedEngine()
    workers = Workers(engine, vllm_config(**where))
    assert not workers.beside_the_engine
    assert await workers.ask("loraserve_transfer_endpoint", 1) == ["through the engine"]
    assert engine.asked == [("loraserve_transfer_endpoint", (1,))]
