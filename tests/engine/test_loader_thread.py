"""Where a loader's thread runs."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({"GOMP_CPU_AFFINITY": "0 2 4"}, {0, 2, 4}),
        ({"GOMP_CPU_AFFINITY": "0-3 8"}, {0, 1, 2, 3, 8}),
        ({"OMP_PLACES": "{0,1,5}"}, {0, 1, 5}),
        ({"KMP_AFFINITY": "granularity=fine,explicit,proclist=[3,12]"}, {3, 12}),
        ({"OMP_PLACES": "cores"}, set()),
        ({}, set()),
    ],
)
def test_the_cores_that_openmp_is_bound_to(environment: dict[str, str], cores: set[int]) -> None:
    from vllm_loraserve.engine.loader_thread import step_cores

    assert step_cores(environment) == cores


def test_a_loader_takes_other_cores_and_any_when_there_are_none() -> None:
    from vllm_loraserve.engine.loader_thread import side_cores

    assert side_cores({0, 1, 2, 3}, {0, 1}) == {2, 3}
    assert side_cores({0, 1}, {0, 1}) == {0, 1}


def test_a_thread_of_a_bound_process_leaves_its_core() -> None:
    """In a process made as vLLM makes its workers: spawned, with OpenMP's binding in its environment."""
    import multiprocessing
    import os

    allowed = os.sched_getaffinity(0)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=_worker, args=(answers, min(allowed)))
    worker.start()
    main, loader, niceness = answers.get(timeout=120)
    worker.join(120)
    assert main == {min(allowed)}
    assert loader == (allowed - {min(allowed)} or allowed)
    assert niceness >= 10


def _worker(answers: object, core: int) -> None:
    import os
    import threading

    from vllm_loraserve.engine.loader_thread import step_aside

    os.environ["GOMP_CPU_AFFINITY"] = str(core)
    os.sched_setaffinity(0, {core})

    def load() -> None:
        step_aside()
        here = threading.get_native_id()
        cores, niceness = os.sched_getaffinity(here), os.getpriority(os.PRIO_PROCESS, here)
        answers.put((os.sched_getaffinity(os.getpid()), cores, niceness))  # type: ignore[attr-defined]

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
