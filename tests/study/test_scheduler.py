"""What the scheduler does with runs that were lost or failed."""

from collections.abc import Callable
from typing import Any

import pytest

from sweeper import record
from sweeper.arms import grouped
from sweeper.record import Record
from sweeper.spec import RunSpec, Settings
from sweeper.study import scheduler
from sweeper.study.scheduler import Scheduler
from sweeper.training.events import Event, RunFinished, RunQueued


@pytest.fixture
def specs(make_spec: Callable[..., RunSpec]) -> list[RunSpec]:
    return [make_spec(rank=rank, seed=seed) for rank in (4, 8) for seed in (0, 1)]


@pytest.fixture
def seen() -> list[Event]:
    return []


@pytest.fixture
def work(specs: list[RunSpec], study: Settings, seen: list[Event]) -> Scheduler:
    return Scheduler(grouped(specs), [spec.run_id for spec in specs], study, observers=[seen.append])


def everything(work: Scheduler) -> list[str]:
    pulled = work.pull(100, [kind.key for kind in work.pending()])
    assert not pulled.more
    return [request.run_id for request in pulled.runs]


def test_runs_are_handed_out_once_in_the_order_of_the_grid(
    work: Scheduler, specs: list[RunSpec], seen: list[Event]
) -> None:
    kinds = work.pending()
    assert [kind.most for kind in kinds] == [2, 2]
    first = work.pull(3, [kind.key for kind in kinds])
    assert first.more
    assert [request.run_id for request in first.runs] == [spec.run_id for spec in specs[:3]]
    assert everything(work) == [specs[3].run_id]
    assert not work.pending()
    assert [event.run_id for event in seen if isinstance(event, RunQueued)] == [spec.run_id for spec in specs]


def test_a_spread_part_of_a_grid_is_of_all_of_it(work: Scheduler, specs: list[RunSpec]) -> None:
    kinds = [kind.key for kind in work.pending()]
    first = work.pull(2, kinds[::-1], spread=True)
    assert [request.run_id for request in first.runs] == [specs[0].run_id, specs[2].run_id]
    assert first.more
    rest = work.pull(9, kinds, spread=True)
    assert [request.run_id for request in rest.runs] == [specs[1].run_id, specs[3].run_id]
    assert not rest.more
    assert work.outstanding() == 4


def test_two_commands_share_a_grid_and_train_no_run_twice(
    work: Scheduler, specs: list[RunSpec], study: Settings, make_record: Any
) -> None:
    def command() -> Scheduler:
        return Scheduler(grouped(specs), [spec.run_id for spec in specs], study)

    other = command()
    kinds = [kind.key for kind in work.pending()]
    ours = work.pull(2, kinds).runs
    assert [request.run_id for request in ours] == [spec.run_id for spec in specs[:2]]
    assert everything(other) == [spec.run_id for spec in specs[2:]]
    assert (work.elsewhere(), other.elsewhere()) == (0, 2)
    assert everything(work) == []
    assert work.elsewhere() == 2
    done = make_record(specs[0], study=study.study)
    ours[0].folder.mkdir(parents=True)
    record.write_record(ours[0].folder, done)
    work.report(RunFinished(record=done))
    assert other.elsewhere() == 1
    third = command()
    assert everything(third) == []  # one is done, three are being trained
    work.close()  # as a command that is stopped
    last = command()
    assert everything(last) == [specs[1].run_id]
    for one in (other, third, last):
        one.close()
    assert not (study.folder / ".claims").exists()


def test_only_the_kinds_that_were_asked_for_are_handed_out(work: Scheduler, specs: list[RunSpec]) -> None:
    second = work.pending()[1].key
    assert [request.run_id for request in work.pull(9, [second]).runs] == [spec.run_id for spec in specs[2:]]


def test_a_lost_run_goes_to_another_worker_but_not_for_ever(
    work: Scheduler, specs: list[RunSpec], study: Settings
) -> None:
    everything(work)
    victim = specs[1].run_id
    for _ in range(scheduler.MOST_WORKERS_LOST - 1):
        work.lose([victim], "gone")
        assert everything(work) == [victim]
    work.lose([victim], "gone")
    assert not work.pending()
    left = record.read_record(study.folder / victim)
    assert (left.status, left.error) == ("failed", {"class": "WorkerDied", "message": "gone"})
    assert work.records[victim].status == "failed"


def test_a_run_that_is_not_training_cannot_be_lost(work: Scheduler, specs: list[RunSpec]) -> None:
    work.lose([specs[0].run_id], "gone")
    assert len(everything(work)) == 4


@pytest.mark.parametrize(("error", "again"), [("OSError", True), ("RuntimeError", True), ("OutOfMemoryError", False),
                                              ("DataError", False)])  # fmt: skip
def test_a_failure_that_may_pass_is_tried_once_more(
    error: str,
    again: bool,
    work: Scheduler,
    specs: list[RunSpec],
    seen: list[Event],
    make_record: Callable[..., Record],
) -> None:
    everything(work)
    failed = make_record(specs[0], status="failed", scores={}, error={"class": error, "message": "why"})
    work.report(RunFinished(record=failed))
    assert everything(work) == ([specs[0].run_id] if again else [])
    if again:
        work.report(RunFinished(record=failed))
        assert not work.pending()
    told = [event for event in seen if isinstance(event, RunFinished)]
    assert len(told) == 1
    assert work.records[specs[0].run_id].status == "failed"


def test_how_much_is_outstanding_counts_what_trains_and_what_waits(
    work: Scheduler, specs: list[RunSpec], make_record: Any
) -> None:
    assert work.outstanding() == 4
    work.pull(2, [kind.key for kind in work.pending()])
    assert work.outstanding() == 4
    work.report(RunFinished(record=make_record(specs[0])))
    assert work.outstanding() == 3
