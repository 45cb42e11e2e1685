"""No command ends in a traceback, however it is mistyped."""

import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from analysis import __main__ as analysis_command
from sweeper import command, record
from sweeper.record import ADAPTER, Record
from tests import fuzzing
from tests.fuzzing import Figures

# commands run in this process, and one that is cut off may leave its streams closed
pytestmark = pytest.mark.slow

SECONDS = 60
PROCESS_SECONDS = 600
PROGRAM = "from sweeper.command import main; raise SystemExit(main())"  # of lora-atlas
PARTS = range(13)
EACH, PROCESSES = 170, 17  # commands of a part, in this process and as processes of their own
# what else a command may find when it starts
AROUND = ({}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "12"}, {"TERM": "dumb", "NO_COLOR": "1"}, {"LC_ALL": "C"})


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


def run(root: Path, script: str, words: list[str]) -> tuple[int, str | None]:
    """Runs a command in this process: its exit code, and the traceback that it ends in or None."""
    GlobalHydra.instance().clear()
    sys.argv = [script if script == "lora-atlas" else str(root / script), *words]
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process: the machine may have others
    try:
        if script == "analysis":
            return analysis_command.main(words), None
        if script == "lora-atlas":
            return command.main(), None
        runpy.run_path(str(root / script), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None), None
    except BaseException:
        return 1, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return 0, None


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"no end after {SECONDS} s")


def alone(root: Path, script: str, words: list[str], around: dict[str, str]) -> tuple[int, str]:
    """Runs a command as a process of its own: its exit code, and all that it prints."""
    program = {"analysis": ["-m", "analysis"], "lora-atlas": ["-c", PROGRAM]}.get(script, [str(root / script)])
    paths = os.pathsep.join((str(root), str(root / "sweeper" / "plugins")))
    done = subprocess.run(
        [sys.executable, *program, *words],
        env=os.environ | {"PYTHONPATH": paths} | around, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=PROCESS_SECONDS, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(errors="replace")


def wrong(code: int, said: str) -> str | None:
    """What is wrong with the end of a command: a traceback, a signal, or a refusal that says nothing."""
    if "Traceback" in said or code not in (0, 1, 2):
        return said
    return f"exit code {code} without a word" if code and not said.strip() else None


def tracebacks(
    root: Path, seed: int, count: int, figures: Figures, capsys: pytest.CaptureFixture[str]
) -> dict[str, tuple[str, list[str]]]:
    """Last line of a traceback -> it and the first command that ended in it, of so many random commands."""
    found: dict[str, tuple[str, list[str]]] = {}
    for script, words in fuzzing.commands(seed, count):
        code, trace = run(root, script, words)
        told = capsys.readouterr()
        trace = trace or wrong(code, told.err)
        figures.note((script, words), refused=code != 0, traceback=trace)
        if trace is not None:
            found.setdefault(last_line(trace), (trace, [script, *words]))
    return found


def last_line(trace: str) -> str:
    return trace.strip().splitlines()[-1][:120]


def told(found: dict[str, tuple[str, list[str]]]) -> str:
    return ascii("\n\n".join(f"{words}\n{trace[-2500:]}" for trace, words in found.values())).replace("\\n", "\n")


@pytest.fixture(autouse=True)
def same_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield
    GlobalHydra.instance().clear()


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", PARTS)
def test_thousands_of_commands_end_without_a_traceback(
    part: int, root: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = Figures("commands, in one process", f"commands-{part}")
    found = tracebacks(root, 100 + part, EACH, figures, capsys)
    figures.write()
    assert len(figures.seen) == EACH
    assert not found, told(found)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", PARTS)
def test_hundreds_of_processes_end_without_a_traceback(part: int, root: Path, place: Path) -> None:
    figures = Figures("commands, each a process", f"processes-{part}")
    found: dict[str, tuple[str, list[str]]] = {}
    typed = [one for one in fuzzing.commands(200 + part, 2 * PROCESSES) if "\0" not in "".join(one[1])][:PROCESSES]
    for number, (script, words) in enumerate(typed):
        around = AROUND[number % len(AROUND)]
        try:
            code, said = alone(root, script, words, around)
        except subprocess.TimeoutExpired:
            code, said = -1, f"no end after {PROCESS_SECONDS} s"
        trace = wrong(code, said)
        figures.note((script, words, around), refused=code != 0, traceback=trace)
        if trace is not None:
            found.setdefault(last_line(trace), (trace, [str(around), script, *words]))
    figures.write()
    assert len(figures.seen) == PROCESSES
    assert not found, told(found)


def test_some_commands_end_without_a_traceback(root: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tracebacks(root, 1, 40, Figures("", ""), capsys)
    assert not found, told(found)


def test_a_traceback_is_found(root: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str]) -> int:
        raise KeyError(words[0])

    monkeypatch.setattr(analysis_command, "main", broken)
    code, trace = run(root, "analysis", ["study"])
    assert code == 1
    assert "KeyError: 'study'" in str(trace)
    assert wrong(code, str(trace))
    assert wrong(2, "") == "exit code 2 without a word"
    assert wrong(-11, "error: x")
    assert wrong(2, "error: x") is None
