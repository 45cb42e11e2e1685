"""A recorded run is trained once more: what it says before and after, and that nothing recorded is touched."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sweeper
from sweeper import repeat
from sweeper.errors import DataError, Problems, SpecError, SweeperError
from sweeper.record import METRICS, RECORD

SMALL = (
    "experiment=smoke", "trainer.precision=float32", "trainer.device=cpu", "optim.lr=3e-3", "sweep.calibrate=false",
    "evaluation.generate=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that shared a pack."""
    root = tmp_path_factory.mktemp("repeat")
    found = sweeper.sweep(*SMALL, "placement=attn,ff,full", "rank=4", output_root=root, study="first")
    return found.folder


@pytest.fixture
def chosen(study: Path) -> Path:
    return min(study.glob(f"*/{RECORD}")).parent


@pytest.fixture
def bytes_of(study: Path) -> Iterator[None]:
    """Fails where a test changes anything of the study."""
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    yield
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def words(study: Path, *more: str) -> list[str]:
    return [f"output_root={study.parent}", "trainer.device=cpu", *more]


@pytest.mark.usefixtures("bytes_of")
def test_alone_it_is_the_same_but_for_rounding_and_that_is_said_before(
    chosen: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repeat.main(["--from", str(chosen / RECORD), *words(study)])
    lines = capsys.readouterr().out.splitlines()
    assert "trained in a pack of 3" in next(line for line in lines if line.startswith(chosen.name))
    assert lines[-1].startswith(f"{chosen.name}: ")
    assert "repeated but for rounding" in lines[-1] or "bit-identical" in lines[-1]
    (again,) = (study.parent / "first_repeat").glob(f"*/{RECORD}")
    assert again.parent.name == chosen.name


@pytest.mark.usefixtures("bytes_of")
def test_with_its_pack_it_is_bit_identical(chosen: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repeat.main(["--from", str(chosen), "--pack", *words(study, "study=packed")])
    assert f"{chosen.name}: bit-identical: 4 losses" in capsys.readouterr().out
    assert len(list((study.parent / "packed").glob(f"*/{RECORD}"))) == 3


@pytest.mark.usefixtures("bytes_of")
def test_deterministic_runs_are_bit_identical_whatever_their_pack(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sweeper.sweep(
        *SMALL, "placement=attn,ff", "rank=4", "trainer.deterministic=true", output_root=tmp_path, study="fixed"
    )
    first = found.runs[0].folder
    repeat.main(["--from", str(first / RECORD), f"output_root={tmp_path}"])
    said = capsys.readouterr().out
    assert f"{first.name}: bit-identical" in said
    assert "trained in a pack of" not in said


def test_a_run_that_comes_out_otherwise_is_an_error(
    study: Path, chosen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "other" / chosen.name
    copy.mkdir(parents=True)
    for path in chosen.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(chosen)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(chosen)).write_bytes(path.read_bytes())
    plain = json.loads((copy / RECORD).read_text())
    plain.pop("seal")
    plain["environment"]["git_commit"] = "0123456789ab"
    plain["environment"]["versions"]["peft"] = "0.0.1"
    (copy / RECORD).write_text(json.dumps(plain))
    rows = [json.loads(line) for line in (copy / METRICS).read_text().splitlines()]
    rows[-1]["loss"] = 1.0
    (copy / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(repeat.NotRepeated, match=chosen.name) as caught:
        repeat.main(["--from", str(copy / RECORD), f"output_root={tmp_path}", "study=again"])
    assert caught.value.exit_code == 1
    said = capsys.readouterr().out
    assert "another commit: then 0123456789ab" in said
    assert "another versions: peft then 0.0.1" in said
    assert f"{chosen.name}: differs; largest relative differences: losses" in said


def damaged(folder: Path, change: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(change)
    return folder / RECORD


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 99}', '{"schema": 1}', '{"seal": "00",\n "schema": 1}', "\x00"]
)
def test_a_bad_record_is_one_line(text: str, tmp_path: Path) -> None:
    path = damaged(tmp_path / "s" / "abcdefabcdef", text)
    with pytest.raises(DataError, match=r"cannot be repeated") as caught:
        repeat.main(["--from", str(path), f"output_root={tmp_path}"])
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)


def test_bad_words_are_told_before_anything_trains(chosen: Path, study: Path, tmp_path: Path) -> None:
    before = sorted(study.parent.iterdir())
    record = str(chosen / RECORD)
    cases: list[tuple[list[str], type[SweeperError], str]] = [
        (["--from", record, "rank=8", *words(study)], Problems, "rank=8: a record says what is trained"),
        (["--from", record, "study=first", *words(study)], SpecError, "what is recorded stays"),
        (["--from", str(tmp_path / "no" / RECORD)], DataError, "no such record"),
        (["--from", str(chosen / METRICS)], SpecError, "give a run's record.json"),
        (["--from"], SpecError, "expected at least one argument"),
        (["--from", record, "--fast"], SpecError, "--fast: no such flag"),
    ]
    for given, kind, told in cases:
        with pytest.raises(kind, match=told):
            repeat.main(given)
    assert sorted(study.parent.iterdir()) == before
