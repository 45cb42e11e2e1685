"""`train.py --from RECORD`: trains what a record describes once more, in a study of its own, and compares the two."""

import argparse
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from sweeper import config, device, identity, installation, record
from sweeper.arms import grouped
from sweeper.config.grid import is_setting
from sweeper.errors import DataError, Problems, SpecError, SweeperError, gist
from sweeper.record import Record
from sweeper.spec import RunSpec, Settings, bare, run_spec
from sweeper.study import launch

FLAG = "--from"
PACK = "--pack"
# largest relative difference that rounding alone explains, by precision: of losses and NLLs, and of an adapter's values
TOLERANCES = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 1.0)}
SAME = ("device", "device_type", "threads", "python", "versions", "git_commit")
TOLD = {"git_commit": "commit", "device_type": "kind of device"}


class NotRepeated(SweeperError):
    """The runs trained, and one came out otherwise than its record says by more than rounding."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Former:
    """A run that is repeated: its record, where that lies, and its spec as it was typed."""

    record: Record
    folder: Path
    spec: RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Largest relative differences of two runs; 0 where every bit is the same, inf where they cannot be compared."""

    losses: float
    scores: float
    adapter: float

    @property
    def none(self) -> bool:
        return not (self.losses or self.scores or self.adapter)

    def within(self, precision: str) -> bool:
        """Whether rounding explains it."""
        most, of_adapter = TOLERANCES.get(precision, TOLERANCES["bfloat16"])
        return max(self.losses, self.scores) <= most and self.adapter <= of_adapter


def main(words: Sequence[str]) -> None:
    """Carries out `--from RECORD [RECORD ...] [--pack] [study=... trainer.device=... sweep.*]`.

    Raises:
        SweeperError: a record that cannot be repeated, before anything is trained; `NotRepeated` at the end.
    """
    if {"-h", "--help"} & set(words):
        print(f"{installation.program('train')} {FLAG} RECORD [RECORD ...] [{PACK}] [study=... sweep.*]")
        print(f"or {installation.NAME} repeat RECORD ...; {PACK} trains the runs that shared its pack again as well")
        return
    paths, with_pack, settings = _read_words(words)
    formers = [_read(path) for path in paths]
    chosen = {former.record.run_id for former in formers}
    if with_pack:
        formers = _packs_of(formers)
    asked = _settings(settings, formers)
    named = [former for former in formers if former.record.run_id in chosen]
    lines = [line for former in named for line in told(former, asked, alone=len(formers) == 1)]
    for line in dict.fromkeys(lines):
        print(line, flush=True)
    fixed = _fix_precision(asked, formers)
    try:
        done = launch.carry_out(grouped([former.spec for former in formers]), asked)
    except Problems:  # nothing was trained, so nothing is left
        if fixed:
            fixed.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                fixed.parent.rmdir()
        raise
    if asked.dry_run:
        return
    new = {bare(run.spec).run_id: done.records.get(run.run_id) for run in done.runs}
    wrong = []
    for former in formers:
        said, right = compared(former, new.get(bare(former.spec).run_id), asked.folder)
        if former in named or not right:
            print(f"{former.record.run_id}: {said}", flush=True)
        wrong += [] if right else [former.record.run_id]
    if done.failures is not None:
        raise done.failures
    if wrong:
        raise NotRepeated(f"{', '.join(wrong)}: not what was recorded; the new records are in {asked.folder}")


def told(former: Former, settings: Settings, *, alone: bool) -> Iterator[str]:
    """Lines, before anything trains, on what is not as it was: files, machine, versions, who shared the pack."""
    name, found = former.record.run_id, former.record
    yield f"repeating {former.folder / record.RECORD} in {settings.folder}"
    for line, certain in identity.changes(former.spec, identity.former_of(found), ("model", "dataset")):
        yield f"{name}: {line}{'; what is trained is another run' if certain else ''}"
    there = dict(found.environment)
    here = _here(settings)
    for key in SAME:
        if key in there and key in here and there[key] != here[key]:
            yield f"{name}: another {TOLD.get(key, key)}: {_changed(there[key], here[key])}"
    if alone and found.efficiency.pack_runs > 1 and not former.spec.trainer.deterministic:
        most = TOLERANCES.get(str(there.get("precision")), TOLERANCES["bfloat16"])[0]
        with_it = f"; {PACK} trains those again as well" if there.get("pack") else ""
        yield (
            f"{name} trained in a pack of {found.efficiency.pack_runs}; by itself its products have other shapes, so "
            f"losses may differ by rounding, at most {most:g} of their value{with_it}"
        )


