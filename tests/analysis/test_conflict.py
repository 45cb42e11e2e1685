"""Gradients that conflict, and ranks that blocks spend: tables with known answers, and their figures."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import analyse, captions, conflict, conflict_figures, load, tables
from sweeper.record import RECORD, SPECTRA
from tests.analysis.test_together import TASKS, write_run

ROLES, LAYERS, STEPS = ("attn_q", "attn_v"), 2, (5, 10, 15)
NAMES = [f"layers.{layer}.{role}" for layer in range(LAYERS) for role in ROLES]


def cosine(role: str, layer: int, step: int, seed: int) -> float:
    """Falls with the steps, is lower in one role and layer, and spreads a little over seeds."""
    return 0.5 - 0.05 * step + 0.1 * (role == "attn_v") - 0.2 * layer + 0.02 * (seed - 1)


def conflict_of(seed: int, shared: bool = True) -> dict[str, Any]:
    def row(value: float) -> list[float | None]:
        return [value if shared else None]

    modules = {
        f"layers.{layer}.{role}": {
            "cosine": [row(cosine(role, layer, step, seed)) for step in STEPS], "norms": [[1.0, 2.0]] * len(STEPS)
        }
        for layer in range(LAYERS)
        for role in ROLES
    }  # fmt: skip
    return {
        "steps": list(STEPS), "pairs": [list(TASKS)], "tasks": list(TASKS), "examples": 8,
        "adapter": [row(0.3 - 0.04 * step + 0.02 * (seed - 1)) for step in STEPS], "modules": modules, "seconds": 1.0,
    }  # fmt: skip


def block(name: str, module: str, rank: int, spent: float, norm: float, energy: float) -> dict[str, Any]:
    layer, role = int(module.split(".")[1]), module.split(".")[2]
    return {
        "block": name, "level": 0, "tasks": [name], "name": module, "role": role, "layer": layer, "rank": rank,
        "update_norm": norm, "effective_rank": spent, "stable_rank": 1.0, "singular_values": [norm],
        "energy_share": energy,
    }  # fmt: skip


def edit(folder: Path, changes: Mapping[str, Any]) -> None:
    plain = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(plain | changes))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two arms, three seeds each: in one all ranks are shared, in the other none."""
    folder = tmp_path / "study"
    modules = [
        {"name": name, "role": name.split(".")[2], "layer": int(name.split(".")[1]), "rank": 4, "parameters": 9}
        for name in NAMES
    ]
    for sharing in ("single", "per_task"):
        for seed in range(3):
            before = set(folder.glob("*"))
            write_run(folder, dict.fromkeys(TASKS, 1.0), sharing=sharing, family="mixture", seed=seed)
            (run,) = set(folder.glob("*")) - before
            edit(run, {"modules": modules, "conflict": conflict_of(seed, sharing == "single")})
            edit(run, {"weighing": {task: {"log_variance": 0.5, "weight": math.exp(-0.5)} for task in TASKS}})
            if sharing == "per_task":
                rows = [
                    block(task, name, 4, 2.0 + place + 0.1 * (seed - 1), 3.0, 0.125)
                    for place, task in enumerate(TASKS)
                    for name in NAMES
                ]
                (run / SPECTRA).write_text(json.dumps({"schema": 1, "modules": [], "blocks": rows}))
    return folder


def test_cosines_are_averaged_by_role_and_over_training(study: Path) -> None:
    table = analyse(load(study), draws=100).tables["conflict"]
    assert set(table["arm"].str.contains("per_task")) == {False}  # whose tasks share nothing
    rows = table.set_index("role")
    assert set(rows["pair"]) == {" × ".join(TASKS)}
    for role in ROLES:
        every = [[cosine(role, layer, step, 1) for layer in range(LAYERS)] for step in STEPS]
        assert rows.loc[role, "cosine"] == pytest.approx(np.mean(every))
        assert rows.loc[role, "start"] == pytest.approx(np.mean(every[0]))
        assert rows.loc[role, "end"] == pytest.approx(np.mean(every[-1]))
        below = [cosine(role, layer, step, seed) < 0 for seed in range(3) for layer in range(LAYERS) for step in STEPS]
        assert rows.loc[role, "negative"] == pytest.approx(np.mean(below))
        assert rows.loc[role, "seeds"] == 3
        assert rows.loc[role, "low"] < rows.loc[role, "cosine"] < rows.loc[role, "high"]
    assert rows.loc[conflict.ADAPTER, "cosine"] == pytest.approx(0.3 - 0.4)


def test_cosines_by_role_and_layer(study: Path) -> None:
    table = analyse(load(study), draws=100).tables["conflict_by_layer"].set_index(["role", "layer"])
    assert len(table) == len(ROLES) * LAYERS
    for role in ROLES:
        for layer in range(LAYERS):
            wanted = np.mean([cosine(role, layer, step, 1) for step in STEPS])
            assert table.loc[(role, layer), "cosine"] == pytest.approx(wanted)


