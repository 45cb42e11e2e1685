"""Which run a spec is, its files included: contents are filled in where a command begins, and looked at again later.

Records of earlier versions say nothing of files. Such a run stays what it is, under its old id, as long as every file
is older than the run; else it is another run.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sweeper import predecessor, record, register
from sweeper.arms import Arm, Params
from sweeper.content import COMMIT, NONE, Content
from sweeper.errors import DataError, ModelError, SweeperError
from sweeper.record import Record
from sweeper.spec import DatasetSpec, ModelSpec, RunSpec, bare, placed_by_content

Section = ModelSpec | DatasetSpec


def now(section: Section) -> Content:
    """What lies behind a model or dataset now.

    Raises:
        SweeperError: its files cannot be read.
    """
    from sweeper import models, tasks

    return models.content(section) if isinstance(section, ModelSpec) else tasks.content(section)


def confirmed(section: Section) -> str | None:
    """What lies behind a model or dataset, in the words of a record; it must still be what its spec says.

    Raises:
        SweeperError: it has changed since the command began, or is another one on this machine.
    """
    for part in getattr(section, "parts", ()):
        confirmed(part)
    if (section.content or "").startswith(COMMIT):  # which is what is asked for by name
        return section.content
    found = now(section).told
    if section.content is not None and found != section.content:
        raise _error(section)(
            f"{place(section)} is not what it was when the command began (then {short(section.content)}, now "
            f"{short(found)}): the same command, given again, trains on what is there"
        )
    return found


def known(dataset: DatasetSpec) -> DatasetSpec:
    """A dataset with its code, and its content where that can be had."""
    here = register.FOUND.get(("dataset", dataset.family))
    try:
        return replace(dataset, content=now(dataset).text, code=None if here is None else here.code)
    except SweeperError:  # its check says so
        return dataset


def place(section: Section) -> str:
    """What a section's files are called on the command line."""
    name = "model" if isinstance(section, ModelSpec) else "dataset"
    where = getattr(section, section.PLACE)
    return f"{name}={section.name}" if where is None else f"{name}.{section.PLACE}={where}"


def short(content: str | None) -> str:
    """A content for a message."""
    return "unknown" if content is None else content[:19]


