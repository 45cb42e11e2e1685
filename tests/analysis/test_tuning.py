"""What a search may have missed, on trials with a known best."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import load, tuning
from analysis.arms import arrange
from sweeper.record import SEARCHES
from tests.analysis.synthetic import Truth, edit, write_study

RATES = np.array([1e-4, 3e-4, 1e-3, 3e-3, 1e-2])


def test_a_parabola_gives_back_its_best_rate_and_what_the_choice_lacks() -> None:
    best = 2e-3
    nll = 0.3 + 0.05 * np.log10(RATES / best) ** 2 + np.array([1, -1, 1, -1, 1]) * 1e-6
    runs = pd.DataFrame({"optim.lr": RATES, "validation.nll": nll})
    found = tuning.miss(runs, 1e-3, "validation.nll")
    assert found["best_rate"] == pytest.approx(best, rel=1e-2)
    assert found["miss"] == pytest.approx(0.05 * np.log10(2) ** 2, rel=1e-2)
    assert found["miss_low"] <= found["miss"] <= found["miss_high"] < 0.006


@pytest.mark.parametrize("nll", [[0.5, 0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.2, 0.1]], ids=["straight", "no minimum"])
def test_where_there_is_no_best_nothing_is_said(nll: list[float]) -> None:
    runs = pd.DataFrame({"optim.lr": RATES, "validation.nll": nll})
    found = tuning.miss(runs, 1e-3, "validation.nll")
    assert not found or found["miss"] >= 0
    assert tuning.miss(runs.head(3), 1e-3, "validation.nll") == {}


def test_the_table_says_how_an_arm_was_searched(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", truth=Truth(best_lr=1e-3), ranks=(4,), lrs=tuple(RATES), seeds=(0,), steps=40)

    def prune(record: dict) -> None:  # type: ignore[type-arg]
        if record["spec"]["optim"]["lr"] == 1e-2:
            record.update(status="pruned", steps=7)

    for path in study.glob("*/record.json"):
        edit(path.parent, prune)
    found = arrange(load(study))
    tuning.judge(found)
    rows = tuning.table(found).to_dict("records")
    assert {row["trials"] for row in rows} == {5}
    assert {row["whole"] for row in rows} == {4}
    assert {row["followed"] for row in rows} == {7}
    assert all("not confirmed on fresh seeds" in row["doubts"] for row in rows)
    beside = [row for row in rows if row["optim.lr"] == 3e-3]
    assert all("a pruned trial lies beside the chosen one" in row["doubts"] for row in beside)


def test_what_the_search_wrote_of_itself_is_in_the_table(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), lrs=tuple(RATES), seeds=(0,), steps=4)
    searches = {}

    def name(record: dict) -> None:  # type: ignore[type-arg]
        arm = record["spec"]["placement"]["name"]
        record["search"] = {"arm": arm, "purpose": "trial", "tuned": ["optim.lr", "trainer.batch_size"]}
        searches[arm] = {"widened": 2}

    for path in study.glob("*/record.json"):
        edit(path.parent, name)
    (study / SEARCHES).write_text(json.dumps(searches))
    assert set(tuning.table(arrange(load(study)))["widened"]) == {2}


def test_fields_that_a_search_tuned_are_told_apart_from_the_grid(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4, 8), lrs=(1e-3,), seeds=(0,), steps=4)

    def name(record: dict) -> None:  # type: ignore[type-arg]
        record["search"] = {
            "arm": record["spec"]["placement"]["name"],
            "purpose": "trial",
            "tuned": ["rank", "optim.lr"],
        }

    for path in study.glob("*/record.json"):
        edit(path.parent, name)
    found = arrange(load(study))
    assert "rank" in found.tuned
    assert all(arm.tried == 2 for arm in found.arms)
