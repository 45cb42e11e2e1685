import json
import shutil
import sys
import tarfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analysis import Analysis, analyse, exchange, figures, load
from tests.analysis.peft_results import EXPERIMENTS, LORA, result, write_results
from tests.analysis.synthetic import edit, write_study

DATA = Path(__file__).parent / "data"
# What the reader of PEFT's method_comparison takes from each file, and what it turns it into (its processing.py, as of
# August 2026): these must be whole numbers, these numbers, and these may be absent.
WHOLE = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "file_size")
PACKAGES = ("peft", "transformers", "datasets", "torch", "bitsandbytes")


def read_as_peft_does(path: Path) -> dict[str, Any] | None:
    plain = json.loads(path.read_text())
    run, train, meta = plain["run_info"], plain["train_info"], plain["meta_info"]
    kind = run["peft_config"]["peft_type"] if run["peft_config"] else "full-finetuning"
    if train["status"] != "success":
        return None
    last = train["metrics"][-1]
    row = {key: int(train[key]) for key in (*WHOLE, "num_trainable_params")}
    row |= {"total_time": float(run["total_time"]), "train_time": float(train["train_time"])}
    row |= {"samples": int(last["train samples"]), "tokens": int(last["train total tokens"])}
    values = pd.Series([last["train loss"], last["test accuracy"], last.get("forgetting", 123)]).astype(float)
    row |= dict(zip(("loss", "accuracy", "forgetting"), values, strict=True))
    assert all(f"{name}-version" in meta["package_info"] for name in PACKAGES)
    assert isinstance(meta["system_info"], dict)
    datetime.fromisoformat(run["created_at"])
    return row | {
        "kind": kind,
        "name": run["experiment_name"],
        "model": run["train_config"]["model_id"],
        "branch": run["peft_branch"],
    }


def test_peft_reads_our_export(analysis: Analysis, tmp_path: Path) -> None:
    written = exchange.write(analysis, tmp_path, "peft")
    rows = [read_as_peft_does(path) for path in written]
    assert len(rows) == len(analysis.study.runs)
    assert len({row["name"] for row in rows if row}) == len(rows)  # its table keeps one row a name
    assert {row["kind"] for row in rows if row} == {"LORA", "full-finetuning"}
    by_name = {row["name"].rsplit("-", 1)[1]: row for row in rows if row}
    for run in analysis.study.runs.head(5).to_dict("records"):
        row = by_name[run["run_id"]]
        assert row["accuracy"] == pytest.approx(run["test.exact_match"])
        assert row["num_trainable_params"] == run["trainable_parameters"]
        assert row["train_time"] == pytest.approx(run["train_seconds_solo"])
        assert row["forgetting"] == pytest.approx(run["forgetting"])


def test_a_run_that_is_gone_leaves_the_export(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=10, steps=3, modules=False)
    exchange.write(analyse(load(study), draws=50), tmp_path / "peft", "peft")
    (tmp_path / "peft" / "theirs.json").write_text("{}")
    shutil.rmtree(sorted(study.iterdir())[0])
    written = exchange.write(analyse(load(study), draws=50), tmp_path / "peft", "peft")
    assert {*(tmp_path / "peft").rglob("*.json")} == {*written, tmp_path / "peft" / "theirs.json"}


def test_failed_runs_and_absent_costs_do_not_break_the_export(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=10, steps=3, modules=False)
    first, second, _ = sorted(study.iterdir())
    edit(first, lambda plain: plain.update(status="failed", scores={}, error={"class": "OOM", "message": "no room"}))
    edit(second, lambda plain: plain.update(efficiency={}, environment={}))
    written = exchange.write(analyse(load(study), draws=50), tmp_path / "peft", "peft")
    rows = [read_as_peft_does(path) for path in written]
    assert sum(row is None for row in rows) == 1
    solo = {json.loads(path.read_text())["meta_info"]["notes"] for path in written}
    assert len(solo) == 1  # one basis for all: never solo seconds beside shares of a pack
    assert "amortised" in solo.pop()


def test_what_we_export_comes_back(analysis: Analysis, tmp_path: Path) -> None:
    exchange.write(analysis, tmp_path / "peft", "peft")
    rows = exchange.read(str(tmp_path / "peft"))
    study = load(rows=rows)
    found = analyse(study, metric="exact_match", draws=50)
    assert study.counts() == {"completed": len(analysis.study.runs)}
    assert set(found.arms["source"]) == {"peft"}
    assert found.arms["exact_match"].notna().all()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results in the form of PEFT's MetaMathQA/results."""
    return write_results(tmp_path_factory.mktemp("method_comparison"))


