"""No command ends in a traceback, however it is mistyped."""

import random
import runpy
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from analysis import __main__ as analysis_command
from sweeper import record
from sweeper.record import ADAPTER, Record
from tests import fuzzing

# commands run in this process, and one that is cut off may leave its streams closed
pytestmark = [pytest.mark.slow, pytest.mark.long]

SECONDS = 60
SHARES = {"train.py": 0.64, "evaluate.py": 0.12, "adapters.py": 0.12, "analysis": 0.12}


@pytest.fixture
def place(tmp_path: Path, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a study whose run has an empty adapter, an empty folder, and a table that is none."""
    record.write_record(tmp_path / "study" / "run", make_record())
    (tmp_path / "study" / "run" / ADAPTER).mkdir()
    (tmp_path / "study" / "run" / ADAPTER / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run(root: Path, script: str, words: list[str]) -> str | None:
    """The traceback that a command ends in; None where it ends as one should."""
    GlobalHydra.instance().clear()
    sys.argv = [str(root / script), *words]
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        if script == "analysis":
            analysis_command.main(words)
        else:
            runpy.run_path(str(root / script), run_name="__main__")
    except SystemExit:
        return None
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return None


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"no end after {SECONDS} s")


def tracebacks(
    root: Path, seed: int, count: int, capsys: pytest.CaptureFixture[str]
) -> dict[str, tuple[str, list[str]]]:
    """Last line of a traceback -> it and the first command that ended in it, of so many random commands."""
    rng = random.Random(seed)
    found: dict[str, tuple[str, list[str]]] = {}
    ran: Counter[str] = Counter()
    for number in range(count):
        script = rng.choices(list(SHARES), list(SHARES.values()))[0]
        words = fuzzing.COMMANDS[script](rng)
        trace = run(root, script, words)
        told = capsys.readouterr()
        if trace is None and "Traceback" in told.err:
            trace = told.err
        ran[script] += 1
        if trace is not None:
            last = trace.strip().splitlines()[-1]
            found.setdefault(last[:120], (trace, [str(number), script, *words]))
    assert sum(ran.values()) == count
    assert set(ran) == set(SHARES) or count < 30
    return found


def told(found: dict[str, tuple[str, list[str]]]) -> str:
    return "\n\n".join(f"{words}\n{trace[-2500:]}" for trace, words in found.values())


@pytest.fixture(autouse=True)
def same_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield
    GlobalHydra.instance().clear()


def test_some_commands_end_without_a_traceback(root: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tracebacks(root, 1, 40, capsys)
    assert not found, told(found)


@pytest.mark.timeout(3600)
def test_thousands_of_commands_end_without_a_traceback(
    root: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tracebacks(root, 2, 2400, capsys)
    assert not found, told(found)


def test_a_traceback_is_found(root: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str]) -> int:
        raise KeyError(words[0])

    monkeypatch.setattr(analysis_command, "main", broken)
    assert "KeyError: 'study'" in str(run(root, "analysis", ["study"]))
