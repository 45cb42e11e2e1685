import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from analysis import Analysis, analyse, figures, load, report
from analysis.claims import sentences
from analysis.style import WHOLE, looks
from sweeper.record import PREDICTIONS, RECORD
from tests.analysis.synthetic import Truth, edit, write_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><script>parent.broken = 1</script><img src=x onerror='parent.broken = 1'>"

# A page with the report in a frame of a given width; after some clicking it writes what it saw as JSON.
DRIVER = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" style="border:0" width="@@WIDTH@@" height="900" srcdoc="@@REPORT@@"></iframe><pre id="result"></pre>
<script>
document.getElementById("f").addEventListener("load", () => {
  const win = document.getElementById("f").contentWindow, doc = win.document, seen = { errors: win.errors };
  const count = () => doc.querySelectorAll("#chart .point").length;
  const change = (element, value) => { element.value = value; element.dispatchEvent(new win.Event("change")); };
  try {
    seen.wide = doc.documentElement.scrollWidth;
    seen.points = count();
    const looks = () => [...doc.querySelectorAll("#chart .point")].map((point) =>
      point.getAttribute("fill") + point.getAttribute("d").replace(/[\\d.,-]+/g, ""));
    const legend = () => [...doc.querySelectorAll("#legend li")].map((item) => item.textContent);
    seen.looks = looks();
    seen.legend = legend();
    const filter = doc.querySelector("[data-filter]");
    filter.click();
    seen.filtered = count();
    seen.left = legend();
    filter.click();
    doc.querySelector("#chart .point").dispatchEvent(new win.Event("focus"));
    seen.tip = doc.getElementById("tip").hidden ? null : doc.getElementById("tip").textContent;
    change(doc.getElementById("choose-x"), "train_seconds_solo");
    seen.axis = [...doc.querySelectorAll("#chart text")].map((text) => text.textContent);
    change(doc.getElementById("choose-level"), "runs");
    seen.runs = count();
    const names = [...doc.querySelectorAll("#table-choice option")].map((option) => option.textContent);
    seen.tables = names;
    change(doc.getElementById("table-choice"), names.indexOf("efficiency"));
    const column = (i) => [...doc.querySelectorAll("#table tbody tr")].map((row) => row.children[i].textContent);
    seen.rows = column(0).length;
    const heads = () => [...doc.querySelectorAll("#table th button")];
    const nll = heads().findIndex((button) => button.textContent === "NLL");
    heads()[nll].click();
    seen.up = column(nll);
    heads()[nll].click();
    seen.down = column(nll);
    doc.getElementById("table-search").value = "attn";
    doc.getElementById("table-search").dispatchEvent(new win.Event("input"));
    seen.found = doc.querySelectorAll("#table tbody tr").length;
    doc.getElementById("copy-latex").click();
    seen.answers = doc.querySelectorAll("#answer-list li").length;
    seen.checks = doc.querySelectorAll("#check-list li").length;
    seen.images = [...doc.images].map((image) => image.alt.length > 0 && image.src.startsWith("data:"));
    seen.unnamed = [...doc.querySelectorAll("input, select")].filter((input) => !input.labels.length).length;
    seen.title = doc.getElementById("title").textContent;
  } catch (error) {
    seen.errors.push(String(error.stack));
  }
  setTimeout(() => {
    seen.copied = doc.getElementById("copied").textContent;
    seen.broken = window.broken === 1;
    document.getElementById("result").textContent = JSON.stringify(seen);
  }, 300);
});
</script>"""
WATCH = """<script>var errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective + " " + event.blockedURI));
console.error = (...words) => errors.push(words.join(" "));</script>"""


def chromium(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=8000", *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def browse(path: Path, folder: Path, width: int) -> dict[str, Any]:
    page = path.read_text().replace('<meta charset="utf-8">', '<meta charset="utf-8">' + WATCH, 1)
    driver = folder / f"driver{width}.html"
    driver.write_text(DRIVER.replace("@@WIDTH@@", str(width)).replace("@@REPORT@@", html.escape(page)))
    done = chromium(folder, "--window-size=1300,1000", "--dump-dom", driver.as_uri())
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    assert found[1], f"the page did not answer: {done.stderr[-2000:]}"
    return dict(json.loads(html.unescape(found[1])))


@pytest.fixture(scope="module")
def page(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    figures.write(analysis, folder / "figures", only=["pareto_nll", "rank_nll"])
    return report.write(analysis, folder, absent={"learn_forget": "no data"})


def test_one_file_without_network(page: Path) -> None:
    text = page.read_text()
    markup = text.replace(re.search(r'<script id="data".*?</script>', text, re.DOTALL)[0], "")  # type: ignore[index]
    markup = markup.replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in markup
    for word in ("http:", "https:", "@import", ' src="', "<link", "url("):
        assert word not in markup, word
    assert len(text) < 3_000_000


def test_the_data_holds_every_table_with_latex(page: Path) -> None:
    text = page.read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    names = [sheet["name"] for sheet in data["sheets"]]
    assert {"placement_rank_nll", "efficiency", "tests", "matched_budget", "share_kept", "checks"} <= set(names)
    assert all("\\toprule" in sheet["latex"] for sheet in data["sheets"])
    assert len(data["figures"]) == 2
    assert any("lowest measured test NLL" in answer for answer in data["answers"])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_it_works_in_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    seen = browse(page, tmp_path, width)
    assert seen["errors"] == []
    assert seen["wide"] <= width  # nothing sticks out: it can be read on a phone
    assert seen["points"] == 7
    assert seen["filtered"] == 5
    assert seen["legend"] == ["attn", "ff", "full", "full fine-tuning"]
    assert seen["left"] == ["ff", "full", "full fine-tuning"]
    assert "trainable parameters" in seen["tip"]
    assert "training seconds alone" in seen["axis"]
    assert seen["runs"] == 2 * 3 * (6 + 1)  # both learning rates
    assert seen["rows"] == 2 * 8
    first = [float(text.split(" ")[0]) for text in seen["up"]]
    assert first == sorted(first)
    assert [float(text.split(" ")[0]) for text in seen["down"]] == sorted(first, reverse=True)
    assert seen["found"] == 2 * 2
    assert seen["answers"] >= 2
    assert seen["checks"] >= 1
    assert seen["images"] == [True, True]
    assert seen["unnamed"] == 0
    assert "LaTeX" in seen["copied"] or "did not allow" in seen["copied"]


@pytest.mark.skipif(CHROMIUM is None or shutil.which("pdftotext") is None, reason="no Chromium, or no pdftotext")
def test_tables_keep_their_headings_in_print(page: Path, tmp_path: Path) -> None:
    chromium(tmp_path, f"--print-to-pdf={tmp_path / 'report.pdf'}", page.as_uri())
    text = subprocess.run(["pdftotext", tmp_path / "report.pdf", "-"], capture_output=True, text=True).stdout
    assert {"task", "placement", "r=4", "r=16"} <= set(text.splitlines())
    assert "Copy LaTeX" not in text


def test_one_run_is_one(tmp_path: Path) -> None:
    one = Truth(placements={"full": 0.1})
    study = write_study(tmp_path / "s", truth=one, ranks=(4,), seeds=(0,), examples=20, steps=2)
    said = report.content(analyse(load(study), draws=50), [], {})
    assert said["counts"] == "1 run (1 completed); 1 arm."
    assert said["answers"][0].startswith("icd10_chapter: full r4 has test NLL, 0.")
    # pruned after its base model was scored
    edit(next(study.iterdir()), lambda plain: plain.update(status="pruned"))
    said = report.content(analyse(load(study), draws=50), [], {})
    assert said["counts"] == "1 run (1 pruned); 0 arms; arm without a completed run: 1."
    assert said["answers"] == ["No run completed, so there is nothing to compare yet."]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_methods_are_told_apart_as_in_the_figures(tmp_path: Path) -> None:
    methods = ("lora", "dora", "pissa", "olora", "relora", "rslora", "lora_fa", "lora_plus", "bitfit", "full_ft")
    one = Truth(placements={"full": 0.1})
    study = write_study(tmp_path / "s", truth=one, ranks=(4,), seeds=(0,), methods=methods, examples=20, steps=2)
    found = analyse(load(study), draws=50)
    seen = browse(report.write(found, tmp_path / "paper"), tmp_path, 390)
    assert seen["errors"] == []
    kinds = [*sorted(methods[:-1]), "full fine-tuning"]
    assert seen["legend"] == kinds
    assert seen["left"] == ["full fine-tuning"]  # without those of the first placement
    assert len(set(seen["looks"])) == len(kinds)
    colours = {look.colour.replace("#000000", "currentColor") for look in (*looks(kinds[:-1]).values(), WHOLE)}
    assert {look.split("M")[0] for look in seen["looks"]} == colours
    assert seen["wide"] <= 390


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_text_from_records_stays_text(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0, 1), examples=20, steps=2, modules=False)
    for folder in study.iterdir():
        edit(folder, lambda plain: plain["spec"]["dataset"].update(name=EVIL))
    edit(next(study.iterdir()), lambda plain: plain.update(status="failed", error={"class": EVIL, "message": EVIL}))
    found = analyse(load(study), draws=50)
    found.study.name = EVIL
    seen = browse(report.write(found, tmp_path / "paper"), tmp_path, 1200)
    assert not seen["broken"]
    assert seen["errors"] == []
    assert EVIL in seen["title"]


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
