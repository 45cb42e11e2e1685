import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import imread

from analysis import Analysis, analyse, captions, draw, figures, layout, load, shown
from analysis.arms import kinds
from analysis.style import FADED, looks, styled
from analysis.venues import DEFAULT
from tests.analysis.synthetic import ROLES, Truth, edit, write_study

ALL = {
    "pareto_nll", "rank_nll", "pareto_exact_match", "rank_exact_match", "pareto_seconds", "pareto_flops",
    "pareto_tokens", "pareto_memory", "heatmap_nll", "share_kept", "arms_nll", "forest", "detectable",
    "performance_profile", "learning_rate", "training_curves", "validation_curves", "learn_forget",
    "where_rank_went", "where_energy_went", "importance",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_figure_as_pdf_and_png(analysis: Analysis, tmp_path: Path) -> None:
    written, absent = figures.write(analysis, tmp_path)
    assert set(absent) == {"performance_profile", "pareto_tokens", "validation_curves", "where_rank_went"}
    assert {path.stem for path in written} == ALL - set(absent)
    for name in ALL - set(absent):
        pdf = (tmp_path / f"{name}.pdf").read_bytes()
        assert b"/FontFile2" in pdf, f"{name}: no embedded TrueType font"
        assert b"/Type3" not in pdf
        width = float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf)[1]) / 72  # type: ignore[index]
        assert width in (pytest.approx(DEFAULT.column, abs=0.01), pytest.approx(DEFAULT.text, abs=0.01))
        image = imread(tmp_path / f"{name}.png")
        assert image.shape[1] == pytest.approx(width * 300, abs=2)
        assert np.std(image[..., :3]) > 0.01, f"{name} is blank"


def test_a_profile_over_three_tasks(tmp_path: Path) -> None:
    tasks = ("chain_sum", "gsm_symbolic", "icd10_chapter")
    study = write_study(tmp_path / "s", ranks=(4, 8), datasets=tasks, examples=30, steps=2)
    figure = figures.make(analyse(load(study), draws=100))["performance_profile"]
    assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["attn r8", "ff r8", "full r8"]


def test_the_forest_marks_what_is_significant(tmp_path: Path) -> None:
    truth = Truth(placements={"attn": 0.5, "ff": 0.3, "full": 0.3}, arm_example_sd=0.005)
    study = write_study(tmp_path / "s", truth=truth, ranks=(4,), examples=60, steps=2)
    figure = figures.make(analyse(load(study), draws=100))["forest"]
    assert isinstance(figure, Figure)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ff − attn", "full − attn", "full − ff"]
    filled, hollow = (line for line in ax.lines if line.get_marker() == "o")
    assert sorted(filled.get_ydata()) == [1, 2]
    assert list(hollow.get_ydata()) == [0]


def test_captions_say_what_the_bars_are_and_of_how_much(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4, 8), lrs=(1e-3, 3e-3), examples=60, steps=2, groups=12)
    written, _ = figures.write(analyse(load(study), draws=50), tmp_path / "f")
    for path in (path for path in written if path.suffix == ".md"):
        text = path.read_text()
        assert "icd10_chapter: 3 seeds, 60 test examples, in 12 independent groups" in text
        assert ("†: the choice of the arm's hyperparameters is at the edge" in text) == (path.stem in WITH_DAGGERS), (
            path
        )
        assert path.with_suffix(".tex").read_text().startswith("\\begin{figure}")
    assert "95% intervals of the paired difference" in (tmp_path / "f" / "forest.md").read_text()


WITH_DAGGERS = {
    "pareto_nll", "pareto_exact_match", "pareto_seconds", "pareto_flops", "pareto_memory", "rank_nll",
    "rank_exact_match", "heatmap_nll", "arms_nll", "forest", "share_kept", "learning_rate", "training_curves",
}  # fmt: skip


