"""The plugin in a real vLLM: flags, refusals, what is in use with and without the flag, base in mixed batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # One thread, bound to no core: several wait for each other in every small step when another process runs.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
ENGINE = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 128 << 20,
    "dtype": "float32",
}


def vllm_cli(*args: str, timeout: float = 800) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", *args],
        env={**os.environ, **ENV, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def parse() -> Callable[..., Any]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return lambda *args: make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(list(args))


def test_every_hook_fits_the_installed_vllm() -> None:
    from vllm_loraserve import plugin

    plugin.register()
    plugin.register()
    assert plugin.install_server_hooks() is None
    assert plugin.install_worker_hooks() is None
    assert plugin.install_engine_hooks() is None
    assert plugin.refusal() is None
    assert {hook.name: hook.check() for hook in plugin.hooks()} == {hook.name: None for hook in plugin.hooks()}
    names = [hook.name for hook in plugin.hooks()]
    assert len(names) == len(set(names))


def test_install_twice_wraps_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_loraserve import plugin

    plugin.register()
    first = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is first
    assert not hasattr(first.__wrapped__, "__wrapped__")


def test_a_hook_that_does_not_fit_is_refused() -> None:
    from vllm_loraserve.plugin import Hook

    target = "vllm.engine.arg_utils:EngineArgs.create_engine_config"
    for hook, problem in (
        (Hook("x", target, "hook", None, parameters=("self", "other")), "has other parameters"),
        (Hook("x", target, "hook", None, used_by=(target, "no such text")), "no longer contains"),
        (Hook("x", "vllm.engine.arg_utils:EngineArgs.no_such", "hook", None), "no_such"),
        (Hook("x", "vllm.no_such_module:f", "hook", None), "no_such_module"),
    ):
        assert problem in str(hook.check())


def test_unsupported_version_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, parse: Callable[..., Any]) -> None:
    import vllm

    from vllm_loraserve import plugin

    monkeypatch.setattr(vllm, "__version__", "0.45.1")
    try:
        plugin.register()
        assert plugin.refusal() == (
            "vllm-loraserve supports vLLM >=0.32,<0.33; installed is 0.45.1: --enable-loraserve can't be used"
        )
        parse("--model", "x")
        with pytest.raises(SystemExit) as ended:
            parse("--enable-loraserve")
        assert ended.value.code == 2
        from vllm.engine.arg_utils import EngineArgs

        with pytest.raises(ValueError, match=r"supports vLLM .*; installed is 0\.45\.1"):
            EngineArgs(model="x", additional_config={"loraserve": {}}).create_engine_config()
    finally:
        monkeypatch.undo()
        plugin.register()
    assert plugin.refusal() is None


@pytest.mark.parametrize("missing", ["vllm.lora.resolver", "vllm.v1.engine.output_processor"])
@pytest.mark.parametrize("version", ["0.32.0", "0.45.1"])
def test_a_vllm_that_lacks_a_module_works_on_without_the_flag(
    missing: str, version: str, monkeypatch: pytest.MonkeyPatch, parse: Callable[..., Any]
) -> None:
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    from vllm_loraserve import plugin

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setitem(sys.modules, missing, None)
    # As in a new process, ours have imported nothing of vLLM yet.
    for name in [name for name in sys.modules if name.startswith("vllm_loraserve.engine.")]:
        monkeypatch.delitem(sys.modules, name)
    try:
        plugin.register()
        assert not parse("--model", "x").enable_lora
        asked = EngineArgs(model="x", additional_config={"loraserve": {}})
        with pytest.raises(SystemExit) as ended:
            asked.create_engine_config(SimpleNamespace(name="OPENAI_API_SERVER"))
        (line,) = str(ended.value).splitlines()
        said = f"import of {missing} halted" if version == "0.32.0" else "installed is 0.45.1"
        assert line.startswith("vllm serve: error: vllm-loraserve ")
        assert said in line, line
    finally:
        monkeypatch.undo()
        plugin.register()
    assert plugin.refusal() is None


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.3"])
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import vllm

    from vllm_loraserve import plugin

    monkeypatch.setattr(vllm, "__version__", version)
    assert plugin.unsupported_version() is None


def test_flags_merge_in_any_order(parse: Callable[..., Any]) -> None:
    base = parse("--model", "x")
    assert not base.enable_lora
    assert not (base.additional_config or {}).get("loraserve")
    pieces = [
        ["--enable-loraserve"],
        ["--loraserve-config.max_rank", "64"],
        ["--loraserve-config", '{"instance": "q"}'],
        ["--additional-config", '{"a": 1, "loraserve": {"heartbeat_s": 2}}'],
        ["--loraserve-config.adapter_roots+", "/a,/b"],
    ]
    for order in (pieces, pieces[::-1], pieces[2:] + pieces[:2]):
        args = parse("--model", "x", *[word for piece in order for word in piece])
        assert args.enable_lora
        assert args.additional_config == {
            "a": 1,
            "loraserve": {"max_rank": 64, "instance": "q", "heartbeat_s": 2, "adapter_roots": ["/a", "/b"]},
        }
    assert "loraserve" not in parse("--enable-loraserve", "--no-enable-loraserve").additional_config


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--loraserve-config.max_rankk", "3"], ["max_rankk", "unknown key", "max_rank"]),
        (["--loraserve-config.max_rank", "1024"], ["max_rank=1024", "<= 512"]),
        (["--loraserve-config", '{"heartbeat_s": "soon"}'], ["heartbeat_s='soon'", "float"]),
        (["--loraserve-config", "{max_rank: 8}"], ["not JSON", "{max_rank: 8}"]),
        (["--loraserve-config", "[8]"], ["expected a JSON object", "[8]"]),
        (["--additional-config", '{"loraserve": {"max_rank": 0}}'], ["max_rank=0", ">= 1"]),
        (["--additional-config", '{"loraserve": 5}'], ["expected a JSON object", "5"]),
        (["--loraserve-config.coordinator", "foo"], ["coordinator='foo'", "tcp://HOST:PORT"]),
        (["--loraserve-config.coordinator", "tcp://h"], ["coordinator='tcp://h'", "tcp://HOST:PORT"]),
        (["--loraserve-config.coordinator", "tcp://:5700"], ["coordinator='tcp://:5700'", "tcp://HOST:PORT"]),
        (["--loraserve-config.coordinator", "tcp://h:65535"], ["coordinator='tcp://h:65535'", "tcp://HOST:PORT"]),
        (["--loraserve-config.advertise_url", "nonsense"], ["advertise_url='nonsense'", "http://HOST:PORT"]),
        (["--loraserve-config.advertise_url", "http://h:x"], ["advertise_url='http://h:x'", "http://HOST:PORT"]),
        (["--loraserve-config", '{"instance": "a\\n"}'], ["instance='a\\n'", "regex"]),
        (["--loraserve-config", '{"arena_gib": Infinity}'], ["arena_gib=inf", "finite"]),
        (["--loraserve-config", '{"host_gib": Infinity}'], ["host_gib=inf", "finite"]),
        (["--loraserve-config", '{"shares": {"a": Infinity}}'], ["shares={'a': inf}", "finite"]),
    ],
)
def test_bad_option_is_one_line(
    parse: Callable[..., Any], capsys: pytest.CaptureFixture[str], args: list[str], named: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*args)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vllm serve: error: loraserve-config: ")
    assert all(word in line for word in named), line


def test_real_command_line() -> None:
    """The installed entry point, through the real program: help and a refusal before any model is looked for."""
    command_lines = (
        ("serve", "--help=loraserve"),
        ("serve", "--help"),
        ("serve", "no/such-model", "--enable-loraserve", "--loraserve-config.max_rank", "9999"),
    )
    with ThreadPoolExecutor() as side_by_side:
        ours, all_groups, bad = side_by_side.map(lambda words: vllm_cli(*words), command_lines)
    help_text = ours.stdout
    assert "--enable-loraserve" in help_text
    assert "max_rank: Largest adapter rank accepted" in " ".join(help_text.split())
    assert "LoRAServe" in all_groups.stdout
    assert bad.returncode == 2
    assert "max_rank=9999" in bad.stderr.strip().splitlines()[-1]
    assert "Traceback" not in bad.stderr


def test_what_the_flag_implies() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_loraserve.config import ConfigError
    from vllm_loraserve.engine.engine_config import prepare_engine_args

    stock_rank = EngineArgs(model="x").max_lora_rank
    args = EngineArgs(model="x", additional_config={"loraserve": {"max_rank": 100}, "other": 1})
    assert prepare_engine_args(args) is not None
    assert (args.enable_lora, args.max_lora_rank) == (True, stock_rank)
    assert args.additional_config == {"loraserve": {"max_rank": 100}, "other": 1}

    args = EngineArgs(model="x", max_lora_rank=64, additional_config={"loraserve": {}})
    config = prepare_engine_args(args)
    assert config is not None
    assert (config.max_rank, args.max_lora_rank) == (256, 64), "pages take any rank up to max_rank"

    off = EngineArgs(model="x")
    before = dict(vars(off))
    assert prepare_engine_args(off) is None
    assert vars(off) == before
    with pytest.raises(ConfigError, match="unknown key 'typo'"):
        prepare_engine_args(EngineArgs(model="x", additional_config={"loraserve": {"typo": 1}}))


def test_without_the_flag_nothing_is_changed(model_dir: Path) -> None:
    """The same configuration object, the same classes as with the originals."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.platforms import current_platform
    from vllm.v1.worker import lora_model_runner_mixin

    from vllm_loraserve import plugin

    plugin.register()
    args = {"model": str(model_dir), "enable_lora": True, **ENGINE}
    ours = EngineArgs(**args).create_engine_config()
    stock = EngineArgs.create_engine_config.__wrapped__(EngineArgs(**args))
    assert ours.compute_hash() == stock.compute_hash()
    assert ours.scheduler_config.get_scheduler_cls() is stock.scheduler_config.get_scheduler_cls()
    assert ours.parallel_config.worker_cls == stock.parallel_config.worker_cls
    assert ours.lora_config == stock.lora_config
    import torch

    manager = lora_model_runner_mixin.LRUCacheWorkerLoRAManager(ours, torch.device("cpu"), {})
    assert type(manager) is LRUCacheWorkerLoRAManager
    stock_wrapper = type(current_platform).__dict__["get_punica_wrapper"].__func__.__wrapped__
    assert current_platform.get_punica_wrapper() == stock_wrapper(type(current_platform))


