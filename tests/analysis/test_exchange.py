import json
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analysis import Analysis, analyse, exchange, load
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
    assert {*(tmp_path / "peft").glob("*.json")} == {*written, tmp_path / "peft" / "theirs.json"}


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
