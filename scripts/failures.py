"""Prints what failed in a pytest run, from its JUnit report: each test's name and the end of its error.

    python scripts/failures.py REPORT.xml

For the end of a log of which only the end may be kept. Prints one line when nothing failed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

LINES = 15
"""Of each error."""


def failures(report: Path) -> list[str]:
    """A paragraph for each test that failed or could not be run."""
    found = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        for kind in ("failure", "error"):
            for bad in case.findall(kind):
                text = (bad.text or bad.get("message") or "").strip().splitlines()
                end = "\n".join(f"    {line}" for line in text[-LINES:])
                found.append(f"{kind.upper()} {case.get('classname')}::{case.get('name')}\n{end}")
    return found


def main() -> int:
    """Exit status 0; 1 when there is no report."""
    report = Path(sys.argv[1])
    try:
        found = failures(report)
    except (OSError, ElementTree.ParseError) as error:
        print(f"pytest left no report: {error}")
        return 1
    print("\n".join(found) if found else "no test failed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
