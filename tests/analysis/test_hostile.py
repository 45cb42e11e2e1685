"""Records, studies, archives and tables from somebody else: each is one clear line, and nothing leaves where it
belongs.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import analyse, archive, charts, exchange, figures, load
from analysis.__main__ import main, printable
from analysis.tables import latex, markdown, sheets
from analysis.venues import VENUES
from sweeper import record
from sweeper.record import COMMANDS, METRICS, PREDICTIONS, RECORD, SEARCHES
from tests.analysis.synthetic import write_study

FORMULA = '=cmd|"/c calc"!A0'
MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
TEX = "}\\input{/etc/passwd}\\write18{id}%$&_#^~"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\n"
HOSTILE = FORMULA + MARKUP + TEX + ESCAPES


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "outputs" / "grid", ranks=(4,), seeds=(0, 1), examples=20, steps=4)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    plain = json.loads((folder / RECORD).read_text())
    change(plain)
    (folder / RECORD).write_text(json.dumps(plain))


def runs(study: Path) -> list[Path]:
    return sorted(path.parent for path in study.glob(f"*/{RECORD}"))


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def hostile_texts(plain: dict[str, Any]) -> None:
    """Hostile text in every place of a record that holds text of anybody's choice."""
    for group in ("model", "dataset", "method", "placement"):
        plain["spec"][group]["name"] = f"{HOSTILE}{group}"
    plain["study"] = HOSTILE
    plain["environment"] = {"device": HOSTILE, "git_commit": HOSTILE, "versions": {"torch": HOSTILE}}
    plain["error"] = {"class": HOSTILE, "message": HOSTILE}
    for module in plain["modules"]:
        module["role"] = HOSTILE


