import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from analysis import Analysis, analyse, figures, load, page, report
from analysis.claims import sentences
from analysis.style import WHOLE, looks, styled
from sweeper.record import PREDICTIONS, RECORD
from tests.analysis.browser import chromium, opened
from tests.analysis.synthetic import Truth, edit, write_study

EVIL = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>{{7*7}}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def written(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    figures.write(analysis, folder / "figures", only=["pareto_nll", "rank_nll"])
    return report.write(analysis, folder, absent={"learn_forget": "no data"})


def plain(path: Path) -> dict[str, Any]:
    text = path.read_text()
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def test_one_file_without_network(written: Path) -> None:
    text = written.read_text()
    assert "default-src 'none'" in text
    own = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    for word in ("http:", "https:", "@import", ' src="', "<link", "url("):
        assert word not in own, word
    assert len(re.findall("<script", text)) == 3
    assert len(text) < 3_000_000


def test_the_data_holds_every_table_with_latex(written: Path) -> None:
    data = plain(written)
    names = [sheet["name"] for sheet in data["sheets"]]
    assert {"placement_rank_nll", "efficiency", "tests", "matched_budget", "share_kept", "checks"} <= set(names)
    assert all("\\toprule" in sheet["latex"] for sheet in data["sheets"])
    assert len(data["figures"]) == 2
    assert any("lowest measured test NLL" in answer for answer in data["answers"])


@pytest.mark.parametrize("width", [1200, 390])
def test_it_opens_with_verdicts_and_the_front(browser: Any, written: Path, width: int) -> None:
    with opened(browser, written, viewport={"width": width, "height": 900}) as one:
        assert one.errors == []
        assert one.js("document.documentElement.scrollWidth") <= width  # nothing sticks out: it can be read on a phone
        headings = one.page.locator(".card p:first-child").all_inner_texts()
        assert headings[:2] == ["Best measured", "Placements at equal rank"]
        first = one.page.locator("#cards, #chart-pareto").evaluate_all("(all) => all.map((box) => box.id)")
        assert first == ["cards", "chart-pareto"]
        assert len(one.rows("pareto")) == 7
        assert one.points("pareto").count() == 7
        legend = one.page.locator("#legend button").all_inner_texts()
        assert legend == ["attn", "ff", "full", "full fine-tuning"]
        unnamed = "[...document.querySelectorAll('input, select')].filter((input) => !input.labels.length).length"
        assert one.js(unnamed) == 0


def test_charts_are_linked(browser: Any, written: Path) -> None:
    with opened(browser, written) as one:
        drawn = one.js("Object.keys(atlas.views).sort()")
        assert drawn == ["forest", "layers", "parallel", "pareto", "rank", "rates", "training"]
        one.points("pareto").nth(2).hover()
        one.settle("atlas.views.rank.signal('lit') >= 0")
        lit = one.js("Object.values(atlas.views).map((view) => view.signal('lit'))")
        assert len(set(lit)) == 1
        tip = one.page.locator("#tip").inner_text()
        assert tip.startswith(one.rows("pareto")[2]["label"])
        assert re.search(r"NLL \(nats/token\): [\d.]+ \[[\d.]+, [\d.]+\]", tip)
        assert "trainable parameters" in tip
        one.page.locator("#legend button").first.click()
        one.settle("atlas.views.training.signal('picked').length === 2")  # both ranks of attn
        faded = one.js("[...document.querySelectorAll('#chart-pareto path[aria-roledescription=point]')]"
                       ".filter((point) => Number(point.getAttribute('opacity')) < 0.5).length")  # fmt: skip
        assert faded == 5
        assert one.errors == []


def drag(one: Any, chart: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    place = one.page.locator(f"#chart-{chart} .chart")
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    (x0, y0), (x1, y1) = ((box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end))
    one.page.mouse.move(x0, y0)
    one.page.mouse.down()
    one.page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
    one.page.mouse.move(x1, y1)
    one.page.mouse.up()


def test_drag_pans_shift_and_drag_brushes(browser: Any, written: Path) -> None:
    with opened(browser, written) as one:
        domain = "JSON.stringify(atlas.views.pareto.scale('x').domain())"
        before = one.js(domain)
        drag(one, "pareto", (0.5, 0.1), (0.6, 0.1))
        one.settle(f"{domain} !== {json.dumps(before)}")
        assert one.js("atlas.views.rank.signal('picked')") == []
        one.page.locator("#brushing").check()
        one.settle(f"atlas.views.pareto && {domain} === {json.dumps(before)}")
        drag(one, "pareto", (0.1, 0.06), (0.5, 0.9))
        one.settle("atlas.views.rank.signal('picked').length > 0")
        x = one.js("atlas.views.pareto.signal('brush').x")
        y = one.js("atlas.views.pareto.signal('brush').y")
        inside = [row["id"] for row in one.rows("pareto")
                  if min(x) <= row["x"] <= max(x) and min(y) <= row["y"] <= max(y)]  # fmt: skip
        assert sorted(one.js("atlas.views.rank.signal('picked')")) == sorted(inside)
        assert 0 < len(inside) < 7
        assert one.errors == []


def test_an_arm_has_a_card_and_a_link(browser: Any, written: Path, tmp_path: Path) -> None:
    with opened(browser, written) as one:
        label = one.rows("pareto")[1]["label"]
        one.points("pareto").nth(1).click()
        card = one.page.locator("#arm")
        one.settle("!document.getElementById('arm').hidden")
        assert card.locator("h3").inner_text() == label
        command = card.locator("#command").inner_text()
        assert re.search(r"train\.py -m .*placement=attn .*rank=4 .*optim\.lr=0\.00[13] .*seed=0,1,2", command), command
        assert "arm=attn+r4" in one.page.url
        assert one.page.locator("#blocks [data-lit=true]").count() >= 7
        with opened(browser, written, state=one.page.url.partition("#")[1] + one.page.url.partition("#")[2]) as again:
            assert again.page.locator("#arm h3").inner_text() == label
            assert again.js("atlas.state.arm") == label
            again.page.keyboard.press("Escape")
            assert not again.page.locator("#arm").is_visible()
            assert "arm=" not in again.page.url
            assert again.errors == []
        assert one.errors == []


def test_the_address_says_what_is_shown(browser: Any, written: Path) -> None:
    with opened(browser, written, state="#task=icd10_chapter&x=train_seconds_solo&log=&words=attn&theme=dark") as one:
        assert one.js("atlas.views.pareto.scale('x').type") == "linear"
        assert {row["kind"] for row in one.rows("pareto")} == {"attn"}
        assert one.js("document.documentElement.dataset.theme") == "dark"
        assert one.js("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
        one.page.locator("#level").select_option("runs")
        one.settle(
            "atlas.views.pareto && atlas.views.pareto.data('rows').length === 12"
        )  # two ranks, rates, three seeds
        one.page.locator("#y").select_option("exact_match")
        assert "level=runs" in one.page.url
        assert "y=exact_match" in one.page.url
        one.js("location.hash = '#task=nonsense&unknown=1'")
        one.settle("atlas.state.level === 'arms' && atlas.state.task === atlas.data.settings[0]")
        assert one.errors == []


def test_the_keyboard_reaches_every_arm(browser: Any, written: Path) -> None:
    with opened(browser, written) as one:
        one.page.locator("#chart-pareto .chart").focus()
        said = []
        for _ in range(7):
            one.page.keyboard.press("ArrowRight")
            said.append(one.page.locator("#said").inner_text())
        assert sorted(text.split(";")[0].removesuffix(" †") for text in said) == sorted(
            row["label"] for row in one.rows("pareto")
        )
        one.page.keyboard.press("Enter")
        assert one.page.locator("#arm h3").inner_text() == said[-1].split(";")[0].removesuffix(" †")
        assert one.js("document.activeElement.id") == "arm"


def test_charts_are_saved_as_svg(browser: Any, written: Path) -> None:
    with opened(browser, written) as one:
        with one.page.expect_download() as saved:
            one.page.get_by_role("button", name=re.compile("^Save Rank as SVG")).click()
        text = Path(saved.value.path()).read_text()
        assert saved.value.suggested_filename == "rank.svg"
        assert text.startswith("<svg")
        assert text.count('aria-roledescription="point"') == len(one.rows("rank"))


def test_placements_light_their_modules(browser: Any, written: Path) -> None:
    with opened(browser, written) as one:
        lit_of = "[...block.querySelectorAll('[data-lit=true]')].map((box) => box.dataset.role).sort()"
        blocks = "[...document.querySelectorAll('#blocks button')]"
        roles = f"{blocks}.map((block) => [block.querySelector('b').textContent, {lit_of}])"
        lit = dict(one.js(roles))
        assert lit["attn"] == ["attn_k", "attn_o", "attn_q", "attn_v"]
        assert lit["ff"] == ["ff_down", "ff_gate", "ff_up"]
        assert lit["full"] == sorted(lit["attn"] + lit["ff"])
        texts = "[...document.querySelectorAll('#blocks text')].map((text) => text.textContent).join()"
        assert "down 16" in one.js(texts)
        one.page.locator("#shade").select_option("effect")
        assert re.search(r"down \d+%", one.js(texts))  # by the spectra of the updates


def close_to(value: float, known: list[float]) -> bool:
    return min(abs(value - one) for one in known) <= 1e-6 * max(1.0, abs(value))


def drawn_by(figure: Figure) -> tuple[list[tuple[float, float]], list[tuple[float, float, float, float]]]:
    """Points of all panels that have a marker or are on a curve, and bars from end to end."""
    lines = [
        line for ax in figure.axes for line in ax.lines if len(line.get_xdata()) != 2 or line.get_marker() != "None"
    ]
    points = [
        (float(x), float(y))
        for line in lines
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        if np.isfinite([x, y]).all()
    ]
    bars = [
        (*segment[0], *segment[-1])
        for ax in figure.axes
        for collection in ax.collections
        if isinstance(collection, LineCollection)
        for segment in collection.get_segments()
        if len(segment) and np.isfinite(segment).all()
    ]
    return points, bars


@pytest.mark.parametrize(
    ("chart", "make", "axes"),
    [
        ("pareto", lambda one: figures.pareto(one, "nll"), "xy"),
        ("rank", lambda one: figures.rank_curves(one, "nll"), "y"),  # points of one rank lie side by side
        ("rates", figures.learning_rate, "xy"),
        ("training", figures.training_curves, "xy"),
        ("forest", figures.forest, "x"),
    ],
)
def test_page_and_paper_have_the_same_numbers(
    browser: Any, written: Path, analysis: Analysis, chart: str, make: Any, axes: str
) -> None:
    with styled():
        figure = make(analysis)
    assert isinstance(figure, Figure)
    points, bars = drawn_by(figure)
    plt.close(figure)
    rows = []
    for task in page.content(analysis)["settings"]:
        with opened(browser, written, state=f"#task={task}") as one:
            rows += one.rows(chart)
    known = {"x": [row["x"] for row in rows], "y": [row["y"] for row in rows if isinstance(row["y"], float | int)]}
    known["y"] += [row["mean"] for row in rows if "mean" in row]
    ends = [row[end] for row in rows for end in ("low", "high") if row.get(end) is not None]
    assert len(points) >= len(rows) / 2
    for point in points:
        for axis, value in zip("xy", point, strict=True):
            assert axis not in axes or close_to(value, known[axis]), (axis, value)
    for bar in bars:
        values = bar[::2] if axes == "x" else bar[1::2]
        assert all(close_to(value, ends) for value in values), bar


def test_the_most_differing_examples_come_first(browser: Any, written: Path) -> None:
    with opened(browser, written) as one:
        names = one.page.locator("#first option").all_inner_texts()
        one.page.locator("#first").select_option(names[0])
        one.page.locator("#second").select_option(names[3])
        cells = one.page.locator("#examples tbody tr").evaluate_all(
            "(all) => all.map((row) => [...row.children].map((cell) => cell.textContent))"
        )
        gaps = [abs(float(row[1]) - float(row[2])) for row in cells]
        assert len(gaps) == 20
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[0] > gaps[-1] > 0
        one.page.locator("#examples-more").click()
        assert one.page.locator("#examples tbody tr").count() == 120
        one.page.locator("#example-words").fill(cells[0][0])
        assert one.page.locator("#examples tbody tr").first.locator("td").first.inner_text() == cells[0][0]


def test_tables_sort_filter_and_copy(browser: Any, written: Path) -> None:
    with opened(browser, written, permissions=["clipboard-read", "clipboard-write"]) as one:
        one.page.locator("#table-choice").select_option("efficiency")
        assert one.page.locator("#table tbody tr").count() == 2 * 8
        heads = one.page.locator("#table th button").all_inner_texts()
        nll = heads.index("NLL")
        column = f"(all) => all.map((row) => row.children[{nll}].textContent)"
        for direction in (False, True):
            one.page.locator("#table th button").nth(nll).click()
            texts = one.page.locator("#table tbody tr").evaluate_all(column)
            values = [float(text.split(" ")[0]) for text in texts]
            assert values == sorted(values, reverse=direction)
        assert "sort=" in one.page.url
        one.page.locator("#table-search").fill("attn")
        assert one.page.locator("#table tbody tr").count() == 2 * 2
        one.page.locator("#copy-latex").click()
        one.settle("document.getElementById('copied').textContent.includes('LaTeX')")
        if "is on the clipboard" in one.page.locator("#copied").inner_text():
            assert "\\toprule" in one.js("navigator.clipboard.readText()")
        assert one.errors == []


def test_no_serious_fault_of_accessibility(browser: Any, written: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for scheme in ("light", "dark"):
        with opened(browser, written, bypass_csp=True, color_scheme=scheme) as one:
            one.page.locator("#blocks button").first.click()  # with the card of an arm
            found = Axe().run(one.page).response["violations"]
            grave = [fault for fault in found if fault["impact"] in ("serious", "critical")]
            assert [(fault["id"], [node["html"][:200] for node in fault["nodes"][:3]]) for fault in grave] == []


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no pdftotext")
def test_tables_keep_their_headings_in_print(browser: Any, written: Path, tmp_path: Path) -> None:
    with opened(browser, written) as one:
        one.page.pdf(path=tmp_path / "report.pdf")
    text = subprocess.run(["pdftotext", tmp_path / "report.pdf", "-"], capture_output=True, text=True).stdout
    assert {"task", "placement", "r=4", "r=16"} <= set(text.splitlines())
    assert "Copy LaTeX" not in text


def test_one_run_is_one(tmp_path: Path) -> None:
    one = Truth(placements={"full": 0.1})
    study = write_study(tmp_path / "s", truth=one, ranks=(4,), seeds=(0,), examples=20, steps=2)
    said = page.content(analyse(load(study), draws=50))
    assert said["counts"] == "1 run (1 completed); 1 arm."
    assert said["answers"][0].startswith("icd10_chapter: full r4 has test NLL, 0.")
    # pruned after its base model was scored
    edit(next(study.iterdir()), lambda plain: plain.update(status="pruned"))
    said = page.content(analyse(load(study), draws=50))
    assert said["counts"] == "1 run (1 pruned); 0 arms; arm without a completed run: 1."
    assert said["answers"] == ["No run completed, so there is nothing to compare yet."]


def test_a_study_without_a_completed_run_has_a_page(browser: Any, tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=20, steps=2)
    for run in study.iterdir():
        edit(run, lambda plain: plain.update(status="failed", error={"class": "E", "message": "m"}))
    with opened(browser, report.write(analyse(load(study), draws=50), tmp_path / "paper")) as one:
        assert one.errors == []
        assert not one.page.locator("#explore").is_visible()
        assert "E: m" in one.page.locator("#check-list").inner_text()


def test_methods_are_told_apart_as_in_the_figures(browser: Any, tmp_path: Path) -> None:
    methods = ("lora", "dora", "pissa", "olora", "relora", "rslora", "lora_fa", "lora_plus", "bitfit", "full_ft")
    one = Truth(placements={"full": 0.1})
    study = write_study(tmp_path / "s", truth=one, ranks=(4,), seeds=(0,), methods=methods, examples=20, steps=2)
    found = analyse(load(study), draws=50)
    kinds = [*sorted(methods[:-1]), "full fine-tuning"]
    ink = {"#000000": "#1c232b", WHOLE.colour: "#1c232b"}
    with opened(browser, report.write(found, tmp_path / "paper"), viewport={"width": 390, "height": 900}) as seen:
        assert seen.errors == []
        assert sorted(seen.page.locator("#legend button").all_inner_texts()) == sorted(kinds)
        drawn = seen.points("pareto").evaluate_all(
            "(all) => all.map((p) => [p.getAttribute('fill'), p.getAttribute('d')])"
        )
        assert len({tuple(look) for look in drawn}) == len(kinds)
        colours = {ink.get(look.colour, look.colour) for look in (*looks(kinds[:-1]).values(), WHOLE)}
        assert {colour.lower() for colour, _ in drawn} == {colour.lower() for colour in colours}
        assert seen.js("document.documentElement.scrollWidth") <= 390


def test_text_from_records_stays_text(browser: Any, tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0, 1), examples=20, steps=2)
    for folder in study.iterdir():

        def spoil(plain: dict[str, Any]) -> None:
            plain["spec"]["dataset"]["name"] = EVIL
            plain["spec"]["placement"]["name"] += EVIL
            for module in plain["modules"]:
                module["role"] = EVIL

        edit(folder, spoil)
        lines = [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]
        evil = [row | {"id": EVIL + row["id"], "text": EVIL} for row in lines]
        (folder / PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in evil))
    edit(next(study.iterdir()), lambda plain: plain.update(status="failed", error={"class": EVIL, "message": EVIL}))
    found = analyse(load(study), draws=50)
    found.study.name = EVIL
    with opened(browser, report.write(found, tmp_path / "paper")) as one:
        one.points("pareto").first.hover()
        one.settle("document.getElementById('tip') && !document.getElementById('tip').hidden")
        one.points("pareto").first.click()
        assert EVIL in one.page.locator("#arm").inner_text()
        assert EVIL in one.page.locator("#title").inner_text()
        assert EVIL in one.page.locator("#examples").inner_text()
        assert one.js("window.broken") is None
        assert one.page.locator("img").count() == 0
        assert one.errors == []


def test_what_a_running_study_sends_is_drawn(browser: Any, written: Path) -> None:
    """The page's `update`, which a live page calls."""
    with opened(browser, written) as one:
        one.js("""() => {
          const arms = structuredClone(atlas.data.tables.arms);
          const i = arms.setting.indexOf(atlas.state.task);
          arms.nll[i] = 0.25;
          atlas.update({ tables: { arms }, counts: "1 run training" });
        }""")
        one.settle("atlas.views.pareto && atlas.views.pareto.data('rows').some((row) => row.y === 0.25)")
        assert one.page.locator("#counts").inner_text() == "1 run training"
        assert one.errors == []


@pytest.mark.slow
def test_ten_thousand_runs_load_and_pan(browser: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "run_id": f"{placement}-{rank}-{lr:g}-{seed}", "study": "many", "status": "completed", "folder": None,
            "source": "study", "model": "m", "dataset": "d", "method": "lora", "allocation": "uniform",
            "placement": placement, "rank": rank, "seed": seed, "optim.lr": lr, "trainable_parameters": 1000 * rank,
            "total_parameters": 10**8, "finished": "", "layout": 0, "git_commit": "c",
            "test.nll": 1 + 0.1 * rng.random(),
            "validation.nll": 1 + 0.1 * rng.random(), "train_seconds_solo": 1 + rng.random(),
        }
        for placement in ("attn", "ff", "full", "upper", "lower")
        for rank in (1, 2, 4, 8, 16, 32, 64, 128)
        for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
        for seed in range(50)
    ]  # fmt: skip
    path = report.write(analyse(load(rows=rows), draws=20), tmp_path / "paper")
    assert path.stat().st_size < 20_000_000
    taken = []
    for _ in range(3):
        with opened(browser, path, state="#level=runs") as one:
            assert len(one.rows("pareto")) == 10_000
            assert one.page.locator("#chart-pareto canvas").count() == 1
            taken.append(one.js("performance.getEntriesByName('pareto')[0].startTime"))
            one.js(
                "(() => { window.frames_ = []; let last = performance.now(); const tick = (now) => {"
                " window.frames_.push(now - last); last = now; requestAnimationFrame(tick); };"
                " requestAnimationFrame(tick); })()"
            )
            box = one.page.locator("#chart-pareto .chart").bounding_box()
            one.page.mouse.move(box["x"] + 400, box["y"] + 100)
            one.page.mouse.down()
            for i in range(60):
                one.page.mouse.move(box["x"] + 400 + 2 * i, box["y"] + 100 + i)
            frames = one.js("window.frames_")
            one.page.mouse.up()
            assert one.errors == []
    assert min(taken) < 3000  # milliseconds until the first chart can be used
    assert np.median(frames) <= 50


def test_the_answers_say_which_method_won(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4, 8), methods=("lora", "dora"), examples=40, steps=2)
    for run in study.iterdir():
        if '"name": "dora"' in (run / RECORD).read_text():
            lines = [json.loads(line) for line in (run / PREDICTIONS).read_text().splitlines()]
            worse = [row | {"nll": row["nll"] + (row["moment"] == "after") * row["tokens"]} for row in lines]
            (run / PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in worse))
    said = sentences(analyse(load(study), draws=50))
    won = [line for line in said if "comparisons of methods at equal placement and rank" in line]
    assert won == [
        "icd10_chapter: 6 of 6 comparisons of methods at equal placement and rank found a difference (2 more in the "
        "table): lora better in 6."
    ]


def test_without_parameter_counts_nothing_is_said_of_them(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", examples=20, steps=2)
    for run in study.iterdir():
        edit(run, lambda plain: plain.update(trainable_parameters=0, total_parameters=0))
    said = sentences(analyse(load(study), draws=50))
    assert any("has the lowest measured test NLL" in line for line in said)
    assert not any("nan" in line for line in said)
