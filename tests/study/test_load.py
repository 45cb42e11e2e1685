"""A study of many runs stays usable: what a command does for each of them is little, and holds little."""

import time
from pathlib import Path
from typing import Any

import pytest

import sweeper
from benchmarks import load
from sweeper import config, naming, spec
from sweeper.reporting import summary
from sweeper.spec import RunSpec, canonical_json, run_spec, to_mapping
from sweeper.study import plan as planning
from sweeper.study.scheduler import lean

RUNS = 1000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    assert load.write(folder, RUNS, records_alone=True) == RUNS
    return folder


def test_a_thousand_runs_are_planned_listed_and_summed_up_in_seconds(root: Path, tmp_path: Path) -> None:
    """Seconds of this process, ten times what it took: only what grows faster than the runs is to be found."""
    began = time.process_time()
    found = config.expand(load.overrides(root, RUNS), config.composer_of())
    plan = planning.make(found.arms, found.settings)
    assert plan.todo == ()
    assert len(plan.runs) == RUNS
    study = sweeper.load_study(root / "load")
    summary.write(tmp_path, [one.record for one in study.runs])
    assert time.process_time() - began < 30
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == RUNS + 2


def test_what_each_run_is_asked_is_worked_out_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[Any] = []
    flats: list[Any] = []
    monkeypatch.setattr(spec, "canonical_json", lambda one: texts.append(one) or canonical_json(one))
    real = naming.flat
    monkeypatch.setattr(naming, "flat", lambda one: flats.append(one) or real(one))
    study = sweeper.load_study(root / "load")
    records = [one.record for one in study.runs]
    assert len(texts) == RUNS  # as each spec is checked
    summary.write(tmp_path, records)
    assert len(flats) <= RUNS + 10


def test_ids_are_those_of_the_plain_text(root: Path) -> None:
    for one in list(sweeper.load_study(root / "load").runs)[:20]:
        assert run_spec(to_mapping(one.spec)).run_id == one.run_id == one.spec.run_id
    assert isinstance(one.spec, RunSpec)


def test_runs_of_a_study_share_their_sections(root: Path) -> None:
    specs = [one.spec for one in sweeper.load_study(root / "load").runs]
    assert len({id(one.model) for one in specs}) == 1
    assert len({id(one.placement) for one in specs}) == len(load.PLACEMENTS)


def test_the_scheduler_keeps_of_a_record_what_it_needs(root: Path) -> None:
    whole = sweeper.load_study(root / "load").runs[0].record
    kept = lean(whole)
    assert (kept.modules, kept.environment, kept.data) == ((), {}, {})
    assert (kept.run_id, kept.status, kept.scores, kept.efficiency) == (
        whole.run_id, whole.status, whole.scores, whole.efficiency
    )  # fmt: skip