def test_replicates_that_we_export_come_back_as_arms(analysis: Analysis, tmp_path: Path) -> None:
    exchange.write(analysis, tmp_path / "peft", "peft")
    again = analyse(load(rows=exchange.read(str(tmp_path / "peft"))), draws=50).arms
    ours = analysis.arms[analysis.arms["arm"] != "base model"]
    pd.testing.assert_series_equal(
        again.set_index(["setting", "arm"])["nll"].sort_index(),
        ours.set_index(["setting", "arm"])["nll"].sort_index(), rtol=1e-5,
    )  # fmt: skip
    assert set(again["seeds"]) == {3}


def test_results_of_peft_alone(published: Path) -> None:
    """They have no NLL, so the figures show their accuracy."""
    study = load(rows=exchange.read(str(published)))
    found = analyse(study, draws=50)
    arms = found.arms.set_index("arm")
    assert found.metric == "accuracy"
    assert set(arms.index) == set(EXPERIMENTS)
    assert {name: arms.loc[name, "accuracy"] for name in EXPERIMENTS} == {n: e[1] for n, e in EXPERIMENTS.items()}
    assert set(found.arms["dataset"]) == {"MetaMathQA"}
    assert arms.loc["adalora/llama-3.2-3B-rank32", "rank"] == 32
    assert arms.loc["full-finetuning/llama-3.2-3B-lr_0.00001", "placement"] == "full fine-tuning"
    assert not isinstance(figures.pareto(found, "accuracy"), str)
    texts = found.arms[["setting", "arm", "placement"]].astype(str)
    assert texts.map(len).to_numpy().max() <= 60


@pytest.mark.parametrize("up", [0, 1, 2])
def test_a_task_and_all_tasks_are_read_as_a_folder_of_results_is(published: Path, up: int) -> None:
    folder = [published, *published.parents][up]
    rows = exchange.read(str(folder))
    assert {row["dataset"] for row in rows} == {"MetaMathQA"}
    assert len(rows) == len(EXPERIMENTS)


def test_results_of_peft_beside_ours_rename_no_arm_of_ours(analysis: Analysis, published: Path) -> None:
    folder = str(Path(analysis.study.runs["folder"].iloc[0]).parent)
    found = analyse(load(folder, rows=exchange.read(str(published))), draws=50)
    ours = found.arms[found.arms["source"] == "study"]
    assert ours["arm"].to_list() == analysis.arms["arm"].to_list()
    assert ours["nll"].to_list() == analysis.arms["nll"].to_list()
    assert set(found.arms["arm"]) == set(analysis.arms["arm"]) | set(EXPERIMENTS)
    assert len(found.tables["spectra"]) == len(analysis.tables["spectra"])
    assert not isinstance(figures.where_energy_went(found), str)


def test_each_task_has_a_folder_with_its_name(analysis: Analysis, tmp_path: Path) -> None:
    written = exchange.write(analysis, tmp_path, "peft")
    assert {path.parent.relative_to(tmp_path).as_posix() for path in written} == {
        "icd10_chapter/results", "gsm_symbolic/results",
    }  # fmt: skip
    for path in written:
        run = json.loads(path.read_text())["run_info"]
        assert run["task"] == path.parent.parent.name
        assert run["task"] in run["experiment_name"]


def test_ours_are_never_taken_for_a_task_of_pefts(analysis: Analysis, published: Path, tmp_path: Path) -> None:
    """Whatever folder they are put into, and whatever our dataset is called."""
    results = tmp_path / "MetaMathQA" / "results"
    shutil.copytree(published, results)
    for path in exchange.write(analysis, tmp_path / "peft", "peft"):
        shutil.copy(path, results)
    by_task = pd.DataFrame(exchange.read(str(results)))["dataset"].value_counts().to_dict()
    assert by_task["MetaMathQA"] == len(EXPERIMENTS)
    assert by_task["icd10_chapter"] + by_task["gsm_symbolic"] == len(analysis.study.runs)

    study = write_study(tmp_path / "s", datasets=("metamathqa",), ranks=(4,), seeds=(0,), examples=10, steps=3)
    written = exchange.write(analyse(load(study), draws=50), tmp_path / "ours", "peft")
    assert {path.parent.parent.name for path in written} == {"metamathqa-lora-atlas"}


def test_a_result_of_another_task_in_that_folder_is_not_of_it(tmp_path: Path) -> None:
    results = tmp_path / "MetaMathQA" / "results"
    results.mkdir(parents=True)
    other = result("lora/x", LORA, 0.5, 1)
    other["meta_info"]["dataset_info"] = {"billsum": {"sha": "0"}}
    (results / "other.json").write_text(json.dumps(other))
    assert exchange.read(str(results))[0]["dataset"] == "billsum"


