"""A study as one file: the same bytes twice, checked and analysed again elsewhere, and refused where it was changed."""

import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import bundle
from sweeper.record import RECORD
from sweeper.seal import sealed, unsealed
from tests.analysis.synthetic import write_study

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("outputs") / "mine", ranks=(4, 8), seeds=(0, 1), examples=40, steps=10)


@pytest.fixture(scope="module")
def packed(study: Path) -> Path:
    return bundle.create(study, study.parent / "mine.bundle.tar.xz")


def rewritten(packed: Path, target: Path, change: Callable[[Files], None]) -> Path:
    """A bundle with other files in it, packed as it was."""
    with tarfile.open(packed) as tar:
        files = {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}
    change(files)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    target.write_bytes(lzma.compress(buffer.getvalue()))
    return target


def test_the_same_study_gives_the_same_bytes(study: Path, packed: Path, tmp_path: Path) -> None:
    assert bundle.create(study, tmp_path / "again.tar.xz").read_bytes() == packed.read_bytes()


def test_elsewhere_it_is_checked_and_analysed_again(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    found = bundle.verify(packed, out)
    assert found.runs == 12
    assert found.different == {}
    assert found.exact > 10
    specs = [json.loads(line) for line in (out / "bundle/mine.bundle/configs.jsonl").read_text().splitlines()]
    assert {one["run_id"] for one in specs} == {path.parent.name for path in out.glob(f"study/mine/*/{RECORD}")}
    versions = json.loads((out / "bundle/mine.bundle/versions.json").read_text())
    assert versions["torch"] == {"2.13.0": 12}


def _lower(files: Files) -> None:
    name = "mine.bundle/analysis/tables/arms.csv"
    files[name] = files[name].replace(b"0", b"1", 1)


def _lower_and_say_so(files: Files) -> None:
    """An edited table whose digest was put right: the tables that are made again do not have it."""
    name = "mine.bundle/analysis/tables/arms.csv"
    lines = files[name].decode().splitlines()
    lines[1] = lines[1].replace(".", ".9", 1)
    files[name] = ("\n".join(lines) + "\n").encode()
    about = json.loads(unsealed(files["mine.bundle/manifest.json"].decode()))
    about["files"]["analysis/tables/arms.csv"]["sha256"] = bundle._digest(files[name])
    files["mine.bundle/manifest.json"] = sealed(about, indent=1).encode()


def _drop(files: Files) -> None:
    files.pop("mine.bundle/configs.jsonl")


def _add(files: Files) -> None:
    files["mine.bundle/extra.txt"] = b"x"


def _edit_manifest(files: Files) -> None:
    name = "mine.bundle/manifest.json"
    files[name] = files[name].replace(b'"runs": 12', b'"runs": 13')


def _no_manifest(files: Files) -> None:
    files.pop("mine.bundle/manifest.json")


def _outside(files: Files) -> None:
    files["mine.bundle/../../evil"] = b"x"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_lower, "arms.csv is not what was written"), (_drop, "configs.jsonl is missing"),
        (_add, "extra.txt is not in its manifest"), (_edit_manifest, "manifest.json: it was edited or damaged"),
        (_no_manifest, "not a bundle of this project"), (_outside, "no plain file"),
    ],
)  # fmt: skip
def test_a_tampered_bundle_is_one_line(
    change: Callable[[Files], None], told: str, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(packed, tmp_path / "tampered.tar.xz", change)
    assert bundle.main(["verify", str(path)]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_a_table_that_the_records_do_not_give_is_found(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(packed, tmp_path / "tampered.tar.xz", _lower_and_say_so)
    assert bundle.main(["verify", str(path)]) == 1
    assert "arms.csv differs when analysed again: row 2" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no archive", lzma.compress(b"no tar")])
def test_what_is_no_archive_is_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_bytes(content)
    assert bundle.main(["verify", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_records_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert bundle.main([str(tmp_path / "empty"), str(tmp_path / "out.tar.xz")]) == 2
    assert "no record in it" in capsys.readouterr().err
    assert not (tmp_path / "out.tar.xz").exists()