@dataclass
class Identities:
    """What the specs of one command are in a study, its files looked at once.

    Attributes:
        notes: lines on runs under old ids that are trained anew.
    """

    study: Path
    _contents: dict[str, Content] = field(default_factory=dict)
    _former: dict[str, bool] = field(default_factory=dict)
    _anew: dict[str, set[str]] = field(default_factory=dict)  # why -> runs

    def __call__(self, spec: RunSpec) -> RunSpec:
        """The spec with its contents; as it is where a run of an earlier version stands for it."""
        found = self._with_files(spec)
        if found.trainer.init_from is None:
            return found
        return replace(found, trainer=predecessor.identified(found.trainer, self.study))

    def _with_files(self, spec: RunSpec) -> RunSpec:
        typed = bare(spec)
        found = {name: self._content(getattr(spec, name)) for name in ("model", "dataset")}
        known = {name: one for name, one in found.items() if one.text is not None}
        coded = register.coded(typed)
        if not known:
            return coded
        parts: dict[str, Any] = {name: self._filled(getattr(coded, name), one) for name, one in known.items()}
        whole = replace(coded, **parts)
        if coded is not typed:  # earlier versions knew nothing of code
            return whole
        if typed.run_id not in self._former:
            self._former[typed.run_id] = self._stays(typed, whole, known)
        return typed if self._former[typed.run_id] else whole

    def arms(self, arms: Sequence[Arm]) -> list[Arm]:
        """Arms of specs with their contents; of those that turn out equal, one."""
        found: dict[str, Arm] = {}
        for arm in map(self._arm, arms):
            found.setdefault(arm.key, arm)
        return list(found.values())

    @property
    def notes(self) -> list[str]:
        return [
            f"{len(runs)} run{'s' if len(runs) > 1 else ''} in {self.study} trained anew: {why}"
            for why, runs in self._anew.items()
        ]

    def changed(self, specs: Sequence[RunSpec]) -> Iterator[str]:
        """A line for each file or folder of runs to train that was another for runs of the study, which stay."""
        found = {repr(section): section for spec in specs for section in (spec.model, spec.dataset)}
        for section in found.values():
            if placed_by_content(section) is None:
                continue
            where, name = getattr(section, section.PLACE), "model" if isinstance(section, ModelSpec) else "dataset"
            parts = [one.spec[name] for one in self._records(json.dumps(where))]
            other = [one for one in parts if one.get(section.PLACE) == where and one.get("content")]
            count = sum(one["content"] != section.content for one in other)
            if count:
                runs = "a run" if count == 1 else f"{count} runs"
                yield f"{place(section)} has changed since {runs} in {self.study}, kept as they are"

    def plugin_of(self, group: str, name: str) -> str | None:
        """The module or file that an option of a run of the study was registered by, if any was."""
        key = register.KEYS[group]
        for one in self._records('"plugin": '):
            section = one.spec.get(group, {})
            if section.get("code") and section.get(key) == name:
                return str(section["code"]["plugin"])
        return None

    def _arm(self, arm: Arm) -> Arm:
        def make(params: Params, seed: int) -> RunSpec:
            return self(arm.make(params, seed))

        defaults = {spec.run_id: spec for spec in map(self, arm.defaults)}
        made = replace(arm, defaults=tuple(defaults.values()), make=make)
        if arm.space and made.key != arm.key and self._goes_on(arm):
            return replace(made, known_as=arm.key)
        return made

    def _filled(self, section: Section, content: Content) -> Section:
        """A section with its content; one made of several tasks with the content of each."""
        if isinstance(section, DatasetSpec) and section.parts:
            parts = tuple(replace(part, content=self._content(part).text) for part in section.parts)
            return replace(section, parts=parts)
        return replace(section, content=content.text)

    def _content(self, section: Section) -> Content:
        typed = replace(section, content=None)
        key = repr(typed)
        if key not in self._contents:
            try:
                self._contents[key] = now(typed)
            except SweeperError:  # gone; runs that are done need it no more, and for others the plan's check says so
                self._contents[key] = NONE if section.content is None else Content(section.content)
                self._contents[key] = self._remembered(typed) or self._contents[key]
        return self._contents[key]

    def _remembered(self, section: Section) -> Content | None:
        """What the study's runs say of files that are gone, if all say the same."""
        name = "model" if isinstance(section, ModelSpec) else "dataset"
        found = set()
        for one in self._records(json.dumps(getattr(section, section.PLACE))):
            part = one.spec[name]
            if part.get(section.PLACE) == getattr(section, section.PLACE) and part.get("content"):
                found.add(str(part["content"]))
        return Content(found.pop()) if len(found) == 1 else None

    def _stays(self, typed: RunSpec, whole: RunSpec, known: dict[str, Content]) -> bool:
        """Whether a run of an earlier version, in the folder of the typed spec, was made with what there is now."""
        if record.status(self.study / whole.run_id) is not None:
            return False
        former = _made_with(self.study / typed.run_id)
        if former is None:
            return False
        changed = [name for name, one in known.items() if not former.same(name, one)]
        if changed:
            self._note(typed, changed, typed.run_id, former)
        elif "model" in known and not former.contents and (why := _other_tokens(typed)) is not None:
            self._anew.setdefault(why, set()).add(typed.run_id)
            return False
        return not changed

    def _goes_on(self, arm: Arm) -> bool:
        """Whether the search of an arm that an earlier version began has only seen what there is now."""
        runs = [one for one in self._records(f'"arm": "{arm.key}"') if one.search.get("arm") == arm.key]
        contents = {name: self._content(getattr(arm.default, name)) for name in ("model", "dataset")}
        known = {name: one for name, one in contents.items() if one.text is not None}
        for one in runs:
            former = former_of(one)
            if "model" in known and not former.contents and (why := _other_tokens(arm.default)) is not None:
                self._anew.setdefault(why, set()).add(one.run_id)
                return False
            changed = [name for name, content in known.items() if not former.same(name, content)]
            if changed:
                self._note(arm.default, changed, one.run_id, former)
                return False
        return bool(runs)

    def _note(self, spec: RunSpec, changed: Sequence[str], run_id: str, former: "Former") -> None:
        sections = " and ".join(place(getattr(spec, name)) for name in changed)
        said = all(name in former.contents for name in changed)
        why = f"{sections} has changed" if said else f"{sections} may have changed since, their records do not say"
        self._anew.setdefault(why, set()).add(run_id)

    def _records(self, wanted: str) -> Iterator[Record]:
        """Records of the study with a text in them."""
        for path in sorted(self.study.glob(f"*/{record.RECORD}")):
            try:
                if wanted in path.read_text():
                    yield record.read_record(path.parent)
            except (OSError, ValueError, KeyError, TypeError):
                continue


