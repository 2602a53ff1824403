"""Our own loggers in a process whose logging is vLLM's."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from vllm_loraserve.engine import logs


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """What vLLM's handler is given; nobody else has one."""
    handler, ours, theirs = Lines(), logging.getLogger("vllm_loraserve"), logging.getLogger("vllm")
    for logger, handlers in ((logging.getLogger(), []), (ours, []), (theirs, [handler])):
        monkeypatch.setattr(logger, "handlers", handlers)
    levels = ours.level, theirs.level
    theirs.setLevel(logging.INFO)
    yield handler
    ours.setLevel(levels[0])
    theirs.setLevel(levels[1])


def test_the_choice_of_a_way_is_seen_where_vllm_s_own_lines_are(vllm: Lines) -> None:
    chosen = logging.getLogger("vllm_loraserve.transfer.peer")
    logging.getLogger().handlers.clear()  # pytest's own
    chosen.info("before")
    logs.show()
    logs.show()
    chosen.info("is read by memfd")
    chosen.debug("not this")
    assert vllm.lines == ["is read by memfd"]


def test_who_has_configured_logging_is_left_alone(vllm: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [Lines()])
    logs.show()
    assert logging.getLogger("vllm_loraserve").handlers == []
