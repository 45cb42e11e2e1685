"""What a sweep left in its study folder, read as whole as the analysis would, and compared with a sweep left alone."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load

from sweeper.record import ADAPTER, METRICS, PREDICTIONS, RECORD, SEARCHES, read_record

TOLERANCE = 1e-5
"""Relative, of scores: what another pack's product shapes may do to the last bits."""
ENDED = ("completed", "diverged")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run as its folder has it.

    Attributes:
        place: arm, trial, seed and purpose; what no two runs of a study may share.
        nll: by split, after training. losses: by step, as often as the curve has them.
        weights: SHA-256 of the adapter's file. whole: whether all that the record refers to can be read.
    """

    status: str
    steps: int
    place: tuple[Any, ...]
    nll: Mapping[str, float]
    losses: Sequence[tuple[int, float]]
    weights: str
    whole: bool

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Result":
        """One that was kept as JSON."""
        losses = tuple((step, loss) for step, loss in plain["losses"])
        return cls(**{**plain, "place": tuple(plain["place"]), "losses": losses})

    def named(self, purpose: str) -> "Result":
        """The same for another purpose."""
        return dataclasses.replace(self, place=(*self.place[:-1], purpose))

    @property
    def purpose(self) -> str:
        return str(self.place[-1])


def ended(study: Path) -> int:
    """How many runs of a study have a record that stands."""
    return sum(one.status in ENDED for one in outcome(study, deep=False).values())


def outcome(study: Path, *, deep: bool = True) -> dict[str, Result]:
    """Run id -> what it left, of every record that can be read."""
    found = {}
    for path in sorted(study.glob(f"*/{RECORD}")):
        try:
            one = read_record(path.parent)
        except (OSError, ValueError):
            continue
        search = one.search
        found[one.run_id] = Result(
            status=one.status, steps=one.steps,
            place=(
                search.get("arm", one.run_id), one.spec["dataset"].get("content"), one.spec["model"].get("content"),
                search.get("trial"), one.spec["seed"], str(search.get("purpose")),
            ),
            nll={split: moments["after"].nll for split, moments in one.scores.items() if "after" in moments},
            **(_files(path.parent, one.status) if deep else {"losses": (), "weights": "", "whole": True}),
        )  # fmt: skip
    return found


def _files(folder: Path, status: str) -> dict[str, Any]:
    try:
        rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        weights = (folder / ADAPTER / "adapter_model.safetensors").read_bytes()
        load(weights)
        predictions = [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]
    except (OSError, ValueError, SafetensorError):
        return {"losses": (), "weights": "", "whole": status == "failed"}
    losses = tuple((row["step"], math.nan if row["loss"] is None else row["loss"]) for row in rows if "loss" in row)
    whole = [step for step, _ in losses] == list(range(1, len(losses) + 1)) and bool(predictions)
    return {"losses": losses, "weights": hashlib.sha256(weights).hexdigest(), "whole": whole}


@dataclass(kw_only=True)
class Verdict:
    """What one injection did to a study, against a sweep left alone.

    Attributes:
        lost: runs that are not there, or have not ended. duplicated: runs counted twice, or that nobody asked for.
        corrupted: runs whose steps, curve, scores or files are not those of the sweep left alone.
        compared, identical: runs looked at, and those of them that are the same to the last bit, adapters included.
        furthest: the largest relative difference of a score.
    """

    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    corrupted: list[str] = field(default_factory=list)
    compared: int = 0
    identical: int = 0
    furthest: float = 0.0


def judge(
    study: Path, expected: Mapping[str, Result], spare: Callable[[], Mapping[str, Result]] = dict, *,
    excused: Sequence[str] = (), trials: int | None = None, exact: bool = False,
) -> Verdict:  # fmt: skip
    """Compares a study with what it should be.

    Args:
        spare: runs that may be there as well: confirmations of trials that were best for a while.
        excused: runs that the fault itself made diverge; what their trial would have led to need not be there.
        exact: whether runs are to be the same to the last bit.
        trials: completed trials that each search is to have counted; None where there is none, or one was excused.
    """
    found, verdict = outcome(study), Verdict()
    known = dict(expected) if found.keys() <= expected.keys() else {**spare(), **expected}
    confirmed = {one.place[0] for one in found.values() if one.purpose == "confirm" and one.status in ENDED}
    for run_id, one in expected.items():
        replaced = one.purpose == "confirm" and bool(excused) and one.place[0] in confirmed
        if not replaced and (run_id not in found or found[run_id].status not in ENDED):
            verdict.lost.append(run_id)
    verdict.duplicated += sorted(found.keys() - known.keys())
    places = Counter(one.place for one in found.values() if one.purpose != "None")
    verdict.duplicated += [f"{place} x{count}" for place, count in places.items() if count > 1]
    if trials is not None:
        verdict.duplicated += _counted(study, trials)
    for run_id, one in found.items():
        if run_id not in known or run_id in excused or one.status not in ENDED:
            continue
        far, equal = difference(known[run_id], one), identical(known[run_id], one)
        verdict.compared += 1
        verdict.identical += equal
        verdict.furthest = max(verdict.furthest, far)
        if far > TOLERANCE or not one.whole or (exact and not equal):
            verdict.corrupted.append(f"{run_id}: {far:.1e} from {known[run_id].nll}, whole {one.whole}, equal {equal}")
    verdict.corrupted += [f"{run_id}: {found[run_id].status}" for run_id in excused if _hidden(found.get(run_id))]
    return verdict


def difference(one: Result, two: Result) -> float:
    """The largest relative difference of the scores; infinite where anything that is counted differs."""
    if (one.status, one.steps, one.purpose) != (two.status, two.steps, two.purpose) or one.nll.keys() != two.nll.keys():
        return math.inf
    if [step for step, _ in one.losses] != [step for step, _ in two.losses]:
        return math.inf
    pairs = [(one.nll[split], two.nll[split]) for split in one.nll]
    return max((abs(a - b) / abs(a) for a, b in pairs), default=0.0)


def identical(one: Result, two: Result) -> bool:
    """Whether two runs are the same to the last bit: scores, curve, adapter."""
    return (one.nll, one.losses, one.weights) == (two.nll, two.losses, two.weights)


def _hidden(struck: Result | None) -> bool:
    """Whether a run whose numbers were made NaN does not say so; one that was trained again has none."""
    return struck is not None and struck.status == "completed" and not all(map(math.isfinite, struck.nll.values()))


def _counted(study: Path, trials: int) -> list[str]:
    """A line for each search that counts another number of trials than were wanted."""
    try:
        searches = json.loads((study / SEARCHES).read_text())
    except (OSError, ValueError):
        return [f"no {SEARCHES}"]
    counts = {one["arm"]: one.get("trials_completed", 0) for one in searches.values()}
    return [f"{arm}: {count} of {trials} trials" for arm, count in counts.items() if count != trials]