def test_several_pairs_have_rows_of_their_own_and_one_of_all(study: Path) -> None:
    for run in study.iterdir():
        plain = json.loads((run / RECORD).read_text())["conflict"]
        plain["pairs"] = [["a", "b"], ["a", "c"]]
        plain["adapter"] = [[0.5, -0.5 - 0.1 * place] for place in range(len(STEPS))]
        plain["modules"] = {}
        edit(run, {"conflict": plain})
    table = analyse(load(study), draws=100).tables["conflict"]
    one = table[table["arm"] == table["arm"].iloc[0]].set_index("pair")
    assert list(one.index) == [conflict.EVERY, "a × b", "a × c"]
    assert one.loc[conflict.EVERY, "negative"] == 0.5
    assert one.loc["a × b", "cosine"] == pytest.approx(0.5)
    assert one.loc["a × c", "cosine"] == pytest.approx(-0.6)


def test_an_interval_of_a_cosine_is_within_its_bounds(study: Path) -> None:
    for run in study.iterdir():
        plain = json.loads((run / RECORD).read_text())
        changed = plain["conflict"] | {"adapter": [[0.9 * (-1) ** plain["spec"]["seed"]]] * len(STEPS)}
        edit(run, {"conflict": changed})
    table = analyse(load(study), draws=100).tables["conflict"]
    assert table["low"].min() == -1
    assert table["high"].max() == 1


def test_ranks_that_blocks_spend(study: Path) -> None:
    table = analyse(load(study), draws=100).tables["block_spectra"].set_index(["block", "role"])
    assert len(table) == len(TASKS) * (1 + len(ROLES))
    for place, task in enumerate(TASKS):
        row = table.loc[(task, "all")]
        assert row["effective_rank"] == pytest.approx(2.0 + place)
        assert row["low"] < row["effective_rank"] < row["high"]
        assert (row["ranks"], row["used"]) == (4, pytest.approx((2.0 + place) / 4))
        assert row["update_norm"] == pytest.approx(3.0 * math.sqrt(len(NAMES)))
        assert row["energy_share"] == pytest.approx(0.125 * len(NAMES))


def test_figures_show_what_the_tables_have(study: Path) -> None:
    found = analyse(load(study), draws=100)
    maps, curves, ranks = (
        make(found) for make in (conflict_figures.by_module, conflict_figures.curves, conflict_figures.block_ranks)
    )
    assert isinstance(maps, Figure)
    (image,) = maps.axes[0].get_images()
    assert image.get_clim()[0] == -image.get_clim()[1]
    wanted = [[np.mean([cosine(role, layer, step, 1) for step in STEPS]) for layer in range(LAYERS)] for role in ROLES]
    np.testing.assert_allclose(np.asarray(image.get_array(), dtype=float), wanted, atol=1e-12)
    assert isinstance(curves, Figure)
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in curves.axes[0].get_lines()]
    assert any(len(line) == len(STEPS) and np.allclose(line, [0.1, -0.1, -0.3]) for line in lines)
    assert isinstance(ranks, Figure)
    assert {text.get_text() for text in ranks.axes[0].texts} == {"2.0", "3.0"}
    assert [label.get_text() for label in ranks.axes[0].get_yticklabels()] == [f"{task}, 4" for task in TASKS]
    for name in conflict_figures.MAKERS:
        assert len(captions.caption(found, name)) > 40
    assert {"conflict", "conflict_by_layer", "block_spectra"} <= {sheet.name for sheet in tables.sheets(found)}


def test_a_study_without_comparisons_says_how_they_are_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "study", dict.fromkeys(TASKS, 1.0), family="mixture")
    found = analyse(load(tmp_path / "study"), draws=50)
    assert found.tables["conflict"].empty
    assert found.tables["block_spectra"].empty
    for make in (conflict_figures.by_module, conflict_figures.curves):
        assert "evaluation.conflict=8" in str(make(found))
    assert "adapters.py spectra" in str(conflict_figures.block_ranks(found))


@pytest.mark.parametrize("broken", [{"steps": 3}, {"pairs": None}, {"adapter": [["x"]]}, {"modules": {"m": 1}}])
def test_a_broken_field_ends_nothing(broken: dict[str, Any], study: Path) -> None:
    for run in study.iterdir():
        plain = json.loads((run / RECORD).read_text())["conflict"]
        edit(run, {"conflict": plain | broken})
    found = load(study)
    assert isinstance(analyse(found, draws=50).tables["conflict"], pd.DataFrame)


def test_learnt_weights_and_options_that_came_later_are_columns(study: Path) -> None:
    runs = load(study).runs
    assert set(runs[f"loss_weight.{TASKS[0]}"]) == {math.exp(-0.5)}
    assert set(runs["together.option.surgery"]) == {"none"}
    assert set(runs["conflict.steps"]) == {len(STEPS)}
