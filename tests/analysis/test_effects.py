from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import Analysis, analyse, load
from tests.analysis.synthetic import Truth, edit, write_study


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Methods on one placement, one of them at a rank of its own, as VeRA is."""

    def higher(plain: dict[str, Any]) -> None:
        if plain["spec"]["method"]["name"] == "vera":
            plain["spec"] |= {"rank": 256, "alpha": 512.0}

    names, one = ("lora", "dora", "vera", "bitfit", "full_ft"), Truth(placements={"full": 0.1})
    study = write_study(
        tmp_path_factory.mktemp("outputs") / "s", truth=one, ranks=(8,), methods=names, examples=20, steps=2
    )
    for folder in study.iterdir():
        edit(folder, higher)
    return analyse(load(study), draws=50)


def test_what_a_method_does_is_not_put_down_to_its_rank(methods: Analysis) -> None:
    assert methods.tables["slopes"].empty
    found = methods.tables["anova"].set_index("term")
    assert found["df"].to_dict() == {"method": 4, "seed": 2, "residual": 8}
    runs = methods.found.runs
    means = runs.groupby("method")["test.nll"].mean()
    assert found.loc["method", "ss"] == pytest.approx(3 * ((means - means.mean()) ** 2).sum())
    assert set(methods.tables["importance"]["field"]) == {"method", "seed", "interactions and noise"}


def test_full_fine_tuning_has_no_hypervolume_of_its_own(methods: Analysis) -> None:
    assert methods.tables["hypervolume"]["placement"].to_list() == ["all", "full"]


def test_a_slope_is_over_arms_that_differ_in_rank_alone(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4, 16), methods=("lora", "dora"), examples=20, steps=2)
    table = analyse(load(study), draws=50).tables["slopes"]
    assert {(row["placement"], row["method"]) for row in table.to_dict("records")} == {
        (placement, method) for placement in ("attn", "ff", "full") for method in ("lora", "dora")
    }
    assert set(table["runs"]) == {2 * 3}


def test_an_importance_lies_in_its_interval(analysis: Analysis, methods: Analysis) -> None:
    for found in (analysis, methods):
        table = found.tables["importance"]
        assert np.all(table["low"] <= table["importance"])
        assert np.all(table["importance"] <= table["high"])
        assert table["low"].min() >= 0
        assert table["high"].max() <= 1
