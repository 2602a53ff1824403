"""What `vllm-loraserve top` draws."""

from __future__ import annotations

import argparse
import io

from coordinator_bench import PATIENCE_S, FakeInstance, free_endpoint, write_adapter
from rich.console import Console
from rich.text import Text

from vllm_loraserve.coordinator import top
from vllm_loraserve.coordinator.messages import AddAdapter


def options(endpoint: str, **changes: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    top.add_arguments(parser)
    args = parser.parse_args(["--coordinator", endpoint, "--every", "0.1"])
    return argparse.Namespace(**{**vars(args), **changes})


def screen(height: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160, height=height)


def drawn(console: Console) -> list[str]:
    text = Text.from_ansi(console.file.getvalue()).plain  # type: ignore[attr-defined]
    return [" ".join(line.split()) for line in text.splitlines()]


async def test_the_busiest_adapters_come_first_and_the_rest_is_counted(running, tmp_path):
    server, client = running
    instance = FakeInstance("one")
    await client.request(instance.hello())
    names = [f"a{i}" for i in range(30)]
    for name in names:
        write_adapter(tmp_path / "adapters" / name, rank=8)
        await client.request(AddAdapter(name=name, source=name))
    instance.rates = {"a29": 50.0, "a17": 90.0}
    await client.request(instance.beat())
    console = screen(height=20)
    await top.watch(options(server.options.bind, timeout=PATIENCE_S), console, looks=1)
    lines = drawn(console)
    shown = [line.split()[0] for line in lines if line[:1] == "a" and line.split()[0] in names]
    assert shown[:2] == ["a17", "a29"]
    assert 2 < len(shown) < 15
    assert any(f"and {30 - len(shown)} that are asked for less" in line for line in lines)
    assert any(line.startswith("(base model)") for line in lines)


async def test_a_silent_coordinator_leaves_a_line():
    console = screen(height=40)
    await top.watch(options(free_endpoint(), timeout=0.2), console, looks=2)
    assert sum("did not answer" in line for line in drawn(console)) >= 1


def test_without_a_terminal_it_names_status(capsys):
    assert top.run(options("tcp://127.0.0.1:1")) == 1
    assert "vllm-loraserve status" in capsys.readouterr().err
