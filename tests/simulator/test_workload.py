"""Workloads and trace files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_loraserve.simulator.catalog import PAPER_SIX, CatalogError, generator
from vllm_loraserve.simulator.machine import H100
from vllm_loraserve.simulator.traces import TraceError, read_trace
from vllm_loraserve.simulator.workload import churn, power_law, rank_popularity, replay, synthetic_trace

TRACE = synthetic_trace(2000)
AZURE = Path(__file__).parents[3] / "shared" / "data" / "azure-llm-2023-conv.csv"


@pytest.mark.parametrize("name", [*PAPER_SIX, "replay-50", "zipf-100", "burst-100", "churn-1000"])
def test_generators_give_the_rate_and_are_deterministic(name: str) -> None:
    make = generator(name, H100, TRACE, 50.0)
    a, b, other = make(10.0, 1), make(10.0, 1), make(10.0, 2)
    assert a.rate == pytest.approx(10.0, rel=0.03)
    assert (np.diff(a.arrival) >= 0).all()
    assert a.adapter.min() >= 0
    assert a.adapter.max() < len(a.adapters)
    assert np.array_equal(a.arrival, b.arrival)
    assert np.array_equal(a.adapter, b.adapter)
    assert not np.array_equal(a.adapter[:400], other.adapter[:400])


@pytest.mark.parametrize("name", ["poisson-uniform", "uniform-exponential", "replay-50", "zipf-100", "burst-100"])
def test_a_higher_rate_is_the_same_requests_and_more(name: str) -> None:
    make = generator(name, H100, TRACE, 50.0)
    slow, fast = make(10.0, 3), make(17.0, 3)
    n = len(slow.prompt)
    assert len(fast.prompt) > n
    assert np.array_equal(slow.prompt, fast.prompt[:n])
    assert np.array_equal(slow.output, fast.output[:n])
    if name.startswith(("poisson", "uniform", "zipf")):  # in the others popularity depends on the place in the run
        assert np.array_equal(slow.adapter, fast.adapter[:n])


def test_a_trace_goes_on_from_its_beginning() -> None:
    n = len(TRACE.arrival)
    part = TRACE.around(n - 3, n + 5)
    assert len(part.arrival) == n + 5
    assert part.arrival[0] == 0.0
    assert (np.diff(part.arrival) >= 0.0).all()
    assert part.prompt[:4].tolist() == [*TRACE.prompt[-3:], TRACE.prompt[0]]
    assert np.allclose(np.diff(part.arrival[3 : n + 3]), np.diff(TRACE.arrival))


def test_rank_popularity_shapes() -> None:
    progress = np.linspace(0, 0.999, 1000)
    for kind in ("uniform", "shifting-skew", "exponential"):
        assert np.allclose(rank_popularity(kind, progress, 5).sum(axis=1), 1.0)
    skew = rank_popularity("shifting-skew", progress, 5)
    assert skew[0].argmax() == 4
    assert skew[500].argmax() == 0
    assert skew[-1].argmax() == 4
    assert rank_popularity("exponential", progress, 5)[0, 0] == pytest.approx(16 / 31)
    with pytest.raises(ValueError, match="known: uniform"):
        rank_popularity("odd", progress, 5)


def test_power_law_and_churn() -> None:
    assert power_law(10)[0] == pytest.approx(10 * power_law(10)[9])
    w = churn(H100, 200, 20.0, 100.0, 0, TRACE)
    n = len(w.adapter)
    first, last = set(w.adapter[: n // 10].tolist()), set(w.adapter[-n // 10 :].tolist())
    assert not first & last


def test_replay_keeps_lengths_and_burstiness() -> None:
    w = replay(H100, TRACE, 40.0, 100, 0)
    assert np.array_equal(w.prompt, TRACE.prompt)
    gaps, before = np.diff(w.arrival), np.diff(TRACE.arrival)
    assert np.allclose(gaps / gaps.mean(), before / before.mean())
    assert len({a.name for a in w.adapters}) == 100


def test_azure_format(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    trace = read_trace(file)
    assert trace.prompt.tolist() == [374, 396]
    assert trace.arrival[1] == pytest.approx(4.314579, abs=1e-6)


def test_mooncake_and_servegen_formats(tmp_path: Path) -> None:
    moon = tmp_path / "m.jsonl"
    moon.write_text(
        '{"timestamp": 2500, "input_length": 7, "output_length": 3, "hash_ids": [1]}\n'
        '{"timestamp": 500, "input_length": 9, "output_length": 4, "hash_ids": [2]}\n'
    )
    trace = read_trace(moon)
    assert trace.prompt.tolist() == [9, 7]
    assert trace.arrival.tolist() == [0.0, 2.0]
    gen = tmp_path / "s.jsonl"
    gen.write_text(
        '{"timestamp": 1.5, "client_id": 4, "data": {"input_tokens": 10, "output_tokens": 5}}\n'
        '{"timestamp": 2.0, "client_id": 9, "data": {"input_tokens": 20, "output_tokens": 6}}\n'
    )
    trace = read_trace(gen)
    assert trace.adapters == ("4", "9")
    workload = generator("replay-named", H100, trace, 10.0)(2.0, 0)
    assert [a.name for a in workload.adapters] == ["4", "9"]


def test_trace_errors_name_file_line_and_fix(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no file"):
        read_trace(tmp_path / "absent.csv")
    bad = tmp_path / "bad.csv"
    bad.write_text("when,what\n1,2\n")
    with pytest.raises(TraceError, match="it needs a time, an input and an output column"):
        read_trace(bad)
    bad.write_text("time,input,output\n1,2,3\n2,x,3\n")
    with pytest.raises(TraceError, match="line 3"):
        read_trace(bad)
    line = tmp_path / "bad.jsonl"
    line.write_text('{"timestamp": 1}\n')
    with pytest.raises(TraceError, match="line 1"):
        read_trace(line)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(CatalogError, match="burst-N"):
        generator("burst", H100, TRACE, 10.0)


@pytest.mark.skipif(not AZURE.exists(), reason=f"the Azure 2023 trace is not at {AZURE}")
def test_azure_trace_reads_whole() -> None:
    trace = read_trace(AZURE)
    assert len(trace.arrival) == 19_366
    assert 1100 < trace.prompt.mean() < 1200
    assert 3400 < trace.arrival[-1] < 3600
