"""The command line as a user meets it: real processes, their output and exit codes."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sweeper import cli


def train(root: Path, cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # no coverage of start-up, colours or a user's own settings
    env = {key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "COLUMNS")}
    return subprocess.run(
        [sys.executable, str(root / "train.py"), *arguments],
        cwd=cwd,
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_help_lists_groups_and_common_overrides(root: Path, tmp_path: Path) -> None:
    out = train(root, tmp_path, "--help")
    assert out.returncode == 0
    for word in ("placement: all,", "model: ", "tiny_llama", "dataset: ", "rank=8", "trainer.device", "sweep.dry_run"):
        assert word in out.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["rank=abc"], ["-m", "placement=attn,atn"]])
def test_start_up_imports_neither_torch_nor_transformers(arguments: list[str], root: Path, tmp_path: Path) -> None:
    code = f"import runpy, sys; sys.argv[0] = {str(root / 'train.py')!r}; sys.path.insert(0, {str(root)!r})\n"
    code += (
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('heavy:', {'torch', 'transformers', 'peft', 'pandas'} & sys.modules.keys())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert out.stdout.splitlines()[-1] == "heavy: set()", out.stderr


def test_cfg_job_shows_every_field(root: Path, tmp_path: Path) -> None:
    out = train(root, tmp_path, "--cfg", "job", "placement=ff", "rank=16")
    assert out.returncode == 0
    assert "rank: 16" in out.stdout
    assert "name: ff" in out.stdout
    assert "hydra" not in out.stdout


def test_info_plugins_names_ours(root: Path, tmp_path: Path) -> None:
    out = train(root, tmp_path, "--info", "plugins")
    assert "AblationSweeper" in out.stdout
    assert "PackedLauncher" in out.stdout


def test_shell_completion_knows_groups_and_options(root: Path, tmp_path: Path) -> None:
    line = "train.py placement=att"
    out = train(root, tmp_path, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert out.stdout.split()[:2] == ["placement=attn", "placement=attn_q"]
    assert "complete" in train(root, tmp_path, "-sc", "install=bash").stdout


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["placement=atn"], ["placement=atn: no such placement. Choose from all, attn, "]),
        (["model=tiny_lama", "rank=0"], ["model=tiny_lama: no such model", "rank must be at least 1, got 0"]),
        (["-m", "dataset=icd11,jsonl"], ["dataset=icd11: no such dataset", "dataset.path is required"]),
        (["rank=4,8"], ["rank=4,8: several values need -m: "]),
        (["optim.lr=interval(1e-4,1e-2)"], ["a range is tuned by a sweep, which needs -m: "]),
        (["rank=4,8", "rank=16", "-m"], ["rank is there twice: rank=4,8 and rank=16. Give one of them."]),
        (["lr=1e-3"], ["Did you mean optim.lr=1e-3?"]),
        (["schedule=cosin"], ["Did you mean optim.schedule=cosine?"]),
        (["optim.schedule=cosin"], ["Choose from constant, cosine, linear. Did you mean cosine?"]),
        (["dry_run=true"], ["Did you mean sweep.dry_run=true?"]),
        (["hydra.sweeper.dry_run=true", "-m", "rank=4,8"], ["Did you mean sweep.dry_run=true?"]),
        (["rank", "=", "8"], ["rank =: no spaces around the equals sign: 'rank=8'"]),
        (["rank=", "8"], ["rank= 8: no spaces around the equals sign: 'rank=8'"]),
        (["rank", "=8"], ["rank =8: no spaces around the equals sign: 'rank=8'"]),
        (["--rank", "8"], ["--rank: no such flag; fields have no dashes: 'rank=8'. Flags: "]),
        (["--dry-run", "rank=8"], ["--dry-run: no such flag; fields have no dashes: 'sweep.dry_run=true'."]),
        (["-m", "rank=4,8", "--cfg", "job"], ["error: --cfg job is of one run, without -m: "]),
        (["-m", "optim.lr=interval(1,2)", "hydra.sweeper.n_trial=3"], ["Did you mean n_trials?"]),
        (
            ["-m", "optim.lr=interval(1,2)", "hydra.sweeper.sampler_options.seed=1"],
            ["error: hydra.sweeper.sampler_options is given whole: 'hydra.sweeper.sampler_options={seed: ...}'"],
        ),
        (["-m", "optim.lr=interval(1,2)", "hydra.sweeper.n_trials=x"], ["could not be converted to Integer"]),
        (["-m", "rank=4,8", "hydra/launcher=ray", "hydra.launcher.worker=2"], ["Did you mean workers?"]),
        (["-m", "search=lrr", "rank=4,8"], ["search=lrr: no such search. Choose from lr."]),
        (["-m", "placement=attn,atn", "rank=-1,abc,4"], ["placement=atn", "at least 1, got -1", "got abc"]),
        (["rnk=8"], ["rnk: no such field. Choose from"]),
        (["+trainr.max_steps=8"], ["trainer. Did you mean trainer?"]),
        (["-m", "+trainr.max_steps=8", "rank=4,8"], ["trainer. Did you mean trainer?"]),
        (["+sweep.retry=3", "+optim.lrr=1"], ["Did you mean sweep.retries?", "Did you mean optim.lr?"]),
        (["hydra/launcher=nope"], ["hydra/launcher=nope: no such hydra/launcher"]),
        (["-m", "rank=4,8", "hydra/launcher=rq"], ["rq comes with pip install hydra-rq-launcher"]),
        (
            ["-m", "rank=4,8", "hydra/launcher=basic", "hydra.launcher.n_jobs=2"],
            ["error: hydra.launcher.n_jobs: hydra/launcher=basic has no fields"],
        ),
        (["-m", "hydra.sweeper.params=[a]"], ["hydra.sweeper.params must be a mapping, got ['a']: write"]),
        (
            ["-m", "search=lr", "hydra.sweeper.params.rank=3"],
            ["add them with a plus: '+hydra.sweeper.params.rank=...'"],
        ),
        (["search=lr", "rank=4,8", "hydra.sweeper.n_trial=3"], ["Did you mean n_trials?"]),
        (["search=lr", "rank=4,8", "placement=attn,atn"], ["placement=atn: no such placement"]),
        (["hydra.nope=1"], ["hydra.nope"]),
        (["hydra.mode=BOTH"], ["Error merging override hydra.mode=BOTH"]),
        (["hydra.sweepr.n_trials=3"], ["hydra.sweepr: no such hydra field. Choose from callbacks, "]),
        (["-m", "rank=4,8", "hydra.launcher.workers=2"], ["hydra.launcher.workers is a field of hydra/launcher=ray"]),
        (
            ["placement=[attn,ff]"],
            ["placement: a run has one option of this group. With -m, 'placement=a,b' runs each."],
        ),
        (["study=a", "-m", "placement=attn,atn", "-cd", "."], ["placement=atn: no such placement"]),
        (["-cd", "/nowhere"], ["/nowhere"]),
        (["--rank=8", "placement=ff"], ["error: --rank=8: no such flag; fields have no dashes: 'rank=8'."]),
        (["-multirun", "rank=4,8"], ["ignored explicit argument 'ultirun'. Flags: "]),
    ],
)
def test_mistakes_are_one_line_each_and_leave_nothing(
    arguments: list[str], lines: list[str], root: Path, tmp_path: Path
) -> None:
    out = train(root, tmp_path, *arguments)
    assert out.returncode == 2
    assert out.stdout == ""
    told = out.stderr.splitlines()
    assert len(told) == len(lines), out.stderr
    for line, wanted in zip(told, lines, strict=True):
        assert line.startswith("error: ")
        assert wanted in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["placement=attn,ff", "rank=4,8", "model=tiny_llama"], ["-m", "rank=4,8", "model=tiny_llama", "--cfg", "job"]],
)
def test_the_command_in_an_error_works_as_it_is_printed(arguments: list[str], root: Path, tmp_path: Path) -> None:
    told = train(root, tmp_path, *arguments, *([] if "--cfg" in arguments else ["sweep.dry_run=true"]))
    assert told.returncode == 2
    typed = told.stderr.splitlines()[0].partition("-m: ")[2]
    done = subprocess.run(shlex.split(typed), cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert ("rank: 4" if "--cfg" in arguments else "4 runs, 4 to train") in done.stdout


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device: make room"),
        (ValueError("I/O error: No space left on device"), "No space left on device: make room"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system: make it writable again"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line(error: Exception, mend: str, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        raise error

    assert cli.run(write) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{mend}; the same command goes on from what is saved")


def test_full_errors_on_request(root: Path, tmp_path: Path) -> None:
    out = train(root, tmp_path, "placement=atn", HYDRA_FULL_ERROR="1")
    assert out.returncode == 1
    assert "Traceback" in out.stderr


def test_the_main_grid_is_nine_runs(root: Path, tmp_path: Path) -> None:
    axes = ["placement=attn,ff,full", "rank=4,8,16"]
    common = ["model=tiny_llama", "trainer.precision=float32", "sweep.dry_run=true"]
    out = train(root, tmp_path, "-m", *axes, *common)
    assert out.returncode == 0, out.stderr
    assert "9 runs, 9 to train" in out.stdout
    overlay = train(root, tmp_path, "experiment=placement_grid", *common)
    assert overlay.stdout == out.stdout, overlay.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_trial_of_an_overlay_can_be_repeated_alone(root: Path, tmp_path: Path) -> None:
    """As the line of a failed one says: a search of nothing would be refused."""
    overlays = ["experiment=smoke", "search=lr", "evaluation.every_steps=2"]
    out = train(root, tmp_path, *overlays, "optim.lr=0.002", "seed=0", "hydra.mode=RUN", "sweep.dry_run=true")
    assert out.returncode == 0, out.stderr
    assert "1 run, 1 to train" in out.stdout


def test_a_sweep_trains_once_and_prints_its_table_again(root: Path, tmp_path: Path) -> None:
    command = ["-m", "experiment=smoke", "placement=attn,ff", "rank=4"]
    first = train(root, tmp_path, *command)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert shlex.join(shlex.split(first.stdout.splitlines()[-1])[-5:]) == "-m analysis outputs/smoke --out paper/"
    table = first.stdout[first.stdout.index("placement  ") :]
    records = sorted((tmp_path / "outputs/smoke").glob("*/record.json"))
    assert len(records) == 2
    assert all((path.parent / "adapter/adapter_model.safetensors").exists() for path in records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs"]
    assert "\x1b" not in first.stdout
    before = [path.stat().st_mtime_ns for path in records]
    again = train(root, tmp_path, *command)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("2 of 2 runs are done already; nothing to train\n")
    assert table in again.stdout
    assert [path.stat().st_mtime_ns for path in records] == before


@pytest.mark.parametrize(
    "given",
    [["hydra.sweeper.params="], ["hydra.sweeper.params=null"], ["+hydra.sweeper.params={rank: 4, alpha: null}"]],
)
def test_axes_of_overlays_may_be_empty_or_absent(given: list[str], root: Path, tmp_path: Path) -> None:
    out = train(root, tmp_path, "-m", "experiment=smoke", "rank=4", "sweep.dry_run=true", *given)
    assert out.returncode == 0, out.stderr
    assert "1 run, 1 to train" in out.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        ["hydra/launcher=basic"],
        ["hydra/launcher=basic", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
        ["hydra/sweeper=basic"],
    ],
)
def test_hydras_own_sweeper_and_launcher_work_too(parts: list[str], root: Path, tmp_path: Path) -> None:
    out = train(root, tmp_path, "-m", "experiment=smoke", "placement=attn,ff", "rank=4", *parts)
    assert out.returncode == 0, out.stderr
    assert len(list((tmp_path / "outputs/smoke").glob("*/record.json"))) == 2
    assert (tmp_path / "outputs/smoke/summary.csv").read_text().count("completed") == 2
    if len(parts) > 1:
        assert (tmp_path / "outputs/smoke/.hydra/experiment=smoke,placement=ff,rank=4,seed=0").is_dir()


def test_a_single_run_is_in_the_same_place_as_in_a_grid(root: Path, tmp_path: Path) -> None:
    one = train(root, tmp_path, "experiment=smoke", "placement=attn", "rank=4")
    assert one.returncode == 0, one.stderr
    grid = train(root, tmp_path, "-m", "experiment=smoke", "placement=attn", "rank=4,8")
    assert "1 of 2 runs are done already; training the other 1" in grid.stdout, grid.stderr