def compared(former: Former, new: Record | None, study: Path) -> tuple[str, bool]:
    """What to say of a repeated run, and whether it came out as it was recorded."""
    old = former.record
    if new is None:
        return "it left no record", False
    if new.status != old.status:
        return f"it {new.status}, and was recorded as {old.status}", False
    found = difference(former.folder, old, study / new.run_id, new)
    precision = str(old.environment.get("precision"))
    if found.none:
        return f"bit-identical: {old.steps} losses, every score and the adapter", True
    most, of_adapter = TOLERANCES.get(precision, TOLERANCES["bfloat16"])
    said = (
        f"largest relative differences: losses {found.losses:.1e}, scores {found.scores:.1e} (rounding in {precision}: "
        f"at most {most:g}), adapter {found.adapter:.1e} (at most {of_adapter:g})"
    )
    return (f"repeated but for rounding; {said}", True) if found.within(precision) else (f"differs; {said}", False)


def difference(folder: Path, old: Record, again: Path, new: Record) -> Difference:
    """How far two runs lie apart in the loss of each step, in every NLL, and in what they saved.

    Raises:
        DataError: a file of either cannot be read.
    """
    try:
        losses = (_losses(folder), _losses(again))
        adapters = (_weights(folder), _weights(again))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} and {again} cannot be compared: {gist(error)}") from None
    nlls = [
        {(split, moment): score.nll for split, moments in one.scores.items() for moment, score in moments.items()}
        for one in (old, new)
    ]
    keys = sorted(nlls[0])
    scores = [[found.get(key, math.nan) for key in keys] for found in nlls]
    return Difference(losses=_apart(*losses), scores=_apart(*scores), adapter=_adapters_apart(*adapters))


def _apart(one: Sequence[float], two: Sequence[float]) -> float:
    if len(one) != len(two):
        return math.inf
    found = [0.0]
    for a, b in zip(one, two, strict=True):
        if a == b or (math.isnan(a) and math.isnan(b)):
            continue
        apart = abs(a - b) / max(abs(a), 1e-12)
        found.append(apart if math.isfinite(apart) else math.inf)
    return max(found)


def _adapters_apart(one: Mapping[str, Any], two: Mapping[str, Any]) -> float:
    """The largest difference of a tensor's values over the largest of its values."""
    if one.keys() != two.keys() or any(one[name].shape != two[name].shape for name in one):
        return math.inf
    found = [0.0]
    for name, values in one.items():
        if not values.equal(two[name]):
            apart = (values.double() - two[name].double()).abs().max() / values.double().abs().max().clamp(min=1e-12)
            found.append(float(apart) if math.isfinite(float(apart)) else math.inf)
    return max(found)


def _losses(folder: Path) -> list[float]:
    rows = [record.read_json(line) for line in record.read_text(folder / record.METRICS).splitlines()]
    return [math.nan if row["loss"] is None else float(row["loss"]) for row in rows if "loss" in row]


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, values in load_file(path).items():
            found[f"{path.relative_to(folder)}:{name}"] = values
    return found


def _read_words(words: Sequence[str]) -> tuple[list[Path], bool, list[str]]:
    parser = argparse.ArgumentParser(prog=f"train.py {FLAG}", add_help=False, allow_abbrev=False)

    def refuse(message: str) -> NoReturn:
        raise SpecError(f"{FLAG}: {message}. Give {FLAG} RECORD, {PACK}, and settings such as study=... sweep.*")

    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument(FLAG, dest="paths", nargs="+", required=True)
    parser.add_argument(PACK, dest="pack", action="store_true")
    found, rest = parser.parse_known_args(list(words))
    given = [*found.paths, *rest]
    paths = [word for word in given if "=" not in word or Path(word).exists()]
    for word in paths:
        if word.startswith("-"):
            refuse(f"{word}: no such flag")
    settings = [word for word in given if word not in paths]
    strange = [word for word in settings if not is_setting(word.partition("=")[0].lstrip("+~"))]
    if strange:
        raise Problems(
            f"{word}: a record says what is trained; beside {FLAG} go study, output_root, plugins, trainer.device, "
            "tracking and sweep.*" for word in strange
        )  # fmt: skip
    if not paths:
        refuse("which record?")
    return [Path(word) for word in dict.fromkeys(paths)], found.pack, settings