@dataclass(frozen=True, kw_only=True)
class Former:
    """When a run began, and what it says of its model and dataset: nothing, if an earlier version made it."""

    started: float | None
    contents: dict[str, str | None]

    def same(self, name: str, content: Content) -> bool:
        if name in self.contents:
            return self.contents[name] == content.told
        return self.started is not None and content.changed < self.started


def _made_with(folder: Path) -> Former | None:
    """Of a run's record, or of the checkpoint of one that was cut off; None where there is neither."""
    if record.status(folder) is not None:
        try:
            found = record.read_record(folder)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return former_of(found)
    progress = record.checkpoint_progress(folder)
    if progress is None:
        return None
    return Former(started=_seconds(progress.get("started")), contents=dict(progress.get("content") or {}))


def former_of(found: Record) -> Former:
    """What a record says."""
    contents = dict(found.environment.get("content") or {})
    for name in ("model", "dataset"):
        if found.spec[name].get("content"):
            contents[name] = found.spec[name]["content"]
    return Former(started=_seconds(found.started), contents=contents)


def changes(spec: RunSpec, former: Former, names: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """A line for each part of a finished run whose files are not what they were, and whether that is certain.

    Where the run says nothing of them, files that are newer than it are not.
    """
    for name in names:
        section: Section = getattr(spec, name)
        if (section.content or "").startswith(COMMIT):  # which is what is read
            continue
        try:
            found = now(replace(section, content=None))
        except SweeperError:  # the check of what is read says so
            continue
        if former.same(name, found) or (name not in former.contents and found.text is None):
            continue
        if name in former.contents:
            told = f"then {short(former.contents[name])}, now {short(found.told)}"
            yield f"{place(section)} is not what it was when the run was trained ({told})", True
        else:
            yield f"{place(section)} is newer than the run, whose record says nothing of what was in it", False


def _seconds(when: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(when)).timestamp()
    except ValueError:
        return None


def _other_tokens(spec: RunSpec) -> str | None:
    """Why earlier versions made other tokens of the same data for a model, if they did."""
    from sweeper import models
    from sweeper.tasks.template import puts_space_first

    try:
        if spec.dataset.template == "chat" and models.dates_prompts(spec.model):
            return f"the chat template of {place(spec.model)} wrote the day's date into prompts, which is fixed now"
        if puts_space_first(models.tokenizer_of(spec.model)):
            return f"the tokenizer of {place(spec.model)} put a space before each response that its text has not"
    except (SweeperError, OSError):  # the plan's check says so
        pass
    return None


def _error(section: Section) -> Callable[[str], SweeperError]:
    return ModelError if isinstance(section, ModelSpec) else DataError
