"""Which regular expressions an adapter's config may name modules with.

Matching holds the interpreter, and an expression that backtracks may take for ever: a hostile config would stop the
heartbeats of whoever reads it. So an expression has few choices, and none within another: what it costs is then bounded
by its length and a module name's.
"""

import re

MAX_CHARS = 500
MAX_CHOICES = 3
"""Groups and repeats."""
MAX_MODULE_CHARS = 200
"""Of the name of a module that is matched."""

_UNIT = r"\\.|\[\^?[^\]]+\]"
_ATOM = rf"(?:{_UNIT}|[^\\\[\](){{}}|*+?])(?:(?:[*+?]|\{{\d+(?:,\d*)?\}})\??)?"
_GROUP = rf"\((?:\?:)?(?:{_ATOM}|\|)*\)"
_PLAIN = re.compile(rf"(?:{_ATOM}|{_GROUP}|\|)*")
_CHOICE = re.compile(r"[*+{(]|(?<![*+}(])\?")


def pattern_problem(pattern: str) -> str:
    """What is the matter with a module pattern, to follow its text in a sentence; empty: nothing."""
    if len(pattern) <= MAX_CHARS:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            return f"is broken ({error}); correct the regex"
        choices = len(_CHOICE.findall(re.sub(_UNIT, "", pattern)))
        if choices <= MAX_CHOICES and _PLAIN.fullmatch(pattern):
            return ""
    return (
        f"is no plain one of at most {MAX_CHARS} characters and {MAX_CHOICES} groups and repeats; "
        "name the modules one by one"
    )
