"""What `benchmarks/transfer.py` writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "transfer.py"


def test_figures_that_a_run_does_not_measure_stay_with_their_date():
    spec = importlib.util.spec_from_file_location("transfer_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    first = {"date": "monday", "memfd_gib_s": 1.0, "verbs_mib_s": 20.0, "nixl_gib_s": 3.0, "fetch_ttft_ms": 9.0}
    second = benchmark.merged(first, {"date": "tuesday", "memfd_gib_s": 2.0, "nixl_gib_s": 4.0})
    assert second == {
        "date": "tuesday",
        "memfd_gib_s": 2.0,
        "nixl_gib_s": 4.0,
        "verbs_mib_s": 20.0,
        "fetch_ttft_ms": 9.0,
        "dates": {"verbs_mib_s": "monday"},
    }
    third = benchmark.merged(second, {"date": "friday", "memfd_gib_s": 5.0})
    assert third["dates"] == {"verbs_mib_s": "monday", "nixl_gib_s": "tuesday"}
    fourth = benchmark.merged(third, {"date": "sunday", "memfd_gib_s": 1.0, "verbs_mib_s": 1.0})
    assert fourth["dates"] == {"nixl_gib_s": "tuesday"}
