"""Every figure fits the page of every venue, and all of its text can be read there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis import Analysis, analyse, figures, load
from analysis.style import styled
from analysis.venues import LEAST_FONT, VENUES, Venue, venue
from tests.analysis.synthetic import ROLES, Truth, edit, write_study


def texts(artist: Artist) -> Iterator[Text]:
    """Text that is drawn: no title, label or tick that is empty or hidden with its parent."""
    if not artist.get_visible():
        return
    if isinstance(artist, Text) and artist.get_text().strip():
        yield artist
    for child in artist.get_children():
        yield from texts(child)


def drawn(figure: Figure) -> list[Text]:
    """Texts of a figure but the labels of ticks outside their axis, which matplotlib keeps and does not draw."""
    outside = set()
    for ax in figure.axes:
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low - 1e-9 * abs(low) <= tick.get_loc() <= high + 1e-9 * abs(high):
                    outside.update((tick.label1, tick.label2))
    return [text for text in texts(figure) if text not in outside]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Twelve placements with long names, two ranks, uneven ranks in one; full fine-tuning; scored on the way;
    forgetting and spectra."""
    names = {
        f"{first}_of_the_{second}": 0.1 + 0.002 * i + 0.03 * j
        for i, first in enumerate(("keys", "values", "queries"))
        for j, second in enumerate(("lower_half", "upper_half", "middle", "ends"))
    }
    study = tmp_path_factory.mktemp("outputs") / "many"
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(ROLES, name, ROLES["attn"])
        write_study(
            study, truth=Truth(placements=names), ranks=(4, 8), lrs=(1e-3, 3e-3), examples=30, steps=12, evaluations=4,
            forgetting=True, spectra=True,
        )  # fmt: skip
        write_study(
            study, truth=Truth(placements={"full": 0.1}), ranks=(4,), lrs=(1e-3, 3e-3), methods=("full_ft",),
            examples=30, steps=12, evaluations=4, forgetting=True,
        )  # fmt: skip
    for folder in study.iterdir():
        edit(
            folder,
            lambda plain: [one.update(rank=1 + one["layer"]) for one in plain["modules"] if plain["spec"]["rank"] == 8],
        )
    return analyse(load(study), draws=50)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Three tasks with long names."""
    names = ("classification_of_icd10_chapters", "gsm_symbolic", "questions_about_biomedical_abstracts")
    study = write_study(
        tmp_path_factory.mktemp("outputs") / "tasks", ranks=(4, 8), datasets=names, lrs=(1e-3, 3e-3), examples=30,
        steps=12, methods=("lora", "full_ft"), forgetting=True, evaluations=4,
    )  # fmt: skip
    return analyse(load(study), draws=50)


@pytest.mark.slow
@pytest.mark.parametrize("page", VENUES.values(), ids=list(VENUES))
@pytest.mark.parametrize("study", ["many", "tasks"])
def test_all_text_can_be_read_and_none_is_cut(page: Venue, study: str, request: pytest.FixtureRequest) -> None:
    found: Analysis = request.getfixturevalue(study)
    count = 0
    with styled():
        for name, maker in figures.makers(found).items():
            made = maker(found, page)
            if isinstance(made, str):
                continue
            made.draw_without_rendering()
            width, height = made.bbox.width, made.bbox.height
            assert made.get_figwidth() in (page.column, page.text), name
            assert made.get_figheight() <= page.height, name
            for text in drawn(made):
                count += 1
                assert text.get_fontsize() >= LEAST_FONT, (name, text.get_text())
                box = text.get_window_extent()
                inside = box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
                assert inside, (name, text.get_text(), box, (width, height))
            plt.close(made)
    assert count > 300


def test_a_small_or_cut_text_is_found() -> None:
    figure, ax = plt.subplots()
    ax.text(0.5, 0.5, "small", fontsize=5)
    ax.text(1.2, 0.5, "a long text that leaves the canvas", fontsize=9)
    ax.set_xlim(0, 1)
    figure.draw_without_rendering()
    by_text = {text.get_text(): text for text in drawn(figure)}
    assert by_text["small"].get_fontsize() < LEAST_FONT
    assert by_text["a long text that leaves the canvas"].get_window_extent().x1 > figure.bbox.width
    plt.close(figure)


@pytest.mark.parametrize("page", VENUES.values(), ids=list(VENUES))
def test_files_are_as_wide_as_the_venue_prints_them(page: Venue, analysis: Analysis, tmp_path: Path) -> None:
    figures.write(analysis, tmp_path, only=["forest", "importance", "heatmap_nll"], venue=page)
    for path in tmp_path.glob("*.pdf"):
        width = float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", path.read_bytes())[1]) / 72  # type: ignore[index]
        assert width == pytest.approx(page.text, abs=0.01)


def test_an_unknown_venue_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"venue iclr: no such venue\. Choose from icml, neurips, acl"):
        venue("iclr")
