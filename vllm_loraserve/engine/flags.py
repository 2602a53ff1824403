"""Command-line flags of `vllm serve`: `--enable-loraserve` and `--loraserve-config`.

vLLM copies only its own fields from the command line, so both flags write into `additional_config["loraserve"]`, the
documented carrier of out-of-tree options: it reaches the engine core and every worker. Every value is checked while the
command line is parsed: a mistake ends the program in one line, before the model loads.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from msgspec import NODEFAULT, Meta, structs

from vllm_loraserve.config import ADDITIONAL_CONFIG_KEY, ConfigError, LoRAServeConfig, parse_config
from vllm_loraserve.engine.default_memory import mark_defaults

GROUP = "LoRAServe"
_DESCRIPTION = "Rank-aware serving of many LoRA adapters (vllm-loraserve)."


def options_help() -> str:
    """One line for each option of LoRAServeConfig: its name, meaning and default."""
    lines = []
    for field in structs.fields(LoRAServeConfig):
        text = next((m.description for m in _metas(field.type) if m.description), "")
        default = field.default if field.default is not NODEFAULT else field.default_factory()
        lines.append(f"- {field.encode_name}: {text} (default: {json.dumps(default)})")
    return "\n".join(lines)


def _metas(annotation: Any) -> list[Meta]:
    """The msgspec.Meta objects of an annotation, outermost first."""
    return [m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Meta)]


def add_arguments(parser: argparse.ArgumentParser, refusal: str | None = None) -> None:
    """Adds both flags; with `refusal` they are still known, and using them ends with that line."""
    group = parser.add_argument_group(GROUP, _DESCRIPTION)
    group.add_argument(
        "--enable-loraserve",
        action=_EnableAction,
        default=argparse.SUPPRESS,
        refusal=refusal,
        help="Serve LoRA adapters with vllm-loraserve. Implies --enable-lora. (default: False)",
    )
    group.add_argument(
        "--loraserve-config",
        action=_ConfigAction,
        default=argparse.SUPPRESS,
        metavar="JSON",
        refusal=refusal,
        help="Options of vllm-loraserve as a JSON object; implies --enable-loraserve. Single options may be given as "
        "--loraserve-config.KEY VALUE. Keys:\n\n" + options_help().replace("%", "%%"),
    )
    _guard_additional_config(parser, refusal)
    mark_defaults(parser)


def _fail(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Ends the program in one line; argparse's own `error` would print a page of usage before it."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")
    raise AssertionError("unreachable")


class _LoRAServeAction(argparse.Action):
    """Base: merges into `namespace.additional_config["loraserve"]` and turns LoRA on."""

    def __init__(self, *args: Any, refusal: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refusal = refusal

    def merge(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, update: Any) -> None:
        if self.refusal is not None:
            _fail(parser, self.refusal)
        additional = dict(getattr(namespace, "additional_config", None) or {})
        try:
            if not isinstance(update, dict):
                raise ConfigError(f"loraserve-config: expected a JSON object, got {update!r}")
            merged = {**(additional.get(ADDITIONAL_CONFIG_KEY) or {}), **update}
            parse_config(merged)
        except ConfigError as error:
            _fail(parser, str(error))
        additional[ADDITIONAL_CONFIG_KEY] = merged
        namespace.additional_config = additional
        namespace.enable_lora = True


class _EnableAction(_LoRAServeAction):
    """`--enable-loraserve`, and `--no-enable-loraserve` to take it back."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        names = [*option_strings, *(f"--no-{name.removeprefix('--')}" for name in option_strings)]
        super().__init__(names, dest, nargs=0, **kwargs)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if option is not None and option.startswith("--no-"):
            additional = dict(getattr(namespace, "additional_config", None) or {})
            additional.pop(ADDITIONAL_CONFIG_KEY, None)
            namespace.additional_config = additional
        else:
            self.merge(parser, namespace, {})

    def format_usage(self) -> str:
        return " | ".join(self.option_strings)


class _ConfigAction(_LoRAServeAction):
    """`--loraserve-config JSON`; vLLM's parser has turned dotted options into such an object."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        try:
            update = json.loads(values)
        except ValueError as error:
            _fail(parser, f"loraserve-config: not JSON: {values!r}: {error}")
        self.merge(parser, namespace, update)


def _guard_additional_config(parser: argparse.ArgumentParser, refusal: str | None) -> None:
    """Makes `--additional-config` keep and check the loraserve object, whatever the order of the flags."""
    stock = next((a for a in parser._actions if "--additional-config" in a.option_strings), None)
    if stock is None:
        return
    base: type[argparse.Action] = type(stock)

    class MergingAction(base):  # type: ignore[misc, valid-type]
        def __call__(
            self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
        ) -> None:
            before = (getattr(namespace, self.dest, None) or {}).get(ADDITIONAL_CONFIG_KEY)
            super().__call__(parser, namespace, values, option)
            now = getattr(namespace, self.dest)
            if not isinstance(now, dict) or (before is None and ADDITIONAL_CONFIG_KEY not in now):
                return
            given = now.get(ADDITIONAL_CONFIG_KEY) or {}
            setattr(namespace, self.dest, {k: v for k, v in now.items() if k != ADDITIONAL_CONFIG_KEY})
            _LoRAServeAction([], self.dest, refusal=refusal).merge(
                parser, namespace, {**(before or {}), **given} if isinstance(given, dict) else given
            )

    stock.__class__ = MergingAction


def wrap_add_cli_args(original: Callable[..., Any], refusal: Callable[[], str | None]) -> Callable[..., Any]:
    """EngineArgs.add_cli_args with our group added; `refusal()` is the line that says why it can't be used."""

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        add_arguments(parser, refusal())
        return parser

    return add_cli_args
