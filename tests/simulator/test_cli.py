"""`simulate` and `size` from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from vllm_loraserve.cli import main

FAST = ["--rate", "8", "--duration", "20"]


def test_simulate_writes_json_csv_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        [
            "simulate",
            *FAST,
            *("--workload", "poisson-uniform", "--system", "loraserve", "--system", "toppings"),
            *("--json", str(tmp_path / "o.json"), "--csv", str(tmp_path / "o.csv"), "--plots", str(tmp_path / "p")),
            *("--fail", "0:5:10"),
        ]
    )
    assert code == 0
    assert "loraserve" in capsys.readouterr().out
    runs = json.loads((tmp_path / "o.json").read_text())["runs"]
    assert [r["system"] for r in runs] == ["loraserve", "toppings"]
    assert runs[0]["finished"] == runs[0]["requests"] == 160
    with (tmp_path / "o.csv").open() as f:
        assert len(list(csv.DictReader(f))) == 2
    for name in ("poisson-uniform-ttft.png", "poisson-uniform-load.png"):
        assert (tmp_path / "p" / name).read_bytes().startswith(b"\x89PNG")


def test_size_finds_fewer_servers_for_less_load(tmp_path: Path) -> None:
    counts = []
    for rate in ("5", "60"):
        out = tmp_path / f"{rate}.json"
        code = main(
            ["size", "--rate", rate, "--duration", "20", "--slo", "1", "--system", "toppings", "--json", str(out)]
        )
        assert code == 0
        counts.append(json.loads(out.read_text())["needed"][0]["servers"])
    assert counts[0] == 1 < counts[1]


def test_tables_fit_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["simulate", "--rate", "8", "--duration", "5", "--workload", "zipf-1000"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out, "no cell is cut"
    assert max(map(len, out.splitlines())) <= 80
    options = ["--rate", "200", "--duration", "5", "--slo", "0.01", "--most", "2", "--system", "toppings"]
    assert main(["size", *options, "--plots", str(tmp_path)]) == 0
    assert "> 2" in capsys.readouterr().out
    assert (tmp_path / "poisson-shifting-skew-servers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workload", "nonsense"], "unknown workload 'nonsense'"),
        (["--machine", "abacus"], "unknown machine 'abacus'"),
        (["--trace", "/no/such/file.csv"], "no file /no/such/file.csv"),
        (["--points", "/no/such/points.json"], "vllm-loraserve profile"),
        (["--fail", "9:1:2"], "server must be 0..3"),
        (["--rate", "-1"], "--rate -1.0: it must be positive"),
    ],
)
def test_bad_input_is_one_clear_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *FAST, *options]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1
