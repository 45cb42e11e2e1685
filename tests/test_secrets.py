"""No password and no token is in what a command leaves or prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sweeper import record
from sweeper.redaction import without_credentials, without_secrets

SECRETS = {
    "HF_TOKEN": "hf_QmFzZTY0U2VjcmV0VG9rZW4xMjM0",
    "HUGGING_FACE_HUB_TOKEN": "plain-hub-token-0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "OPENAI_API_KEY": "sk-proj-notarealkey000000000000",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "PGPASSWORD": "correct-horse-battery",
}
TYPED = "typed-storage-password"


def command(root: Path, cwd: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    names = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWEEPER_CACHE": str(cwd / "cache")}
    environment = os.environ | SECRETS | names | {"HOME": str(cwd / "home")}
    program = [str(root / script)] if script.endswith(".py") else ["-m", script]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def left(folder: Path, text: str) -> list[Path]:
    """The files that hold a secret in any form that a grep finds."""
    secrets = [text.encode(), text.encode().hex().encode()]
    return [path for path in folder.rglob("*") if path.is_file() and any(one in path.read_bytes() for one in secrets)]


@pytest.mark.parametrize(
    "tracking",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("wandb", "mlflow", "tensorboard", "trackio")],
)
def test_a_run_a_search_and_a_report_leave_no_secret(tracking: str, root: Path, tmp_path: Path) -> None:
    pytest.importorskip(tracking)
    storage = f"hydra.sweeper.storage='sqlite:///file:s.db?uri=true&password={TYPED}'"
    tiny = ["experiment=smoke", "trainer.device=cpu", "trainer.max_steps=1", f"tracking={tracking}", "study=tiny"]
    rates = "optim.lr=tag(log,interval(1e-4,1e-2))"
    done = command(root, tmp_path, "train.py", *tiny, f"+plugins_password={TYPED}")
    assert done.returncode == 2
    runs = [
        command(root, tmp_path, "train.py", "-m", *tiny, rates, "hydra.sweeper.n_trials=2", storage),
        command(root, tmp_path, "train.py", *tiny, "trainer.max_steps=2"),
        command(root, tmp_path, "analysis", "outputs/tiny", "--out", "paper", "--draws", "10", "--no-figures"),
    ]
    assert [run.returncode for run in runs] == [0, 0, 0], [run.stderr[-2000:] for run in runs]
    assert len(record.read_commands(tmp_path / "outputs/tiny")) == 2
    for secret in (*SECRETS.values(), TYPED):
        assert left(tmp_path, secret) == []
        assert not [run for run in (done, *runs) if secret in run.stdout + run.stderr]


def test_an_error_that_quotes_a_secret_is_recorded_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sweeper.training.failure import Failure

    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    try:
        raise OSError(f"401 for https://me:{TYPED}@hub/x with {SECRETS['HF_TOKEN']} and hf_{'A' * 30}")
    except OSError as error:
        failure = Failure.of(error)
    assert failure.message == "401 for https://me:***@hub/x with *** and hf_***"
    assert SECRETS["HF_TOKEN"] not in failure.trace
    record.write_json(tmp_path / "a.json", {"message": SECRETS["HF_TOKEN"], "n": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"message": "***", "n": 1}


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("hydra.sweeper.storage=postgresql://me:pass@host/db", "hydra.sweeper.storage=postgresql://me:***@host/db"),
        ("+tracking.api_key=0123456789abcdef", "+tracking.api_key=***"),
        ("+token=abcdefgh", "+token=***"),
        ("+a.db_password='se cret'", "+a.db_password=***"),
        ("model.location=hf_abcdefghijklmnopqrstuvwx", "model.location=hf_***"),
        ("python train.py -m rank=4,8 'optim.lr=tag(log,interval(1e-4,1e-2))'", None),
        ("dataset.options.stop=[eos_token] tokens=8192 max_tokens=16", None),
        ("dataset.path=https://hub/datasets/a.jsonl", None),
    ],
)
def test_a_command_is_kept_without_credentials(typed: str, kept: str | None, tmp_path: Path) -> None:
    assert without_credentials(typed, typed=True) == (typed if kept is None else kept)
    record.note_command(tmp_path, typed)
    assert record.read_commands(tmp_path)[0]["typed"] == (typed if kept is None else kept)


def test_what_is_short_or_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"A_TOKEN": "short", "TOKENIZERS_PARALLELISM": "false" * 3, "MY_TOKEN": "/a/path/to/a/file"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    text = f"short {'false' * 3} /a/path/to/a/file"
    assert without_secrets(text) == text
    monkeypatch.setenv("A_TOKEN", "long-enough-to-tell")
    assert without_secrets("a long-enough-to-tell b") == "a *** b"
