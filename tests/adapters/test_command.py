"""The commands of `adapters.py`, on a study that `train.py` trained."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sweeper.adapters import command
from sweeper.errors import DataError, SpecError
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of `experiment=smoke`, one of uneven rank, through the command line."""
    root = Path(__file__).parent.parent.parent
    out = tmp_path_factory.mktemp("outputs")
    grid = ["-m", "experiment=smoke", "placement=attn,full", "allocation=importance", f"output_root={out}"]
    how = ["sweep.calibrate=false", "trainer.device=cpu", "trainer.precision=float32"]
    done = subprocess.run(
        [sys.executable, "train.py", *grid, *how], cwd=root, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "smoke"


def test_a_trained_study_is_looked_at_combined_and_merged(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = rescore.find([study])
    assert all(len(set(run.ranks.values())) > 1 for run in runs)
    command.main(["spectra", str(study), "--device", "cpu", "--top", "4"])
    shown = capsys.readouterr().out
    for run in runs:
        assert (run.folder / "spectra.json").is_file()
        assert run.folder.name in shown
    assert "of 64" in shown  # 16 modules of the attention, 4 vectors each
    folders = [str(run.folder) for run in runs]
    command.main(["combine", *folders, "--out", str(tmp_path / "mix"), "--weights", "1", "-0.5"])
    assert f"add, 1 {runs[0].folder.name} + -0.5 {runs[1].folder.name}" in " ".join(capsys.readouterr().out.split())
    command.main(["merge", str(tmp_path / "mix"), "--out", str(tmp_path / "merged"), "--device", "cpu"])
    assert "tiny_llama with mix merged, float32; logits differ by up to" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_study_is_not_one_run(saved: Callable[..., Saved], tmp_path: Path) -> None:
    run = saved("a")
    with pytest.raises(DataError, match=r"study: give the folder of one adapter, such as .*a \(here: a\)"):
        command.main(["merge", str(run.folder.parent), "--out", str(tmp_path / "x")])
    with pytest.raises(SpecError, match=r"--method=sum: no such --method"):
        command.main(["combine", str(run.folder), "--out", str(tmp_path / "x"), "--method", "sum"])
    with pytest.raises(DataError, match="no completed run with an adapter"):
        command.main(["spectra", str(tmp_path / "nowhere")])
    with pytest.raises(SpecError, match=r"--device tpu: no such device here\. Choose from auto, cpu"):
        command.main(["spectra", str(run.folder), "--device", "tpu"])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--out .*merged: cannot be written \((File exists|Not a directory)\)"):
        command.main(["merge", str(run.folder), "--out", str(tmp_path / "file" / "merged")])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [(["merg", "x"], r"adapters.py: .*'merg' \(choose from"), (["merge"], "adapters.py merge: .*required: run, --out")],
)
def test_what_is_typed_wrong_is_said_in_one_line(arguments: list[str], line: str) -> None:
    with pytest.raises(SpecError, match=line):
        command.main(arguments)


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "python adapters.py" in shown
    assert all(name in shown for name in ("merge", "combine", "spectra", "route"))


def test_an_error_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "adapters.py", "spectra", str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: no completed run with an adapter in it; give outputs/STUDY")
    assert done.stderr.count("\n") == 1
