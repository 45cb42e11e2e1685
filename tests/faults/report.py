#!/usr/bin/env python3
"""Sums up injections as docs/robustness.json, and that as the table of docs/robustness.md.

python -m tests.faults.report .cache/faults   # writes both
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.faults.harness import Fault

ROOT = Path(__file__).parents[2]
FIGURES, PAGE = ROOT / "docs" / "robustness.json", ROOT / "docs" / "robustness.md"
BEGIN, END = "<!-- faults: made by tests/faults/report.py -->", "<!-- end of faults -->"
COUNTS = ("times", "killed", "at_stake", "lost", "duplicated", "corrupted", "not_ended", "unsaid")


def read(folder: Path) -> list[dict[str, Any]]:
    """The injections that a folder's files have, a line each."""
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def summed(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Injections by fault, in the order in which faults are listed, and what bit for bit came of them."""
    from tests.faults.faults import FAULTS

    faults = []
    for fault in FAULTS:
        own = [one for one in found if one["fault"] == fault.name]
        if own:
            messages = Counter(plain(one["message"]) for one in own if one["message"])
            faults.append({
                "fault": fault.name, "times": len(own), "killed": sum(one["kills"] for one in own),
                "at_stake": sum(one["at_stake"] for one in own),
                **{key: sum(len(one[key]) for one in own) for key in ("lost", "duplicated", "corrupted")},
                "not_ended": sum(not one["ended"] for one in own),
                "unsaid": sum(unsaid(fault, one) for one in own),
                "message": messages.most_common(1)[0][0] if messages else None,
            })  # fmt: skip
    bits = {
        name: _bits([one for one in found if one["deterministic"] is flag])
        for name, flag in (("deterministic", True), ("otherwise", False))
    }
    return {"faults": faults, "bits": bits}


def unsaid(fault: "Fault", found: Mapping[str, Any]) -> bool:
    """Whether a person was not told what had happened, or by a traceback."""
    return bool(found["traceback"]) or (fault.says is not None and not fault.silent and found["message"] is None)


def _bits(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "injections": len(found), "runs": sum(one["compared"] for one in found),
        "identical": sum(one["identical"] for one in found),
        "furthest": max((one["furthest"] for one in found if not one["corrupted"]), default=0.0),
    }  # fmt: skip


def plain(message: str) -> str:
    """A message without what differs from one injection to the next."""
    text = re.sub(r"/\S*/(study|mounted/study)\b", "outputs/study", message)
    text = re.sub(r"\b[0-9a-f]{12}\b", "RUN_ID", text)
    text = re.sub(r"(?<=\w\.)[0-9a-f]{8,16}\b", "…", text)
    text = re.sub(r"^\[\d+:\d+\] ", "", text)
    return text if len(text) <= 260 else f"{text[:259]}…"


def table(figures: Mapping[str, Any]) -> str:
    """The table of the page."""
    heads = ("fault", "times", "of them kills", "runs at stake", "lost", "duplicated", "corrupted accepted", "message")
    rows = [
        [one["fault"], *(f"{one[key]:,}" for key in COUNTS[:6]), _cell(one["message"])] for one in figures["faults"]
    ]
    rows.append(["all", *(f"{sum(one[key] for one in figures['faults']):,}" for key in COUNTS[:6]), ""])
    lines = [heads, ["---", *["---:"] * 6, "---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(message: str | None) -> str:
    if message is None:
        return "none: it can say nothing, or there is nothing to say"
    return f"`{message.replace('|', chr(92) + '|').replace('`', chr(39))}`"


def bits(figures: Mapping[str, Any]) -> str:
    """How equal the runs were to those of a sweep left alone."""
    lines = []
    for name, what in (("deterministic", "with `trainer.deterministic=true`"), ("otherwise", "without it")):
        one = figures["bits"][name]
        lines.append(
            f"- {what}: {one['injections']:,} injections; {one['identical']:,} of {one['runs']:,} runs are the same to "
            f"the last bit (scores, loss of every step, adapter); of the others the scores differ by at most "
            f"{one['furthest']:.0e}, relative"
        )
    return "\n".join(lines)


def section(figures: Mapping[str, Any]) -> str:
    """All that is made of the figures."""
    return f"{BEGIN}\n\n{table(figures)}\n\n{bits(figures)}\n\n{END}"


def problems(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """A paragraph for each injection that did not go well."""
    from tests.faults.faults import by_name

    return [
        f"{one['fault']}: lost {one['lost']}, duplicated {one['duplicated']}, corrupted {one['corrupted']}, "
        f"ended {one['ended']}, said {one['message']}\n{one['log']}"
        for one in found
        if one["lost"] or one["duplicated"] or one["corrupted"] or not one["ended"]
        or unsaid(by_name(one["fault"]), one)
    ]  # fmt: skip


def main() -> None:
    figures = summed(read(Path(sys.argv[1])))
    FIGURES.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + section(figures) + page[page.index(END) + len(END) :])


if __name__ == "__main__":
    main()