def test_target_modules_are_names_of_modules(analysis: Analysis, tmp_path: Path) -> None:
    """Of a run that kept no adapter as its record has them: full names, which PEFT takes."""
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=10, steps=3)
    first = sorted(study.iterdir())[0]
    edit(first, lambda plain: plain["modules"][0].update(rank=7))
    adapter = first.parent / sorted(path.name for path in study.iterdir())[1] / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    written = exchange.write(analyse(load(study), draws=50), tmp_path / "peft", "peft")
    configs = {path.stem.rsplit("-")[-1]: json.loads(path.read_text())["run_info"]["peft_config"] for path in written}
    modules = json.loads((first / "record.json").read_text())["modules"]
    assert configs[first.name]["target_modules"] == sorted(module["name"] for module in modules)
    assert configs[first.name]["rank_pattern"] == {modules[0]["name"]: 7}
    assert configs[adapter.parent.name]["target_modules"] == ["q_proj"]


def test_parquet_without_pyarrow_is_one_line(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"^--export parquet needs .* pyarrow: .*'\.\[hub\]'"):
        exchange.write(analysis, tmp_path, "parquet")
    assert not list(tmp_path.iterdir())


def test_published_runs_stand_beside_ours(study_folder: Path) -> None:
    study = load(study_folder, rows=exchange.read(str(DATA / "published_2025.json")))
    found = analyse(study, draws=50)
    assert set(found.arms["source"]) == {"study", "published"}
    ours = analyse(load(study_folder), draws=50).arms
    both = found.arms[found.arms["source"] == "study"]
    assert both["nll"].to_list() == ours["nll"].to_list()
    assert [name.split(" ", 1)[1] for name in both["setting"]] == ours["setting"].to_list()


def test_csv_and_parquet(analysis: Analysis, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    exchange.write(analysis, tmp_path, "csv")
    exchange.write(analysis, tmp_path, "parquet")
    runs, again = pd.read_csv(tmp_path / "runs.csv"), pd.read_parquet(tmp_path / "runs.parquet")
    assert len(runs) == len(again) == len(analysis.study.runs)
    examples = pd.read_parquet(tmp_path / "examples.parquet")
    assert len(examples) == 120 * int(runs["chosen"].sum())


def test_wandb_runs() -> None:
    spec = {"model": {"name": "m"}, "dataset": {"name": "d"}, "placement": {"name": "attn"}, "rank": 8, "seed": 0}
    spec |= {"method": {"name": "lora"}}
    summary = {
        "test/nll_after": 0.5,
        "test/nll_before": 2.0,
        "test/exact_match_after": 0.8,
        "trainable_parameters": 9,
        "_x": 1,
    }
    runs = [SimpleNamespace(id="a1", state="finished", config=spec, summary=summary)]
    api = SimpleNamespace(runs=lambda project: runs)
    found = analyse(load(rows=exchange.from_wandb("me/mine", api)), draws=50)
    row = found.arms.set_index("arm").loc["attn r8"]
    assert (row["nll"], row["exact_match"], row["source"]) == (0.5, 0.8, "wandb")
    assert found.arms.set_index("arm").loc["base model", "nll"] == 2.0


@pytest.mark.parametrize("source", ["nowhere", "table.csv"])
def test_an_unknown_source_says_what_would_do(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="give a folder of PEFT results"):
        exchange.read(source)


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file with run_info"):
        exchange.read(str(tmp_path))


@pytest.mark.parametrize("content", ["{bad", "[]", '{"rows": [3]}', "\udcff"])
def test_a_table_that_cannot_be_read_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"^--import \S+/table\.json: ") as caught:
        exchange.read(str(file))
    assert "\n" not in str(caught.value)
    if not content.startswith(("[", '{"')):  # of a folder, what is no result is passed over
        with pytest.raises(ValueError, match=r"^--import \S+/table\.json: not a JSON file"):
            exchange.read(str(tmp_path))


def test_results_that_peft_published_are_shown_alone(tmp_path: Path) -> None:
    """All of its MetaMathQA results as of September 2026, of each its first and last measurement."""
    with tarfile.open(DATA / "peft_metamathqa.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    files = sorted((tmp_path / "MetaMathQA" / "results").glob("*.json"))
    study = load(rows=exchange.read(str(tmp_path / "MetaMathQA")))
    published = {}
    for path in files:
        plain = json.loads(path.read_text())
        published[plain["run_info"]["experiment_name"]] = plain
    assert len(study.runs) == len(published) == len(files) == 63
    accuracies = sorted(plain["train_info"]["metrics"][-1]["test accuracy"] for plain in published.values())
    assert sorted(study.runs["test.accuracy"]) == pytest.approx(accuracies)
    assert max(map(len, (arm.label for s in analyse(study, draws=20).found.settings for arm in s.arms))) <= 60