def test_hostile_texts_are_texts_everywhere(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in runs(study)[:3]:
        edit(folder, hostile_texts)
    edit(runs(study)[3], lambda plain: plain.update(status="failed", error={"class": FORMULA, "message": ESCAPES}))
    before = everything(tmp_path)
    out = tmp_path / "paper"
    assert main([str(study), "--out", str(out), "--no-figures", "--export", "csv", "--export", "peft"]) == 0
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err
    assert all(out in path.parents for path in everything(tmp_path) - before)
    page = (out / "report.html").read_text()
    data = re.search(r'<script id="data".*?>(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert MARKUP in json.dumps(json.loads(data[1]))
    assert "<" not in data[1]
    assert page.count("<script") == 3  # the data, the library, our own
    assert "<img" not in page.replace(charts.library(), "")
    cells = [
        cell
        for path in out.rglob("*.csv")
        for row in csv.reader(io.StringIO(path.read_text(), newline=""))
        for cell in row
    ]
    assert any(cell.startswith("'=cmd") for cell in cells)
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+", "\t", "\r")) and not is_number(cell)]
    for path in out.rglob("*.md"):
        assert not re.search(r"<(script|img)", path.read_text())
    for path in out.rglob("*.tex"):
        assert r"\input{/etc" not in path.read_text()
        assert r"\write18" not in path.read_text()


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_tables_escape_what_they_show(study: Path) -> None:
    for folder in runs(study):
        edit(folder, lambda plain: plain["spec"]["dataset"].update(name=MARKUP + TEX))
    found = analyse(load(study), draws=20)
    shown = [(latex(sheet), markdown(sheet)) for sheet in sheets(found)]
    assert any("script" in one for one, _ in shown)
    for in_latex, in_markdown in shown:
        assert r"\input{" not in in_latex
        assert r"\write18" not in in_latex
        assert "<script" not in in_markdown


@pytest.mark.parametrize(
    ("value", "cell"),
    [("=1+1", "'=1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("+x", "'+x"), ("-x", "'-x"), ("\t=1", "'\t=1"), ("-1.5", "-1.5"),
     ("+1e-3", "+1e-3"), ("a=1", "a=1"), ("", ""), (-1.5, -1.5), (None, None), ("−1", "−1")],
)  # fmt: skip
def test_a_cell_is_no_formula(value: object, cell: object) -> None:
    assert record.csv_cell(value) == cell


def test_costs_that_are_all_zero_have_no_figure(study: Path) -> None:
    def without_costs(plain: dict[str, Any]) -> None:
        plain["efficiency"] = {key: 0 for key in plain["efficiency"] if key != "step_seconds_solo"}

    for folder in runs(study):
        edit(folder, without_costs)
    found = analyse(load(study), draws=20)
    drawn = [name for name in figures.makers(found) if name.startswith("pareto")]
    said = [figures.makers(found)[name](found, VENUES["icml"]) for name in drawn]
    assert "no run has train_flops above 0" in said


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    assert printable(ESCAPES + "é–×") == "?]0;owned??[2J??é–×"


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "a/b/c", "a/..", "..", ".hidden", "a}b", "a\\b", "a\nb", "a b", "x" * 99, ""]
)
def test_a_metric_or_split_is_no_path(name: str, study: Path, tmp_path: Path) -> None:
    first, second = runs(study)[:2]
    edit(first, lambda plain: plain["scores"]["test"]["after"]["metrics"].update({name: 0.5}))
    edit(second, lambda plain: plain["scores"].update({name: plain["scores"]["test"]}))
    found = load(study)
    assert [problem.kind for problem in found.problems] == ["broken record"] * 2
    assert all("is no name of a split or metric" in problem.message for problem in found.problems)
    assert set(found.runs["run_id"]) == {path.name for path in runs(study)[2:]}


def test_a_run_id_is_no_path(study: Path, tmp_path: Path) -> None:
    edit(runs(study)[0], lambda plain: plain.update(run_id="../../../evil"))
    edit(runs(study)[1], lambda plain: plain["spec"]["method"].update(name="/tmp/evil\0"))
    before = everything(tmp_path)
    out = tmp_path / "a" / "paper"
    assert main([str(study), "--out", str(out), "--no-figures", "--export", "peft"]) in (0, 2)
    assert all(out in path.parents for path in everything(tmp_path) - before)


def deep(levels: int) -> str:
    return '{"schema": 1, "a": ' + "[" * levels + "]" * levels + "}"


BOMBS = {
    "deeply nested": (deep(200_000), "too deeply nested"),
    "a number without end": ('{"schema": 1, "steps": ' + "9" * 10_000 + "}", "Exceeds the limit"),
    "not UTF-8": ("\udcff", "utf-8"),
    "a list": ("[1]", "not a mapping"),
    "empty": ("", "not a JSON object"),
    "of other types": ('{"schema": 1, "run_id": 3, "status": [], "spec": 3}', "broken record"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_record_that_is_a_bomb_is_a_line(name: str, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, line = BOMBS[name]
    (runs(study)[0] / RECORD).write_text(text, errors="surrogateescape")
    found = load(study)
    assert len(found.problems) == 1
    assert line in f"{found.problems[0].kind}: {found.problems[0].message}"
    with pytest.raises(ValueError, match="record"):
        record.read_record(runs(study)[0])
    assert record.status(runs(study)[0]) is None
    assert "\n" not in found.problems[0].message


def test_files_that_are_too_large_or_none_are_not_read(study: Path) -> None:
    first, second, third, *others = runs(study)
    total = 3 + len(others)
    with (first / RECORD).open("r+b") as file:
        file.truncate(record.LARGEST_JSON + 1)  # a hole: it takes no room
    (second / RECORD).unlink()
    os.mkfifo(second / RECORD)
    (third / PREDICTIONS).unlink()
    (third / PREDICTIONS).symlink_to("/dev/zero")
    found = load(study)
    assert {problem.message for problem in found.problems} >= {
        "ValueError: record.json has 67,108,865 bytes, more than the 67,108,864 that are read",
        "ValueError: record.json is no plain file",
    }
    assert len(found.runs) == total - 2
    assert found.examples([third.name]).empty
    assert found.problems[-1].message == "predictions.jsonl: predictions.jsonl is no plain file"


@pytest.mark.parametrize("text", ["[1]", "3\n", '{"a"', "[" * 100_000, '"split": "test", "moment": "after"'])
def test_lines_that_are_none_are_named(text: str, study: Path) -> None:
    first = runs(study)[0]
    for name in (PREDICTIONS, METRICS):
        (first / name).write_text(text)
    found = load(study)
    assert found.examples([first.name]).empty
    assert found.curves([first.name]).empty
    assert {problem.kind for problem in found.problems} <= {"broken lines"}
    (study / COMMANDS).write_text(text)
    assert record.read_commands(study) == []


# ---- archives ----


def packed(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, b"" if fields else b"{}"


ARCHIVES = {
    "a path upwards": [member("study/../../evil")],
    "an absolute path": [member("/tmp/evil-archive")],
    "a link": [member("study/link", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "a hard link": [member("study/link", type=tarfile.LNKTYPE, linkname="../../etc/passwd")],
    "a device": [member("study/device", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "a pipe": [member("study/pipe", type=tarfile.FIFOTYPE)],
    "two studies": [member("one/a"), member("two/a")],
    "a file alone": [member("record.json")],
    "nothing": [],
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_no_study_is_refused_whole(name: str, tmp_path: Path) -> None:
    made = packed(tmp_path / "study.tar.xz", *ARCHIVES[name])
    target = tmp_path / "deep" / "target"
    with pytest.raises(ValueError, match=r"study\.tar\.xz: no archive of a study: "):
        archive.extract(made, target)
    assert everything(tmp_path) == {made}


def test_an_archive_that_is_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    info = tarfile.TarInfo("study/run/record.json")
    info.size = archive.MOST_BYTES + 1
    bomb = tmp_path / "bomb.tar.xz"
    bomb.write_bytes(lzma.compress(info.tobuf() + bytes(1 << 20)))
    with pytest.raises(ValueError, match="more than 4,294,967,296 bytes"):
        archive.extract(bomb, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("pack", [lzma.compress, gzip.compress, bz2.compress])
def test_a_name_that_is_a_bomb_takes_no_memory(
    kind: bytes, pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tarfile.TarInfo("study/x")
    info.type, info.size = kind, 1 << 33
    monkeypatch.setattr(archive, "LARGEST_NAME", 1 << 16)
    (tmp_path / "a.tar").write_bytes(pack(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)))
    with pytest.raises(ValueError, match="a name or header of more than 65,536 bytes"):
        archive.extract(tmp_path / "a.tar", tmp_path / "out")


def test_a_negative_size_does_not_make_room_for_more(tmp_path: Path) -> None:
    info = tarfile.TarInfo("study/a")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12  # -1, as GNU writes it
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(4096))
    with pytest.raises(ValueError, match="no archive of a study"):
        archive.extract(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_every_compression_of_a_study_is_read(pack: Callable[[bytes], bytes], study: Path, tmp_path: Path) -> None:
    made = archive.create(study, tmp_path / "study.tar.xz")
    (tmp_path / "again.tar").write_bytes(pack(lzma.decompress(made.read_bytes())))
    found = load(archive.extract(tmp_path / "again.tar", tmp_path / "out"))
    assert len(found.runs) == len(runs(study))


@pytest.mark.parametrize("text", ["[1]", "3", '{"a": 1', "[" * 100_000, '{"a": ' + "9" * 10_000 + "}", "\udcff"])
@pytest.mark.parametrize("name", [PREDICTIONS, METRICS, RECORD])
def test_a_study_that_cannot_be_packed_is_a_line(
    name: str, text: str, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs(study)[0] / name).write_text(text, errors="surrogateescape")
    code = archive.main([str(study), str(tmp_path / "a.tar.xz")])
    told = capsys.readouterr()
    assert code in (0, 2)
    assert told.err.count("\n") == (code == 2)
    assert (tmp_path / "a.tar.xz").exists() == (code == 0)


@pytest.mark.parametrize(
    "text", ["[1]", "{", "[" * 100_000, '{"a": 3}', '{"a": {"widened": "x"}}', '{"a": {"widened": []}}', "\udcff", ""]
)
def test_what_a_search_wrote_is_a_line_where_it_cannot_be_read(text: str, study: Path) -> None:
    (study / SEARCHES).write_text(text, errors="surrogateescape")
    found = analyse(load(study), draws=20)
    assert [one.kind for one in found.study.problems] == ["broken searches"]


@pytest.mark.parametrize("content", [b"", b"no archive", lzma.compress(b"x" * 4096)[:60]])
def test_a_damaged_archive_is_a_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar.xz").write_bytes(content)
    with pytest.raises(ValueError, match="no archive of a study"):
        archive.extract(tmp_path / "a.tar.xz", tmp_path / "out")


def test_many_files_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_FILES", 3)
    made = packed(tmp_path / "a.tar.xz", *(member(f"study/{n}") for n in range(4)))
    with pytest.raises(ValueError, match="or 3 files"):
        archive.extract(made, tmp_path / "out")


# ---- what is imported ----


@pytest.mark.parametrize(
    "plain",
    [
        {"rows": [{"nll": "x"}]}, {"rows": [{"nll": 1, "metrics": {"../evil": 1}}]},
        {"rows": [{"nll": 1, "metrics": 3}]},
        {"rows": [{}], "model": 3}, {"rows": [{}], "base": 3}, {"rows": [{"nll": []}]},
    ],
)  # fmt: skip
def test_a_published_table_that_is_none_is_a_line(
    plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.json").write_text(json.dumps(plain))
    assert main(["--import", str(tmp_path / "table.json"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("plain", [{"run_info": 3, "train_info": 3}, {"run_info": {}, "train_info": {"metrics": [3]}}])
def test_results_of_peft_that_are_none_are_a_line(plain: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"one\.json: no result of PEFT's"):
        exchange.read(str(tmp_path))


def test_a_study_is_not_followed_in_circles(study: Path, tmp_path: Path) -> None:
    (study / "again").symlink_to(study)
    shutil.copytree(runs(study)[0], study / "copy", symlinks=True)
    assert len(load(study).runs) == len(runs(study)) - 1
