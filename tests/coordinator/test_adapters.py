"""`vllm-loraserve adapters` against a running coordinator."""

import asyncio
import json
import shutil

import pytest
from coordinator_bench import PATIENCE_S, write_adapter

from vllm_loraserve import cli


@pytest.fixture
def adapters(running, tmp_path, capsys):
    """await adapters(words...) -> (exit status, lines on stdout, lines on stderr) of the command."""
    server, _ = running
    (tmp_path / "adapters").mkdir(exist_ok=True)

    async def run(action, *words):
        asked = [
            "adapters",
            action,
            "--coordinator",
            server.options.bind,
            "--timeout",
            str(PATIENCE_S),
            *map(str, words),
        ]
        status = await asyncio.to_thread(cli.main, asked)
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


async def test_one_at_a_time(adapters, tmp_path):
    folder = tmp_path / "adapters"
    write_adapter(folder / "a")
    write_adapter(folder / "b", rank=16, seed=1)
    status, (line,), _ = await adapters("add", "team/x", folder / "a")
    assert status == 0
    assert line.startswith("team/x: added, rank 8, SHA-256 ")
    assert "there already" in (await adapters("add", "team/x", folder / "a"))[1][0]
    status, out, (problem,) = await adapters("add", "team/x", folder / "b")
    assert (status, out) == (1, [])
    assert problem.startswith("vllm-loraserve adapters add: Adapter 'team/x' is registered with other content")
    assert "team/x: added, rank 16" in (await adapters("add", "team/x", folder / "b", "--replace"))[1][0]
    status, (line,), _ = await adapters("list")
    name, rank, state, digest, source = line.split("\t")
    assert (name, rank, state, source) == ("team/x", "16", "active", str(folder / "b"))
    (shown,) = json.loads("\n".join((await adapters("list", "--json"))[1]))
    assert shown["sha256"].startswith(digest)
    assert (await adapters("add", "a name", folder / "a"))[2] == [
        "vllm-loraserve adapters add: 'a name' can't be an adapter's name; take letters, digits, '_', '-', '.' and at "
        "most one '/', up to 160."
    ]
    status, out, (problem,) = await adapters("remove", "nobody", "team/x")
    assert (status, out) == (1, ["team/x: removed"])
    assert problem.startswith("nobody: There is no adapter")
    assert (await adapters("list"))[1] == []


async def test_a_directory_is_kept_in_step(adapters, tmp_path):
    folder = tmp_path / "adapters"
    write_adapter(folder / "a")
    write_adapter(folder / "team" / "b", seed=1)
    write_adapter(folder / "c", seed=2)
    (folder / "notes").mkdir()
    write_adapter(folder / ".versions" / "a-1", seed=9)
    other = tmp_path / "adapters-elsewhere"
    status, out, _ = await adapters("sync", folder, "--dry-run")
    assert (status, sorted(out)) == (0, ["a: new", "c: new", "team/b: new"])
    assert (await adapters("list"))[1] == []
    status, out, _ = await adapters("sync", folder)
    assert (status, out[-1]) == (0, "3 added")
    assert (await adapters("sync", folder))[1] == ["3 unchanged"]

    shutil.rmtree(folder / "a")
    write_adapter(folder / "c", rank=32, seed=3)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    status, out, problems = await adapters("sync", folder)
    assert status == 1
    assert out == ["c: replaced, rank 32", "1 gone, kept, 1 refused, 1 replaced, 1 unchanged"]
    assert [line.split(":")[0] for line in problems] == ["broken"]

    shutil.rmtree(folder / "broken")
    status, out, _ = await adapters("sync", folder, "--prune")
    assert (status, out) == (0, ["a: removed", "1 removed, 2 unchanged"])
    assert sorted(line.split("\t")[0] for line in (await adapters("list"))[1]) == ["c", "team/b"]

    write_adapter(folder / ".profile-x" / "r8", seed=10)
    await adapters("add", "measured", folder / ".profile-x" / "r8")
    assert (await adapters("sync", folder, "--prune"))[1] == ["2 unchanged"], "what `profile` makes it removes"
    await adapters("remove", "measured")
    (folder / "linked").symlink_to(folder / ".versions" / "a-1")
    assert (await adapters("sync", folder))[1] == ["linked: added, rank 8", "1 added, 2 unchanged"]
    (folder / "linked").unlink()
    assert (await adapters("sync", folder, "--prune"))[1] == ["linked: removed", "1 removed, 2 unchanged"]

    # A mount that is not there looks like an empty directory.
    shutil.move(folder, other)
    folder.mkdir()
    status, _, (problem,) = await adapters("sync", folder, "--prune")
    assert status == 1
    assert "2 were registered from there; is it mounted?" in problem
    assert len((await adapters("list"))[1]) == 2
    assert "is no directory" in (await adapters("sync", tmp_path / "nowhere"))[2][0]


def test_a_coordinator_that_is_not_there_is_one_line(capsys, tmp_path):
    write_adapter(tmp_path / "a")
    for words in (["list"], ["sync", str(tmp_path)]):
        assert cli.main(["adapters", *words, "--coordinator", f"ipc://{tmp_path}/c", "--timeout", "0.2"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"vllm-loraserve adapters {words[0]}: The coordinator at ")
