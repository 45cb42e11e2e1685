"""Known vulnerabilities of every pinned package: fails where there is one, and where a package was not looked up.

    pip-audit --format json ... | python tools/audit.py constraints.txt constraints-data.txt

pip-audit leaves out what its index does not know, and says so in passing; here that is a failure like any other.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def pinned(files: Iterable[Path]) -> dict[str, str]:
    """Normalised name -> version of every pin.

    Raises:
        ValueError: a line is no pin.
    """
    found = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            text = line.split("#")[0].strip()
            if not text:
                continue
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^;\s]+)", text)
            if match is None:
                raise ValueError(f"{file}: {text} is no pin")
            found[normal(match[1])] = match[2]
    return found


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def faults(report: Mapping[str, Any], pins: Mapping[str, str]) -> list[str]:
    """A line for each pin that has a vulnerability, was skipped or is missing from the report."""
    lines, seen = [], set()
    for one in report.get("dependencies", []):
        name = normal(one["name"])
        if "skip_reason" in one:
            lines.append(f"{name}: skipped: {one['skip_reason']}")
        elif one.get("version") != pins.get(name):
            lines.append(f"{name}: {one.get('version')} was looked up, {pins.get(name)} is pinned")
        seen.add(name)
        for known in one.get("vulns", []):
            fixed = ", ".join(known.get("fix_versions") or []) or "none yet"
            lines.append(f"{name} {one['version']}: {known['id']} (fixed in: {fixed})")
    return lines + [f"{name}: not looked up" for name in pins if name not in seen]


def main(arguments: Sequence[str]) -> int:
    pins = pinned(map(Path, arguments))
    try:
        report = json.load(sys.stdin)
    except ValueError:
        report = {}
    found = faults(report, pins)
    for line in found:
        print(line, file=sys.stderr)
    print(f"{len(pins)} packages: {len(found) or 'no'} finding{'s' if len(found) != 1 else ''}")
    return 1 if found or not pins else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
