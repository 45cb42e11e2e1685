"""Runs that begin with the adapter that another run left: whether they fit it, and who waits for whom."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from sweeper import predecessor, record
from sweeper.errors import Problems, SpecError, SweeperError
from sweeper.run import Run
from sweeper.spec import ModelSpec, RunSpec, alone, run_spec

if TYPE_CHECKING:
    from sweeper.lora.forms import AdapterSpec
    from sweeper.lora.trainee import UnpackedSpec
    from sweeper.methods.method import Ranks

CAN = "lora, rslora, lora_plus and lora_fa"


def former_of(spec: RunSpec, study: Path) -> str | None:
    """The run of the study that a run begins from; None where it begins afresh, or from one elsewhere."""
    given = spec.trainer.init_from
    return None if given is None else predecessor.in_study(given, study)


@dataclass
class Waiting:
    """Runs of a command that cannot begin before another of its runs has left its adapter, by that run's id."""

    after: dict[str, list[Run]] = field(default_factory=dict)

    def add(self, former: str, run: Run) -> None:
        self.after.setdefault(former, []).append(run)

    def take(self, former: str) -> list[Run]:
        """Those that waited for a run, which has ended."""
        return self.after.pop(former, [])

    def count(self, arm: str, elsewhere: Collection[str] = ()) -> int:
        """Runs of an arm that wait for one of this command: what waits for runs `elsewhere` is not waited for here."""
        gone, seen = set(elsewhere), -1
        while len(gone) > seen:
            seen = len(gone)
            gone |= {run.run_id for former, runs in self.after.items() if former in gone for run in runs}
        return sum(run.arm == arm and run.run_id not in gone for runs in self.after.values() for run in runs)


def check(
    specs: Sequence[RunSpec], runs: Mapping[str, Run], done: Collection[str], tuned: Collection[str], study: Path
) -> None:
    """Raises `Problems` with a line for every run that cannot begin as it is to.

    Args:
        runs: those of the command, by id. done: ids of those that it does not train. tuned: ids of trials of a search.
    """
    problems = dict.fromkeys(_problems([spec for spec in specs if spec.trainer.init_from], runs, done, tuned, study))
    if problems:
        raise Problems(list(problems))


def changed(runs: Sequence[Run], study: Path) -> Iterator[str]:
    """A line for each finished run that began with other values than its predecessor in the study has now."""
    for run in runs:
        former = former_of(run.spec, study)
        if former is None:
            continue
        try:
            began, now = record.read_record(run.folder).init_from.get("digest"), predecessor.digest(study / former)
        except (OSError, ValueError, KeyError, TypeError, SpecError):  # nothing left to compare with
            continue
        if began is not None and began != now:
            yield f"{run.run_id} began from {former} before that was trained anew: their adapters differ now"


def _problems(
    specs: Sequence[RunSpec], runs: Mapping[str, Run], done: Collection[str], tuned: Collection[str], study: Path
) -> Iterator[str]:
    known: dict[str, tuple[RunSpec, Ranks]] = {}
    for spec in specs:
        given = spec.trainer.init_from
        assert given is not None
        try:
            former = predecessor.in_study(given, study)
            if former == spec.run_id:
                raise SpecError(f"trainer.init_from={given}: a run cannot begin from itself")
            pending = former in runs and former not in done
            if pending and (former in tuned or spec.run_id in tuned):
                raise SpecError(
                    f"trainer.init_from={given}: that run is still to train, and searches do not wait: train it first"
                )
            if given not in known:
                known[given] = _planned(runs[former].spec) if former and pending else _recorded(given, study)
            fit(spec, *known[given])
        except SweeperError as error:
            yield from error.lines


def _planned(spec: RunSpec) -> "tuple[RunSpec, Ranks]":
    """A run that is still to train, with the ranks that its adapter will have."""
    from sweeper import methods, models

    ranks = methods.module_ranks(spec, models.skeleton(spec.model), tied=models.is_tied(spec.model))
    return spec, methods.trained_ranks(spec, ranks)


def _recorded(given: str, study: Path) -> "tuple[RunSpec, Ranks]":
    from sweeper import models

    found = predecessor.completed(given, study)
    spec = run_spec(found.spec)
    ranks = {module.name: module.rank for module in found.modules}
    try:
        every = models.skeleton(spec.model)
    except SweeperError as error:
        raise SpecError(f"trainer.init_from={given}: its base model is not here ({error})") from None
    return spec, {target: ranks[target.name] for target in every if target.name in ranks}


def fit(spec: RunSpec, former: RunSpec, before: "Ranks") -> None:
    """Raises SpecError where a run cannot go on from the adapter of another with these ranks."""
    from sweeper import methods, models
    from sweeper.methods import sharing
    from sweeper.placement import importance

    start = f"trainer.init_from={spec.trainer.init_from}"
    if not _same(spec.model, former.model):
        other = f"model={former.model.name}" if former.model.name != spec.model.name else "other weights of that name"
        raise SpecError(f"{start}: that run is on {other}, this one on model={spec.model.name}")
    ranks = methods.module_ranks(spec, models.skeleton(spec.model), tied=models.is_tied(spec.model))
    made = methods.adapter(spec, ranks)
    if not _plain(made):
        raise SpecError(f"{start}: method={spec.method.name} cannot go on from an adapter; {CAN} can")
    if made.blocks:
        raise SpecError(f"{start}: sharing={spec.sharing.name} has several rank blocks, and a run goes on with one")
    if former.sharing.name != "merge" and sharing.SHARINGS[former.sharing.name](former):
        raise SpecError(f"{start}: that run has sharing={former.sharing.name}, an adapter for each of its tasks")
    left = methods.adapter(alone(former), before)
    if not _plain(left):
        raise SpecError(f"{start}: method={former.method.name} leaves nothing to go on from; {CAN} do")
    _same_shape(start, made, left, ranked=importance.probing(spec) is None)


def _plain(adapter: "AdapterSpec | UnpackedSpec") -> "TypeGuard[AdapterSpec]":
    """Whether an adapter is A and B of LoRA, all of whose ranks train or stay together."""
    from sweeper.lora.forms import AdapterSpec

    if not isinstance(adapter, AdapterSpec):
        return False
    whole = not adapter.trained and adapter.restarts is None and adapter.sparsity is None
    return adapter.form == "lora" and adapter.begin == "uniform" and whole


def _same_shape(start: str, made: "AdapterSpec", left: "AdapterSpec", *, ranked: bool) -> None:
    """Raises SpecError for other modules, ranks (if they are known: `ranked`) or scales."""
    only = sorted(set(made.ranks) ^ set(left.ranks))
    if only:
        whose = "this run" if only[0] in made.ranks else "that run"
        raise SpecError(f"{start}: other modules: {only[0]}{' and others' * (len(only) > 1)} of {whose} alone")
    for name, rank in made.ranks.items():
        if ranked and rank != left.ranks[name]:
            raise SpecError(f"{start}: {name} has rank {left.ranks[name]} there and {rank} here")
        if abs(made.scales[name] / left.scales[name] - 1) > 1e-9:
            raise SpecError(
                f"{start}: another scale, {left.scales[name]:g} there, {made.scales[name]:g} here; it is alpha / rank, "
                "or alpha / sqrt(rank) with method.rank_stabilised"
            )


def _same(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two models are the same weights, as far as is known."""
    if one.content and other.content:
        return one.content == other.content
    plain = [(m.source, m.location, m.revision, m.roles, m.config) for m in (one, other)]
    return plain[0] == plain[1]
