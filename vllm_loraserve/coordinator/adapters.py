"""`vllm-loraserve adapters`: what is registered, and changing it from a shell, one by one or as a directory has it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from vllm_loraserve.coordinator.asking import add_coordinator_arguments, client_of, print_json
from vllm_loraserve.coordinator.client import CoordinatorClient, CoordinatorError, CoordinatorUnavailable
from vllm_loraserve.coordinator.curve import KeysError
from vllm_loraserve.coordinator.messages import (
    AdapterRecord,
    AdapterReply,
    AddAdapter,
    GetTable,
    RemoveAdapter,
    RoutingTable,
)

DEPTHS = ("*", "*/*")
"""Where `sync` looks below its directory: NAME, and TENANT/NAME."""
SCRATCH_PREFIX = ".profile-"
"""Of the directories that `vllm-loraserve profile` makes beside an adapter."""
AT_A_TIME = 4
"""Adapters that `sync` has the coordinator look at."""


class SyncError(RuntimeError):
    """Nothing can be synchronised; one sentence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-loraserve adapters`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text)
        add_coordinator_arguments(sub)
        return sub

    sub = action("list", "print the registered adapters, one a line: name, rank, state, SHA-256, source")
    sub.add_argument("--json", action="store_true", help="print their records as JSON")
    sub = action("add", "register an adapter for all instances")
    sub.add_argument("name", help="the model name of requests, such as summaries or tenant/summaries")
    sub.add_argument("source", help="directory of a PEFT checkpoint, as the coordinator sees it, or a hub id")
    sub.add_argument("--replace", action="store_true", help="take the name over from other content, while it serves")
    sub = action("remove", "unregister adapters, after their running requests")
    sub.add_argument("names", nargs="+", metavar="NAME")
    sub.add_argument("--drain", type=float, default=30.0, metavar="S", help="longest wait for those (%(default)g)")
    sub = action("sync", "register what a directory holds: new adapters are added, changed ones replaced")
    sub.add_argument("directory", type=Path, help="of adapters, named NAME or TENANT/NAME by their subdirectories")
    sub.add_argument("--prune", action="store_true", help="remove those that were registered from there and are gone")
    sub.add_argument("--dry-run", action="store_true", help="say which names are new or gone, and change nothing")


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 when anything that was asked for could not be done."""
    actions: dict[str, Callable[[CoordinatorClient, argparse.Namespace], Any]] = {
        "list": _list,
        "add": _add,
        "remove": _remove,
        "sync": _sync,
    }

    async def act() -> int:
        async with client_of(args) as client:
            return int(await actions[args.action](client, args))

    try:
        return asyncio.run(act())
    except (CoordinatorUnavailable, CoordinatorError, KeysError, SyncError) as error:
        print(f"vllm-loraserve adapters {args.action}: {error}", file=sys.stderr)
        return 1


async def _registered(client: CoordinatorClient) -> dict[str, AdapterRecord]:
    table = await client.ask(GetTable(), RoutingTable)
    return {routes.adapter.name: routes.adapter for routes in table.adapters}


async def _list(client: CoordinatorClient, args: argparse.Namespace) -> int:
    records = (await _registered(client)).values()
    if args.json:
        print_json(list(records))
    else:
        for r in records:
            print(f"{r.name}\t{r.rank}\t{r.state}\t{r.sha256[:12]}\t{r.source}")
    return 0


def _message(name: str, source: str, replace: bool) -> AddAdapter:
    """Raises SyncError for a name that no adapter can have."""
    try:
        return msgspec.convert({"name": name, "source": source, "replace": replace}, AddAdapter)
    except msgspec.ValidationError:
        raise SyncError(
            f"{name!r} can't be an adapter's name; take letters, digits, '_', '-', '.' and at most one '/', up to 160."
        ) from None


async def _add(client: CoordinatorClient, args: argparse.Namespace) -> int:
    source = Path(args.source)
    message = _message(args.name, str(source.resolve()) if source.is_dir() else args.source, args.replace)
    reply = await client.ask(message, AdapterReply)
    done = "added" if reply.created else "there already"
    print(f"{reply.adapter.name}: {done}, rank {reply.adapter.rank}, SHA-256 {reply.adapter.sha256[:12]}")
    return 0


async def _remove(client: CoordinatorClient, args: argparse.Namespace) -> int:
    done: Counter[str] = Counter()
    await _remove_all(client, args.names, args.drain, done)
    return 1 if done["refused"] else 0


async def _remove_all(client: CoordinatorClient, names: Iterable[str], drain_s: float, done: Counter[str]) -> None:
    """Removes one after the other, past those that are refused, and counts both in `done`."""
    for name in names:
        try:
            await client.request(RemoveAdapter(name=name, drain_s=drain_s))
        except CoordinatorError as error:
            done["refused"] += 1
            print(f"{name}: {error}", file=sys.stderr)
        else:
            done["removed"] += 1
            print(f"{name}: removed")


def adapters_below(directory: Path) -> dict[str, Path]:
    """Name -> absolute path of each adapter in `directory` that is not hidden; raises SyncError where that is none."""
    if not directory.is_dir():
        raise SyncError(f"{directory} is no directory.")
    root = directory.resolve()
    found = (path.parent for depth in DEPTHS for path in sorted(root.glob(f"{depth}/adapter_config.json")))
    return {path.relative_to(root).as_posix(): path for path in found if not _is_below(".", path, root)}


def _is_below(prefix: str, path: Path, root: Path) -> bool:
    """Whether a directory between `root` and `path`, or `path`, has a name that begins so."""
    return any(part.startswith(prefix) for part in path.relative_to(root).parts)


async def _sync(client: CoordinatorClient, args: argparse.Namespace) -> int:
    wanted, present = adapters_below(args.directory), await _registered(client)
    root = args.directory.resolve()
    gone = [
        name
        for name, record in present.items()
        if name not in wanted
        and record.state != "draining"
        and (source := Path(record.source)).is_relative_to(root)
        and not _is_below(SCRATCH_PREFIX, source, root)  # `profile` removes what it makes
    ]
    if not wanted and gone and args.prune:
        raise SyncError(
            f"{root} holds no adapter, and {len(gone)} were registered from there; is it mounted? To remove them all, "
            "use `vllm-loraserve adapters remove`."
        )
    if args.dry_run:
        for name in wanted:
            print(f"{name}: {'to be compared' if name in present else 'new'}")
        for name in gone:
            print(f"{name}: gone" + ("" if args.prune else " (kept; see --prune)"))
        return 0
    done: Counter[str] = Counter()
    turn = asyncio.Semaphore(AT_A_TIME)

    async def register(name: str, path: Path) -> None:
        async with turn:
            try:
                reply = await client.ask(_message(name, str(path), replace=True), AdapterReply)
            except (CoordinatorError, SyncError) as error:
                what, text = "refused", str(error)
            else:
                what = ("replaced" if name in present else "added") if reply.created else "unchanged"
                text = f"{what}, rank {reply.adapter.rank}"
        done[what] += 1
        if what != "unchanged":
            print(f"{name}: {text}", file=sys.stderr if what == "refused" else sys.stdout, flush=True)

    await asyncio.gather(*(register(name, path) for name, path in wanted.items()))
    if args.prune:
        await _remove_all(client, gone, 30.0, done)
    else:
        done["gone, kept"] += len(gone)
    print(", ".join(f"{count} {what}" for what, count in sorted(done.items()) if count) or "nothing to do")
    return 1 if done["refused"] else 0