def run_offline(model: Path, adapters: dict[str, Path], **options: Any) -> dict[str, Any]:
    asked = {
        "model": str(model),
        "adapters": {n: str(p) for n, p in adapters.items()},
        "options": {**ENGINE, **options},
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline_engine.py")), json.dumps(asked)],
        env={**os.environ, **ENV, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_base_requests_get_the_base_model_in_a_mixed_batch(model_dir: Path, make_adapter: Callable[..., Path]) -> None:
    """Two adapters and two slots, so that the last slot is filled: stock vLLM on CPU answers base requests with it."""
    adapters = {"one": make_adapter("one", 8, 1), "two": make_adapter("two", 16, 2)}
    plain = run_offline(model_dir, adapters)
    assert "manager" not in plain["used"]
    ours = run_offline(
        model_dir, adapters, max_loras=2, additional_config={"loraserve": {"max_rank": 16, "instance": "offline"}}
    )
    assert json.loads(ours["used"]["loraserve"]) == {"max_rank": 16, "instance": "offline"}
    assert ours["used"]["manager"].startswith("vllm_loraserve.")
    assert ours["used"]["scheduler"].endswith("engine.scheduler.RankAwareScheduler")
    assert ours["used"]["manager"].endswith("SideLoadingLoRAServeWorkerManager")
    assert ours["used"]["punica"].startswith("vllm_loraserve.")
    assert ours["apart"]["base"] == plain["apart"]["base"]
    assert ours["mixed"] == ours["apart"]
    assert len({tuple(texts) for texts in ours["mixed"].values()}) == 3
