import json
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import analyse, load
from sweeper import record
from tests.analysis.synthetic import edit, write_study


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_study(tmp_path / "small", ranks=(4,), seeds=(0, 1), examples=30, steps=5, modules=False)


def test_a_row_a_run_with_spec_scores_and_costs(small: Path) -> None:
    runs = load(small).runs
    assert len(runs) == 6
    row = runs[runs["placement"] == "attn"].iloc[0]
    assert (row["dataset"], row["rank"], row["optim.lr"]) == ("icd10_chapter", 4, 3e-3)
    assert row["test.perplexity"] == pytest.approx(record.perplexity(row["test.nll"]))
    assert row["trainable_percent"] == pytest.approx(100 * row["trainable_parameters"] / row["total_parameters"])


def test_records_of_the_engine_are_read(tmp_path: Path, make_record: object) -> None:
    made = make_record()  # type: ignore[operator]
    record.write_record(tmp_path / "study" / made.run_id, made)
    runs = load(tmp_path / "study").runs
    assert runs["test.nll"].iloc[0] == pytest.approx(made.scores["test"]["after"].nll)


def test_what_cannot_be_read_is_counted_and_named(small: Path) -> None:
    folders = sorted(small.iterdir())
    edit(folders[0], lambda plain: plain.update(schema=0))
    (folders[1] / record.RECORD).write_text('{"run_id": "cut o')
    (folders[2] / record.RECORD).unlink()
    edit(
        folders[3], lambda plain: plain.update(status="failed", error={"class": "OOM", "message": "no room"}, scores={})
    )
    edit(folders[4], lambda plain: plain.pop("spec"))
    (small / "empty").mkdir()
    study = load(small)
    expected = {"completed": 1, "failed": 1, "older schema": 1, "broken record": 2, "no record": 2}
    assert study.counts() == expected
    table = analyse(study).tables["failures"]
    assert set(table["kind"]) >= set(expected) - {"completed"}
    assert "OOM: no room" in table[table["kind"] == "failed"]["message"].iloc[0]
    assert {str(folder) for folder in (folders[0], folders[1], folders[2])} <= set(table["where"])


def test_what_trackers_and_adapters_py_leave_is_no_run(small: Path) -> None:
    (small / "tensorboard" / "attn_r4-0123").mkdir(parents=True)
    (small / "wandb" / "offline-run-1" / "files").mkdir(parents=True)
    for note in ("combined.json", "merged.json"):
        record.write_json(small / f"of {note}" / note, {})
        (small / f"of {note}" / "adapter").mkdir()
    assert load(small).counts() == {"completed": 6}


def test_diverged_and_pruned_runs_enter_no_mean(small: Path) -> None:
    before = analyse(load(small)).arms
    runs = load(small).runs
    lost = [*runs[runs["placement"] == "ff"]["folder"], runs[runs["placement"] == "attn"]["folder"].iloc[0]]
    for folder in map(Path, lost):
        edit(folder, lambda plain: (plain.update(status="diverged"), plain["scores"]["test"]["after"].update(nll=1e9)))
    after = analyse(load(small))
    assert after.arms["nll"].max() <= before["nll"].max() + 1
    assert after.study.counts() == {"completed": 3, "diverged": 3, "arm without a completed run": 1}
    assert "missing replicates" in set(after.tables["checks"]["check"])
    assert "ff r4" not in set(after.arms["arm"])


def test_a_study_of_studies_and_a_run_in_two_places(tmp_path: Path) -> None:
    a = write_study(tmp_path / "outputs" / "a", ranks=(4,), seeds=(0,), examples=5, steps=2)
    write_study(tmp_path / "outputs" / "group" / "b", ranks=(8,), seeds=(0,), examples=5, steps=2)
    study = load(tmp_path / "outputs")
    assert len(study.runs) == 6
    again = load(tmp_path / "outputs", a)
    assert len(again.runs) == 6
    assert again.counts()["duplicate"] == 3


def test_unknown_fields_come_along(small: Path) -> None:
    for folder in small.iterdir():
        edit(folder, lambda plain: plain.update(trial={"number": 7}, spectra_entropy=0.5))
    runs = load(small).runs
    assert set(runs["trial.number"]) == {7}
    assert set(runs["spectra_entropy"]) == {0.5}


def test_forgetting_is_the_rise_on_other_splits(analysis: object) -> None:
    runs = analysis.study.runs  # type: ignore[attr-defined]
    expected = runs["wikipedia.nll"] - runs["wikipedia.before.nll"]
    assert runs["forgetting"].to_list() == pytest.approx(expected.to_list())


def test_examples_and_curves_are_tidy(small: Path) -> None:
    study = load(small)
    ids = study.runs["run_id"].head(2)
    examples = study.examples(ids)
    assert len(examples) == 2 * 30
    assert {"run_id", "id", "nll", "tokens", "exact_match"} == set(examples)
    assert len(study.curves(ids)) == 2 * 5
    predictions = study.folder(ids.iloc[1]) / record.PREDICTIONS
    predictions.write_text(predictions.read_text().replace('"moment"', '"phase"'))
    assert study.examples(ids).equals(examples)
    (study.folder(ids.iloc[0]) / record.PREDICTIONS).write_text("not json\n")
    assert len(study.examples(ids)) == 30
    assert "broken lines" in study.counts()


def test_scores_without_predictions_still_make_tables(small: Path) -> None:
    for folder in small.iterdir():
        (folder / record.PREDICTIONS).unlink()
    arms = analyse(load(small)).arms
    assert arms["nll"].notna().all()
    assert arms[arms["arm"] == "attn r4"]["nll_low"].notna().all()  # two seeds still say something


def test_predictions_that_contradict_the_record_are_named(small: Path) -> None:
    edit(sorted(small.iterdir())[0], lambda plain: plain["scores"]["test"]["after"].update(nll=0.5))
    study = load(small)
    analyse(study)
    assert study.counts()["predictions do not match"] == 1


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nothing")


def test_the_order_of_records_changes_no_table(small: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "other"
    renamed.mkdir()
    for i, folder in enumerate(sorted(small.iterdir(), reverse=True)):
        folder.rename(renamed / f"{i:03d}")
    first = analyse(load(renamed)).tables
    for i, folder in enumerate(sorted(renamed.iterdir(), reverse=True)):
        folder.rename(renamed / f"x{i:03d}")
    second = analyse(load(renamed)).tables
    for name in ("arms", "tests", "matched_budget", "share_kept", "anova"):
        assert first[name].equals(second[name]), name


@pytest.mark.slow
def test_the_whole_analysis_runs_without_the_training_side(small: Path, tmp_path: Path) -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "peft", "hydra", "omegaconf", "dacite", "optuna"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from analysis.__main__ import main
status = main([sys.argv[1], "--out", sys.argv[2], "--draws", "50"])
ours = {name for name in sys.modules if name.startswith("sweeper.")}
assert ours == {"sweeper.installation", "sweeper.record", "sweeper.redaction", "sweeper.seal"}, ours
raise SystemExit(status)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(small), str(tmp_path / "paper")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "paper" / "report.html").is_file()
    assert json.dumps(done.stdout)
