"""Runs that begin from others: what the scheduler gives out when, and what a command line says of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from sweeper import config, record
from sweeper.arms import grouped
from sweeper.errors import Problems
from sweeper.record import Record
from sweeper.spec import RunSpec, Settings
from sweeper.study import chain
from sweeper.study.claims import Claims
from sweeper.study.scheduler import Scheduler
from sweeper.training.events import Event, RunFinished, RunQueued

Specs = dict[str, RunSpec]


@pytest.fixture
def specs(make_spec: Callable[..., RunSpec]) -> Specs:
    """A, B from A, C from B, and D by itself."""
    found = {"A": make_spec(rank=4), "D": make_spec(rank=8)}
    for name, former, lr in (("B", "A", 1e-2), ("C", "B", 1e-3)):
        spec = make_spec(rank=4, optim={"lr": lr})
        trainer = dataclasses.replace(spec.trainer, init_from=found[former].run_id)
        found[name] = dataclasses.replace(spec, trainer=trainer)
    return found


@pytest.fixture
def seen() -> list[Event]:
    return []


@pytest.fixture
def work(specs: Specs, study: Settings, seen: list[Event]) -> Scheduler:
    chosen = [specs[name] for name in "CBDA"]
    return Scheduler(grouped(chosen), [spec.run_id for spec in chosen], study, observers=[seen.append])


def pull(work: Scheduler, specs: Specs, count: int = 9) -> tuple[str, bool]:
    """Names of the runs that are given out, and whether more may come."""
    names = {spec.run_id: name for name, spec in specs.items()}
    pulled = work.pull(count, [group.key for group in work.pending()])
    return "".join(names[run.run_id] for run in pulled.runs), pulled.more


def ends(work: Scheduler, spec: RunSpec, make_record: Callable[..., Record], status: Any = "completed") -> None:
    found = make_record(run_id=spec.run_id, status=status)
    (work.settings.folder / spec.run_id).mkdir(parents=True, exist_ok=True)
    record.write_record(work.settings.folder / spec.run_id, found)
    work.report(RunFinished(record=found))


def test_a_run_is_given_out_when_the_one_it_begins_from_is_there(
    work: Scheduler, specs: Specs, make_record: Callable[..., Record]
) -> None:
    assert [group.ready for group in work.pending()] == [False, False, True, True]
    assert work.outstanding() == 2
    assert pull(work, specs) == ("DA", True)
    assert pull(work, specs) == ("", True)  # whoever has a free slot is to ask again
    ends(work, specs["D"], make_record)
    assert pull(work, specs) == ("", True)
    ends(work, specs["A"], make_record)
    assert work.outstanding() == 1
    assert pull(work, specs) == ("B", True)
    ends(work, specs["B"], make_record)
    assert pull(work, specs) == ("C", False)
    ends(work, specs["C"], make_record)
    assert not work.pending()


def test_a_run_that_is_lost_and_tried_again_is_still_waited_for(
    work: Scheduler, specs: Specs, make_record: Callable[..., Record]
) -> None:
    assert pull(work, specs) == ("DA", True)
    work.lose([specs["A"].run_id], "a worker died")
    assert pull(work, specs) == ("A", True)
    work.report(RunFinished(record=make_record(run_id=specs["A"].run_id, status="failed", error={"class": "OSError"})))
    assert pull(work, specs) == ("A", True)
    ends(work, specs["A"], make_record)
    assert pull(work, specs) == ("B", True)


@pytest.mark.parametrize(
    ("status", "words"), [("failed", "failed"), ("diverged", "diverged"), ("pruned", "was pruned")]
)
def test_what_leaves_nothing_to_begin_with_fails_those_that_wait(
    status: str, words: str, work: Scheduler, specs: Specs, seen: list[Event], make_record: Callable[..., Record]
) -> None:
    pull(work, specs)
    error = {"class": "ValueError", "message": "no"} if status == "failed" else None
    found = make_record(run_id=specs["A"].run_id, status=status, error=error)
    work.report(RunFinished(record=found))
    assert work.records[specs["B"].run_id].error == {
        "class": "SpecError", "message": f"the run that it begins from, {specs['A'].run_id}, {words}"
    }  # fmt: skip
    assert f"{specs['B'].run_id}, failed" in (work.records[specs["C"].run_id].error or {})["message"]
    queued = [event.run_id for event in seen if isinstance(event, RunQueued)]
    assert len(queued) == len(set(queued)) == 4
    assert set(work.running) == {specs["D"].run_id}
    assert not work.pending()
    assert record.status(work.settings.folder / specs["C"].run_id) == "failed"


def test_a_run_that_another_command_trains_is_not_waited_for_but_found(
    work: Scheduler, specs: Specs, study: Settings, make_record: Callable[..., Record]
) -> None:
    other = Claims(study.folder)
    assert other.take(specs["A"].run_id)
    assert pull(work, specs)[0] == "D"
    assert not work.pending()  # nor for what begins from what begins from it
    assert work.elsewhere() == 1
    other.give_back(specs["A"].run_id)
    found = make_record(run_id=specs["A"].run_id)
    (study.folder / specs["A"].run_id).mkdir(parents=True)
    record.write_record(study.folder / specs["A"].run_id, found)
    assert pull(work, specs) == ("B", True)


def test_an_axis_takes_null_and_ids(composer: Any) -> None:
    given = ["model=tiny_llama", "dataset=chain_sum", "trainer.init_from=null,0123456789ab,123456789012"]
    found = config.expand(given, composer)
    assert [arm.default.trainer.init_from for arm in found.arms] == [None, "0123456789ab", "123456789012"]
    assert len({arm.key for arm in found.arms}) == 3


def test_a_run_does_not_begin_from_itself(specs: Specs, study: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can type the id that follows from what is typed; a folder may be a link to it."""
    spec = specs["B"]
    monkeypatch.setattr("sweeper.predecessor.in_study", lambda given, folder: spec.run_id)
    with pytest.raises(Problems, match="a run cannot begin from itself"):
        chain.check([spec], {}, (), (), study.folder)
