"""Shapley values and interactions of a lattice of placements: equal to their definitions, and found in a study."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import analyse, figures, lattice, lattice_figures, load
from analysis.analyse import Analysis
from analysis.figures import styled
from sweeper.placement.lattice import placements
from tests.analysis.synthetic import Truth, write_study

Game = Mapping[frozenset[int], float]
WORTH = {"q": 0.30, "v": 0.20, "down": 0.10}
TOGETHER = -0.08  # q and v do in part the same


def game(parts: int, seed: int = 0) -> Game:
    rng = np.random.default_rng(seed)
    subsets = (frozenset(s) for n in range(parts + 1) for s in itertools.combinations(range(parts), n))
    return {s: 0.0 if not s else float(rng.normal()) for s in subsets}


def valued(v: Game, weights: Mapping[frozenset[int], float]) -> float:
    return sum(weight * v[subset] for subset, weight in weights.items())


def over_orders(v: Game, players: list[int], of: int) -> float:
    """The mean marginal contribution of a player over all orders in which they can come."""
    total, orders = 0.0, 0
    for order in itertools.permutations(players):
        before = frozenset(order[: order.index(of)])
        total, orders = total + v[before | {of}] - v[before], orders + 1
    return total / orders


def test_values_are_the_mean_over_all_orders() -> None:
    v, players = game(7), list(range(7))
    for i in (0, 3, 6):
        assert valued(v, lattice.shapley(7, i)) == pytest.approx(over_orders(v, players, i), abs=1e-12)
    total = sum(valued(v, lattice.shapley(7, i)) for i in players)
    assert total == pytest.approx(v[frozenset(players)] - v[frozenset()], abs=1e-12)


def test_interactions_are_what_two_are_worth_as_one_beyond_each_without_the_other() -> None:
    """Grabisch & Roubens' recursion: the value of the pair as one player, less each one's where the other is away."""
    v, (i, j) = game(5, seed=1), (1, 3)
    others = [0, 2, 4]
    merged = {frozenset(s - {9}) | (frozenset({i, j}) if 9 in s else frozenset()): s for s in _subsets([*others, 9])}
    as_one = {s: v[original] for original, s in merged.items()}
    wanted = over_orders(as_one, [*others, 9], 9) - over_orders(v, [*others, i], i) - over_orders(v, [*others, j], j)
    assert valued(v, lattice.interaction(5, i, j)) == pytest.approx(wanted, abs=1e-12)


def _subsets(of: list[int]) -> list[frozenset[int]]:
    return [frozenset(s) for n in range(len(of) + 1) for s in itertools.combinations(of, n)]


def test_an_additive_game_gives_its_terms_and_no_interactions() -> None:
    terms = [0.5, -0.2, 0.1, 0.7]
    v = {s: sum(terms[i] for i in s) for s in _subsets(list(range(4)))}
    assert [valued(v, lattice.shapley(4, i)) for i in range(4)] == pytest.approx(terms)
    assert [valued(v, lattice.interaction(4, i, j)) for i, j in itertools.combinations(range(4), 2)] == pytest.approx(
        [0.0] * 6, abs=1e-12
    )


def gain(name: str) -> float:
    parts = name.replace("attn_q", "q").replace("ff_out", "down").replace("qv", "q+v").split("+")
    return sum(WORTH[part] for part in parts) + TOGETHER * ({"q", "v"} <= set(parts))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    truth = Truth(
        placements={name: 2.0 - gain(name) for name in placements(list(WORTH))}, per_doubling=0.05, arm_example_sd=0.005
    )
    return analyse(load(write_study(tmp_path_factory.mktemp("lattice"), truth=truth, ranks=(4, 8))), draws=100)


def test_a_study_of_all_subsets_is_recognised_and_its_roles_are_valued(found: Analysis) -> None:
    table = found.tables["lattice"].query("metric == 'nll'")
    assert list(dict.fromkeys(table["study"])) == ["r4", "r8"]
    own = table[table["study"] == "r4"].set_index("term")
    assert list(own.index) == ["q", "v", "down", "q × v", "q × down", "v × down"]
    assert set(own["arms"]) == {7}
    differences = {"q": WORTH["q"] - WORTH["v"], "down": WORTH["down"] - WORTH["v"] - TOGETHER / 2}
    for part, wanted in differences.items():  # the base model's own level is drawn, so that of a value is not known
        assert own.loc[part, "estimate"] - own.loc["v", "estimate"] == pytest.approx(wanted, abs=0.01)
    assert own.loc["q × v", "low"] < own.loc["q × v", "estimate"] < own.loc["q × v", "high"]
    eight = table[table["study"] == "r8"].set_index("term")
    assert eight["estimate"].sub(own["estimate"])["q"] == pytest.approx(0.05 / 3, abs=0.01)


def test_values_add_up_to_the_gain_of_all_roles(found: Analysis) -> None:
    for one in lattice.lattices(found.found):
        gains = lattice.aligned(one, "nll")
        assert gains is not None
        table = found.tables["lattice"].query(f"metric == 'nll' and kind == 'value' and study == '{one.study}'")
        whole = gains.means()[frozenset(range(3))]
        assert table["estimate"].sum() == pytest.approx(whole, abs=1e-9)


def test_the_best_of_each_size_is_chosen_on_validation(found: Analysis) -> None:
    table = found.tables["lattice_best"].query("metric == 'nll' and study == 'r4'")
    assert list(table["placement"]) == ["q", "q+v", "q+v+down"]
    assert list(table["of"]) == [3, 3, 1]


def test_roles_that_always_go_together_are_one_part(tmp_path: Path) -> None:
    names = placements(["q+k", "v+o", "down"])
    truth = Truth(placements={name: 1.0 - 0.1 * i for i, name in enumerate(names)})
    study = write_study(tmp_path, truth=truth, ranks=(4,), seeds=(0, 1))
    (one,) = lattice.lattices(analyse(load(study), draws=100).found)
    assert one.parts == ("q+k", "v+o", "down")


def test_a_lattice_that_lacks_arms_says_so_and_values_nothing(tmp_path: Path) -> None:
    names = [name for name in placements(list(WORTH)) if name != "q+down"]
    study = write_study(tmp_path, truth=Truth(placements={name: 2.0 - gain(name) for name in names}), ranks=(4,))
    found = analyse(load(study), draws=100)
    assert found.tables["lattice"].empty
    assert "icd10_chapter: 1 of 7 subsets of q, v, down are missing, so no role's value can be told" in found.notes
    assert "no complete lattice" in str(lattice_figures.values(found))


def test_other_studies_have_no_lattice(tmp_path: Path) -> None:
    found = analyse(load(write_study(tmp_path, ranks=(4,))), draws=100)
    assert found.tables["lattice"].empty
    assert not list(lattice.lattices(found.found))
    assert "lattice" not in figures.makers(found)


def test_figures_are_drawn(found: Analysis) -> None:
    with styled():
        for make in (figures.makers(found)["lattice"], figures.makers(found)["lattice_values"]):
            figure = make(found, figures.DEFAULT)
            assert isinstance(figure, Figure)
            figure.canvas.draw()
    texts = {text.get_text() for ax in figure.axes for text in ax.get_yticklabels()}
    assert {"q", "v", "down", "q × v"} <= texts