def _read(path: Path) -> Former:
    """The run of a record, given by the record's file or the folder that it lies in."""
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name != record.RECORD:
        raise SpecError(f"{FLAG} {path}: give a run's {record.RECORD}, or its folder")
    try:
        found = record.read_record(folder)
        spec = run_spec(found.spec)
    except FileNotFoundError:
        raise DataError(f"{FLAG} {path}: no such record") from None
    except (OSError, ValueError, KeyError, TypeError, SweeperError) as error:
        told = str(error).removeprefix(f"{folder / record.RECORD}: ")
        raise DataError(f"{FLAG} {path}: it cannot be repeated ({told.splitlines()[0]})") from None
    if found.status not in record.COMPLETED:
        raise DataError(f"{FLAG} {path}: the run was {found.status}, so there is nothing to compare with")
    spec = bare(spec)
    start = spec.trainer.init_from
    if start is not None and (folder.parent / start).is_dir():  # named by its id, in the study that it was in
        spec = replace(spec, trainer=replace(spec.trainer, init_from=str(folder.parent / start)))
    return Former(record=found, folder=folder, spec=spec)


def _packs_of(formers: Sequence[Former]) -> list[Former]:
    """Some runs and those that shared a pack with them, by their records, in the order of its slots."""
    found: dict[str, Former] = {}
    for former in formers:
        pack = former.record.environment.get("pack")
        if not isinstance(pack, list) and former.record.efficiency.pack_runs > 1:
            raise DataError(f"{PACK}: {former.folder / record.RECORD} does not say which runs shared its pack")
        for run_id in map(str, pack or [former.record.run_id]):
            mine = run_id == former.record.run_id
            found.setdefault(run_id, former if mine else _read(former.folder.parent / Path(run_id).name))
    return list(found.values())


def _settings(words: Sequence[str], formers: Sequence[Former]) -> Settings:
    """The settings of the command, in a study that has none of these runs unless it was given."""
    given = {word.partition("=")[0] for word in words}
    more = [] if "sweep.calibrate" in given else ["sweep.calibrate=false"]
    found = config.expand([*words, *more], config.composer_of()).settings
    folders = {former.folder.resolve() for former in formers}
    if "study" in given:
        if found.folder.resolve() in {folder.parent for folder in folders}:
            raise SpecError(f"study={found.study}: the record lies there, and what is recorded stays; give another one")
        return found
    base = f"{formers[0].record.study or 'study'}_repeat"
    for number in range(1, 10_000):
        chosen = replace(found, study=base if number == 1 else f"{base}{number}")
        statuses = {record.status(chosen.folder / former.record.run_id) for former in formers}
        if statuses == {None} or not chosen.folder.exists():
            return chosen
    raise SpecError(f"{found.output_root}: {base} and 9,999 others are there; give study=...")


def _here(settings: Settings) -> dict[str, Any]:
    from sweeper.training import environment

    return environment.describe(device.device_for(settings.device), None)


def _fix_precision(settings: Settings, formers: Sequence[Former]) -> Path | None:
    """Has `trainer.precision=auto` be what it was: a busy CPU's measurement would turn it to the other.

    Returns the file that says so, where it was written now.
    """
    auto = [former for former in formers if former.spec.trainer.precision == "auto"]
    known = {str(former.record.environment.get("precision")) for former in auto} - {"None"}
    if len(known) > 1:
        raise SpecError(f"{FLAG}: these runs trained in {' and '.join(sorted(known))}; repeat those of one at a time")
    path = settings.folder / device.PRECISION
    if not known or path.exists() or settings.dry_run:
        return None
    record.write_first(path, {"auto": known.pop()})
    return path


def _changed(there: Any, here: Any) -> str:
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return f"then {there}, now {here}"
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} then {there.get(name, 'absent')}, now {here.get(name, 'absent')}" for name in names)