def test_figures_without_their_data_say_why(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=20, steps=2, modules=False)
    written, absent = figures.write(analyse(load(study), draws=50), tmp_path / "f", workers=1)
    assert set(absent) >= {
        "rank_nll",
        "learning_rate",
        "learn_forget",
        "where_rank_went",
        "where_energy_went",
        "importance",
    }
    assert all(len(reason) > 10 for reason in absent.values())
    assert {path.stem for path in written} | set(absent) == ALL


def test_full_fine_tuning_alone_has_no_figure_over_ranks(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", methods=("full_ft",), ranks=(4,), lrs=(1e-3, 3e-3), examples=20, steps=2)
    written, absent = figures.write(analyse(load(study), draws=50), tmp_path / "f", workers=1)
    assert {"rank_nll", "heatmap_nll", "where_rank_went"} <= set(absent)
    assert {"learning_rate", "training_curves"} <= {path.stem for path in written}


def test_no_point_lies_outside_a_panel_that_shares_its_axis(tmp_path: Path) -> None:
    for rank, rates in ((4, (1e-5, 1e-4)), (16, (1e-2, 3e-2))):
        write_study(tmp_path / "s", ranks=(rank,), lrs=rates, examples=20, steps=2)
    figure = figures.learning_rate(analyse(load(tmp_path / "s"), draws=50))
    assert not isinstance(figure, str)
    for ax in figure.axes:
        low, high = ax.get_xlim()
        assert all(low < x < high for line in ax.lines for x in line.get_xdata())
    plt.close(figure)


def test_methods_at_ranks_of_their_own_stand_in_one_panel(tmp_path: Path) -> None:
    """As VeRA does at 256 where others have 8: no line joins ranks, no figure over ranks is made of single points."""
    methods = ("lora", "dora", "bitfit", "full_ft")
    one = Truth(placements={"full": 0.1})
    study = write_study(tmp_path / "s", truth=one, ranks=(4,), lrs=(1e-3, 3e-3), methods=methods, examples=20, steps=2)

    def change(plain: dict[str, Any]) -> None:
        if plain["spec"]["method"]["name"] == "dora":
            plain["spec"]["rank"] = 256
            plain["modules"][0]["rank"] = 200
        if plain["spec"]["method"]["name"] == "full_ft":
            plain["modules"] = [{"name": "q", "role": "attn_q", "layer": 0, "rank": 576, "parameters": 9}]

    for folder in study.iterdir():
        edit(folder, change)
    drawn = figures.make(analyse(load(study), draws=50))
    assert drawn["rank_nll"] == drawn["heatmap_nll"] == "no arms differ in rank alone"
    for name in ("learning_rate", "training_curves"):
        assert series(drawn[name]) == {"lora", "dora", "bitfit", "full fine-tuning"}
    where = drawn["where_rank_went"]
    assert not isinstance(where, str)
    assert [ax.get_title() for ax in where.axes] == ["dora†", ""]  # the uneven one and the colour bar


def test_titles_of_many_long_names_stay_apart(tmp_path: Path) -> None:
    names = tuple(f"dataset_with_a_long_name_{i}" for i in range(4))
    study = write_study(
        tmp_path / "s", datasets=names, ranks=(2, 4, 8, 16, 32), lrs=(1e-3, 3e-3), seeds=(0,), examples=10, steps=2,
        modules=False,
    )  # fmt: skip
    found = analyse(load(study), draws=50)
    with styled():
        for made in (figures.heat_map(found, "nll"), figures.importance(found), figures.learning_rate(found)):
            assert not isinstance(made, str)
            made.draw_without_rendering()
            boxes = [ax.title.get_window_extent() for ax in made.axes if ax.get_title()]
            assert len(boxes) >= 4
            assert all(box.x0 >= 0 and box.x1 <= made.bbox.x1 for box in boxes)
            assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
            plt.close(made)


def test_records_without_parameter_counts_are_drawn_as_far_as_they_go(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", examples=20, steps=2)
    for run in study.iterdir():
        edit(run, lambda plain: plain.update(trainable_parameters=0, total_parameters=0))
    written, absent = figures.write(analyse(load(study), draws=50), tmp_path / "f", workers=1)
    assert {"share_kept", "pareto_nll"} <= set(absent)
    assert any(path.stem == "rank_nll" for path in written)


def test_a_figure_of_a_former_run_does_not_stay(analysis: Analysis, tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=20, steps=2)
    small, two = analyse(load(study), draws=50), ["learn_forget", "pareto_nll"]
    figures.write(analysis, tmp_path, only=two)
    (tmp_path / "learn_forget.pdf").write_text("mine")
    figures.write(small, tmp_path, only=["learn_forget"])
    assert sorted(path.name for path in tmp_path.glob("*.p*")) == [
        "learn_forget.pdf",
        "pareto_nll.pdf",
        "pareto_nll.png",
    ]


def test_placements_keep_their_look() -> None:
    one, two = looks(["attn", "ff", "full"]), looks(["custom", "full", "attn"])
    assert one["full"] == two["full"]
    assert one["attn"] == two["attn"]
    several = looks(["attn", "ff", "full", "a", "b", "c", "d"])
    assert len({(look.colour, look.marker) for look in several.values()}) == 7
    assert len({look.marker for look in several.values()}) == 7  # told apart without colour


def test_methods_are_told_apart_in_a_study_of_them(tmp_path: Path) -> None:
    methods = ("lora", "bitfit", "full_ft")
    found = analyse(load(write_study(tmp_path / "s", ranks=(4,), methods=methods, examples=20, steps=2)), draws=50)
    figure = figures.pareto(found, "nll")
    assert not isinstance(figure, str)
    placements = ("attn", "ff", "full")
    assert series(figure) == {f"{place} {method}" for place in placements for method in methods[:2]} | {
        "full fine-tuning"
    }
    assert not [text for ax in figure.axes for text in ax.texts if text.get_text() == "4"]  # the rank of all
    one = found.arms.query("placement in ('full', 'full fine-tuning')")
    assert set(kinds(one)) == {"lora", "bitfit", "full fine-tuning"}
    assert one[one["method"] == "bitfit"]["rank"].isna().all()


def series(figure: Figure | str) -> set[str]:
    """The names in a figure's legend, without their daggers."""
    assert not isinstance(figure, str), figure
    return {text.get_text().removesuffix("†") for text in figure.legends[0].get_texts()}


def test_long_names_leave_room_for_the_panel(tmp_path: Path) -> None:
    """As placements are named that come from PEFT, by their target modules."""
    study = write_study(tmp_path / "s", ranks=(4, 8), seeds=(0,), examples=20, steps=2)
    for folder in study.iterdir():
        edit(
            folder, lambda plain: plain["spec"]["placement"].update(name="+".join(plain["spec"]["placement"]["roles"]))
        )
    found = analyse(load(study), draws=50)
    with styled():
        for made in (
            figures.every_arm(found, "nll"),
            figures.heat_map(found, "nll"),
            figures.rank_curves(found, "nll"),
        ):
            assert not isinstance(made, str)
            made.draw_without_rendering()
            assert made.axes[0].get_window_extent().width > 0.3 * made.bbox.width
            assert all(legend.get_window_extent().x1 <= made.bbox.x1 for legend in made.legends)
            plt.close(made)


def test_a_legend_of_long_names_is_not_cut() -> None:
    for width, names in ((DEFAULT.column, ["attn importance", "ff importance"]), (DEFAULT.text, list("abcdefg"))):
        with styled():
            figure, _ = plt.subplots(figsize=(width, 2), layout="constrained")
            layout.legend(figure, looks([f"{name}{end}" for name in names for end in ("", " of a method")]))
            figure.draw_without_rendering()
            box = figure.legends[0].get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
            plt.close(figure)


def test_no_figure_leaves_a_method_out(tmp_path: Path) -> None:
    methods = ("lora", "dora", "bitfit", "full_ft")
    study = write_study(tmp_path / "s", ranks=(4, 8), lrs=(1e-3, 3e-3), methods=methods, examples=20, steps=2)
    drawn = figures.make(analyse(load(study), draws=50))
    ranked = {f"{place} {method}" for place in ("attn", "ff", "full") for method in ("lora", "dora")}
    every = ranked | {f"{place} bitfit" for place in ("attn", "ff", "full")} | {"full fine-tuning"}
    assert series(drawn["rank_nll"]) == every
    assert series(drawn["learning_rate"]) == series(drawn["training_curves"]) == ranked
    dots = drawn["arms_nll"]
    assert not isinstance(dots, str)
    labels = {label.get_text().removesuffix("†") for label in dots.axes[0].get_yticklabels()}
    assert labels == (every - ranked) | {f"{name} r{rank}" for name in ranked for rank in (4, 8)}


def test_methods_without_a_rank_stand_beside_the_others_where_there_is_one(tmp_path: Path) -> None:
    study = write_study(
        tmp_path / "s", ranks=(4,), lrs=(1e-3, 3e-3), methods=("lora", "bitfit", "full_ft"), examples=20, steps=2
    )
    drawn = figures.make(analyse(load(study), draws=50))
    for name in ("learning_rate", "training_curves"):
        assert {"attn lora", "attn bitfit", "full fine-tuning"} <= series(drawn[name])


def test_an_interval_that_would_hide_the_rest_is_cut_and_says_so() -> None:
    arms = pd.DataFrame({"label": list("abcd"), "nll": [0.3, 0.31, 0.32, 0.33]})
    arms = arms.assign(nll_low=arms["nll"] - 0.02, nll_high=arms["nll"] + 0.02)
    assert draw.limits(arms, "nll") == (pytest.approx(0.28), pytest.approx(0.35))
    arms.loc[3, ["nll_low", "nll_high"]] = [-4.0, 5.0]
    figure, ax = plt.subplots()
    draw.dots(ax, arms, "nll")
    low, high = ax.get_xlim()
    assert 0.1 < low < 0.3
    assert 0.33 < high < 0.5
    arrows = [line for line in ax.lines if line.get_marker() in "<>" and len(line.get_xdata())]
    assert [line.get_ydata().tolist() for line in arrows] == [[0], [0]]  # of the last row
    plt.close(figure)


@pytest.mark.parametrize("rates", [(1e-3, 3e-3, 1e-2), (1.2e-3, 5.7e-3, 5.9e-3, 9.25e-3), (3.4e-5, 8.1e-2)])
def test_learning_rates_are_where_their_labels_say(rates: tuple[float, ...]) -> None:
    trials = pd.DataFrame({"placement": "ff", "lr": rates, "value": 1.0, "mean": 1.0, "chosen": False, "marked": False})
    figure, ax = plt.subplots()
    draw.learning_rates(ax, trials, looks(["ff"]))
    figure.canvas.draw()
    ticks = [(tick.get_loc(), tick.label1.get_text()) for tick in ax.xaxis.get_major_ticks()]
    assert len(ticks) > 1
    for place, label in ticks:
        assert float(label.replace("−", "-")) == pytest.approx(place)
    plt.close(figure)


def test_a_single_rank_shows_its_interval() -> None:
    arms = pd.DataFrame({"placement": ["ff"], "rank": [8], "nll": [1.0], "nll_low": [0.5], "nll_high": [1.5]})
    arms["marked"] = False
    figure, ax = plt.subplots()
    draw.rank_lines(ax, arms, "nll", looks(["ff"]))
    low, high = ax.get_ylim()
    assert low < 0.5
    assert high > 1.5
    assert sum(len(one.get_paths()) for one in ax.collections if isinstance(one, LineCollection)) == 1
    plt.close(figure)


def test_forgetting_has_few_labels_so_that_none_lie_on_one_another() -> None:
    arms = pd.DataFrame({"placement": "ff", "rank": [2, 4, 8], "forgetting": [-0.207, -0.1, -0.002], "nll": 1.0})
    arms = arms.assign(on_front=True, marked=False)
    for name in ("nll", "forgetting"):
        arms = arms.assign(**{f"{name}_low": arms[name] - 0.01, f"{name}_high": arms[name] + 0.01})
    figure, ax = plt.subplots(figsize=(DEFAULT.text, 2))
    draw.learn_forget(ax, arms, "nll", looks(["ff"]))
    low, high = ax.get_xlim()
    assert 3 <= sum(low <= tick <= high for tick in ax.get_xticks()) <= 6
    plt.close(figure)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Twelve placements at two ranks and full fine-tuning; the rate of one arm is at no edge."""
    levels = {f"p{i:02}": 0.2 - 0.01 * i for i in range(12)}
    study = tmp_path_factory.mktemp("outputs") / "crowd"
    with pytest.MonkeyPatch.context() as patch:
        for name in levels:
            patch.setitem(ROLES, name, ROLES["attn"])
        write_study(study, truth=Truth(placements=levels), ranks=(4, 8), examples=20, steps=2, modules=False)
    write_study(
        study, truth=Truth(placements={"full": 0.1}), ranks=(4,), methods=("full_ft",), examples=20, steps=2
    )  # fmt: skip
    return analyse(load(study), draws=50)


def test_of_many_kinds_the_best_have_a_colour(crowd: Analysis) -> None:
    look = shown.all_looks(crowd)
    assert {name for name, one in look.items() if one == FADED} == {"p00", "p01", "p02", "p03"}
    assert len({(one.colour, one.marker) for one in look.values()}) == 8 + 1 + 1
    assert series(figures.pareto(crowd, "nll")) == {f"p{i:02}" for i in range(4, 12)} | {"full fine-tuning", "4 others"}
    assert "Of 12 placements (or methods) the 8 whose best arms score best have a colour" in captions.caption(
        crowd, "pareto_nll"
    )


def test_a_forest_of_many_shows_the_surest_differences_first(crowd: Analysis) -> None:
    figure = figures.forest(crowd)
    assert not isinstance(figure, str)
    tests = crowd.tables["tests"].query("metric == 'nll' and family == 'placement'")
    assert len(tests) == 132
    ax = figure.axes[0]
    assert len(ax.get_yticks()) == shown.MOST_ARMS
    assert float(shown.first(shown.comparisons(crowd))["p"].max()) <= tests["p"].nsmallest(31).max()
    text = captions.caption(crowd, "forest")
    assert "Of up to 132 comparisons a task the first 30 are shown: smallest p, then largest difference" in text


def test_full_fine_tuning_is_a_line_with_a_band(crowd: Analysis) -> None:
    row = shown.trained(crowd, "nll").query("placement == 'full fine-tuning'").iloc[0]
    for made in (figures.pareto(crowd, "nll"), figures.rank_curves(crowd, "nll")):
        assert not isinstance(made, str)
        ax = made.axes[0]
        lines = [line for line in ax.lines if list(line.get_xdata()) == [0, 1] and line.get_ydata()[0] == row["nll"]]
        assert len(lines) == 1
        bands = [patch.get_extents().transformed(ax.transData.inverted()) for patch in ax.patches]
        assert [(band.y0, band.y1) for band in bands] == [pytest.approx((row["nll_low"], row["nll_high"]))]
    upright = figures.every_arm(crowd, "nll")
    assert not isinstance(upright, str)
    assert any(list(line.get_ydata()) == [0, 1] and line.get_xdata()[0] == row["nll"] for line in upright.axes[0].lines)


def heat(analysis: Analysis) -> Any:
    figure = figures.heat_map(analysis, "nll")
    assert not isinstance(figure, str)
    return figure.axes[0]


def test_colours_span_at_least_what_the_study_could_find(tmp_path: Path) -> None:
    alike = Truth(placements={"attn": 0.3, "ff": 0.3, "full": 0.3}, per_doubling=0.0)
    found = analyse(load(write_study(tmp_path / "s", truth=alike, ranks=(4, 8), examples=60, steps=2)), draws=50)
    ax = heat(found)
    norm = ax.images[0].norm
    values = ax.images[0].get_array()
    least = float(found.tables["power"].query("own_design")["detectable"].iloc[0])
    assert norm.vmax - norm.vmin == pytest.approx(least)
    assert float(values.max() - values.min()) < 0.8 * least
    hatched = [patch for patch in ax.patches if patch.get_hatch()]
    framed = [patch for patch in ax.patches if not patch.get_hatch()]
    assert len(framed) == 1  # the reference
    assert len(hatched) == 5 - int(found.tables["contrasts"].query("metric == 'nll'")["significant"].sum())
    assert sum("±" in text.get_text() for text in ax.texts) == 5


def test_colours_of_large_differences_span_the_scores(tmp_path: Path) -> None:
    apart = Truth(placements={"attn": 1.3, "ff": 0.6, "full": 0.3})
    ax = heat(analyse(load(write_study(tmp_path / "s", truth=apart, ranks=(4, 8), examples=60, steps=2)), draws=50))
    norm, values = ax.images[0].norm, ax.images[0].get_array()
    assert (norm.vmin, norm.vmax) == (values.min(), values.max())
    assert sum(bool(patch.get_hatch()) for patch in ax.patches) <= 1


def test_daggers_stand_by_arms_or_for_all_in_the_legend(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4, 8), lrs=(1e-3, 3e-3), examples=20, steps=2)

    def confirm(plain: dict[str, Any]) -> None:
        spec = plain["spec"]
        sure = spec["placement"]["name"] == "attn" or (spec["placement"]["name"] == "ff" and spec["rank"] == 4)
        if spec["optim"]["lr"] == 3e-3 and sure:
            plain["search"] = {"tuned": ["optim.lr"], "purpose": "confirm"}
        spec["optim"]["lr"] *= 10 if sure and spec["optim"]["lr"] == 1e-3 else 1

    for folder in study.iterdir():
        edit(folder, confirm)
    found = analyse(load(study), draws=50)
    for arm in found.found.arms:
        arm.edges.clear()
    assert {arm.label for arm in found.found.arms if arm.doubts} == {"ff r8", "full r4", "full r8"}
    drawn = figures.make(found)
    for name in ("pareto_nll", "rank_nll", "learning_rate", "training_curves"):
        figure = drawn[name]
        assert not isinstance(figure, str)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["attn", "ff", "full†"], name
        marked = [text.get_text() for ax in figure.axes for text in ax.texts if "†" in text.get_text()]
        assert len(marked) == 1, (name, marked)  # that of ff at rank 8
    ax = drawn["heatmap_nll"].axes[0]  # type: ignore[union-attr]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["attn", "ff", "full†"]
    assert sum("†" in text.get_text() for text in ax.texts) == 1
    rows = {label.get_text() for label in drawn["forest"].axes[0].get_yticklabels()}  # type: ignore[union-attr]
    assert {"ff† − attn r8", "full† − ff† r8", "full† − ff r4"} <= rows
    names = {label.get_text() for label in drawn["arms_nll"].axes[0].get_yticklabels()}  # type: ignore[union-attr]
    assert names == {"attn r4", "attn r8", "ff r4", "ff r8†", "full r4†", "full r8†"}


def test_costs_that_all_arms_share_have_no_figure(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), examples=20, steps=2, modules=False)
    drawn = figures.make(analyse(load(study), draws=50))
    assert drawn["pareto_tokens"] == "every arm has the same training tokens"
    for folder in study.iterdir():
        edit(folder, lambda plain: plain["efficiency"].update(train_tokens=plain["trainable_parameters"] // 10))
    figure = figures.make(analyse(load(study), draws=50))["pareto_tokens"]
    assert not isinstance(figure, str)
    assert figure.axes[0].get_xlabel() == "training tokens"
