"""The Grafana board and the alerts ask for what the parts of a real cluster have on their `/metrics`."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
import yaml
from world import World, exposition

from vllm_loraserve.cluster.placement import make_policy
from vllm_loraserve.coordinator.control import Controller, ControlOptions
from vllm_loraserve.coordinator.metrics import serve_metrics
from vllm_loraserve.coordinator.registry import Registry

DOCS = Path(__file__).parents[2] / "docs"
NAME = re.compile(r"\b(?:loraserve|vllm)[:_][a-z0-9_:]+")
TYPE = re.compile(r"^# TYPE (\S+) (\w+)$", re.MULTILINE)


def _expressions() -> Iterator[tuple[str, str]]:
    """(panel or alert, PromQL)."""
    board = json.loads((DOCS / "grafana-dashboard.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")
    for group in yaml.safe_load((DOCS / "prometheus-alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


EXPRESSIONS = list(_expressions())


def series(url: str) -> set[str]:
    """What a scrape has, or will have once there is something to count."""
    found = set()
    for name, kind in TYPE.findall(exposition(url)):
        found |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return found


@pytest.fixture
def coordinator_names(tmp_path: Path, unused_tcp_port: int) -> Iterator[set[str]]:
    registry = Registry(tmp_path / "registry.sqlite")
    controller = Controller(registry, make_policy("loraserve+"), ControlOptions(), time.monotonic())
    stop = serve_metrics(controller, Counter(), "127.0.0.1", unused_tcp_port)
    try:
        yield series(f"http://127.0.0.1:{unused_tcp_port}")
    finally:
        stop()
        registry.close()


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_every_expression_is_promql(title: str, expression: str) -> None:
    promql_parser.parse(expression)


def test_every_series_is_there(world: World, coordinator_names: set[str]) -> None:
    served = coordinator_names | series(world.cluster.url) | series(world.cluster.instance_url(0))
    asked = {name: title for title, expression in EXPRESSIONS for name in NAME.findall(expression)}
    assert len(asked) > 25
    assert {name: title for name, title in asked.items() if name not in served} == {}
