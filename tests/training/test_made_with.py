"""What a run is made with stays what it was: its files, its precision; and what changes midway is said and recorded."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sweeper import device, identity, record
from sweeper.errors import SpecError
from sweeper.run import Run
from sweeper.spec import RunSpec
from sweeper.training import checkpoint
from sweeper.training.events import Event, Remark, RunFinished, RunResumed, Stage, Step
from sweeper.training.run_state import RunState
from sweeper.untrusted import sandbox


@pytest.fixture
def spec(make_run: Callable[..., RunSpec]) -> RunSpec:
    return make_run("ff", rank=2, trainer={"max_steps": 3, "precision": "auto"}, evaluation={"splits": ["validation"]})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this machine one that multiplies faster in a precision."""

    def choose(precision: str) -> None:
        monkeypatch.setattr(device, "cpu_gain", lambda: 9.0 if precision == "bfloat16" else 0.1)

    return choose


def ended(events: list[Event]) -> record.Record:
    (found,) = [event.record for event in events if isinstance(event, RunFinished)]
    return found


def said(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Stage | Remark)]


def steps(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, Step)]


def test_auto_is_in_a_study_what_it_was_in_its_first_run(
    spec: RunSpec, machine: Callable[[str], None], run_all: Any, tmp_path: Path
) -> None:
    machine("bfloat16")
    first = ended(run_all([spec]))
    assert first.environment["precision"] == "bfloat16"
    assert first.environment["attention"] == "sdpa"
    assert json.loads((tmp_path / "study" / device.PRECISION).read_text()) == {"auto": "bfloat16"}
    machine("float32")
    stopped = run_all([replace(spec, seed=1)], stop_after=1)
    assert "trainer.precision=auto is bfloat16 in this study, as in its first run" in said(stopped)
    assert not (tmp_path / "study" / "precision.json.lock").exists()
    (tmp_path / "study" / device.PRECISION).unlink()  # as in a study of an earlier version
    gone_on = run_all([replace(spec, seed=1)])
    assert steps(gone_on) == [2, 3]
    assert ended(gone_on).environment["precision"] == "bfloat16"
    assert ended(run_all([spec], "another")).environment["precision"] == "float32"


def test_a_study_of_checkpoints_goes_on_in_their_precision(
    spec: RunSpec, machine: Callable[[str], None], run_all: Any, tmp_path: Path
) -> None:
    machine("bfloat16")
    run_all([spec], stop_after=1)
    (tmp_path / "study" / device.PRECISION).unlink()
    assert device.study_precision(tmp_path / "study") == "bfloat16"


def test_the_first_of_several_drivers_fixes_the_precision(tmp_path: Path) -> None:
    assert device.study_precision(tmp_path) is None
    assert device.fix_precision(tmp_path, "float32") == "float32"
    assert device.fix_precision(tmp_path, "bfloat16") == "float32"
    assert [path.name for path in tmp_path.iterdir()] == [device.PRECISION]


def test_of_a_study_that_is_mixed_already_the_first_run_counts(
    tmp_path: Path, make_record: Callable[..., record.Record], make_spec: Callable[..., RunSpec]
) -> None:
    runs = [
        ("2026-01-02", "float32", "auto"),
        ("2026-01-03", "bfloat16", "auto"),
        ("2026-01-01", "bfloat16", "bfloat16"),
    ]
    for seed, (started, precision, typed) in enumerate(runs):
        one = make_spec(seed=seed, trainer={"precision": typed})
        made = make_record(one, started=started, environment={"precision": precision})
        record.write_record(tmp_path / one.run_id, made)
    assert device.study_precision(tmp_path) == "float32"


def test_a_gpu_without_the_precision_of_the_study_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device.fix_precision(tmp_path, "bfloat16")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: False)
    gpu: Any = SimpleNamespace(type="cuda")
    with pytest.raises(SpecError, match=r"auto: .* began in bfloat16, which this GPU lacks"):
        device.precision_for(gpu, "auto", study=tmp_path)


def test_a_run_goes_on_only_with_the_data_it_began_with(spec: RunSpec, run_all: Any, tmp_path: Path) -> None:
    """Under the id of an earlier version, which is the same whatever the file holds."""
    spec = replace(spec, trainer=replace(spec.trainer, precision="float32"))
    run_all([spec], stop_after=1)
    file = Path(str(spec.dataset.path))
    file.write_text(file.read_text().replace('"response": "0"', '"response": "2"'))
    again = run_all([spec])
    assert steps(again) == [1, 2, 3]
    (line,) = [line for line in said(again) if "checkpoint" in line]
    assert line.startswith(f"{spec.run_id}: its checkpoint is of another dataset (then sha256:")
    assert ended(again).environment["content"] == {"model": None, "dataset": identity.now(spec.dataset).text}
    fresh = run_all([spec], "fresh")
    assert ended(again).scores == ended(fresh).scores


def test_a_checkpoint_of_an_earlier_version_is_taken_up(spec: RunSpec, run_all: Any, tmp_path: Path) -> None:
    spec = replace(spec, trainer=replace(spec.trainer, precision="float32"))
    run_all([spec], stop_after=1)
    folder = tmp_path / "study" / spec.run_id
    found = checkpoint.load(folder)
    assert found is not None
    new = ("content", "precision", "auto", "environment", "resumed_from")
    assert set(new) < set(found[1])
    checkpoint.save(folder, found[0], {name: value for name, value in found[1].items() if name not in new})
    assert steps(run_all([spec])) == [2, 3]


def test_data_that_is_another_on_this_machine_fails_the_run(spec: RunSpec, run_all: Any) -> None:
    there = replace(spec, dataset=replace(spec.dataset, content=f"sha256:{'0' * 64}"))
    found = ended(run_all([there]))
    assert (found.status, (found.error or {})["class"]) == ("failed", "DataError")
    assert "is not what it was when the command began" in (found.error or {})["message"]


def test_a_run_that_goes_on_elsewhere_says_so(
    make_run: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python of the sandbox is that of the scores of programs, and no part of the run's identity."""
    spec = make_run("ff", dataset={"metrics": ["pass_at_1"], "max_new_tokens": 8}, evaluation={"generate": True})
    here = {"device_type": "cpu", "device": "this", "versions": {"torch": "2.13.0"}, "git_commit": "a"}

    def begin(kept: dict[str, Any]) -> RunState:
        run = Run(run_id="0123", spec=spec, folder=Path("0123"))
        nothing: Any = None
        return RunState(run=run, adapter=nothing, examples=(), order=nothing, done=1, tokens=1, kept=kept)

    monkeypatch.setattr(sandbox, "python", lambda: "CPython 3.11.7")
    first = begin({})
    assert first.made_with(here) is None
    assert first.environment["sandbox_python"] == "CPython 3.11.7"
    same = begin(first.measured())
    assert same.made_with(here | {"git_commit": "b"}) is None
    monkeypatch.setattr(sandbox, "python", lambda: "CPython 3.12.1")
    later = begin(same.measured())
    told = later.made_with(here | {"device": "that"})
    assert told == "0123: goes on with another device, sandbox python than it began with"
    last = begin(later.measured())
    assert last.made_with(here | {"device": "that"}) is None
    assert last.resumed == {"device": "this", "sandbox_python": "CPython 3.11.7"}


def test_a_run_that_resumes_says_from_which_step(spec: RunSpec, run_all: Any) -> None:
    first = run_all([spec], stop_after=1)
    assert not [event for event in first if isinstance(event, RunResumed)]
    again = run_all([spec])
    resumed = [event for event in again if isinstance(event, RunResumed)]
    assert resumed == [RunResumed(run_id=spec.run_id, step=1, steps=3)]


def test_a_step_tells_all_tokens_of_its_rows_and_those_of_answers(spec: RunSpec, run_all: Any, tmp_path: Path) -> None:
    """As the record counts them; what pads the rows to those of a run beside it is neither."""
    other = replace(spec, seed=1)
    events = run_all([spec, other])
    for run_id in (spec.run_id, other.run_id):
        told = [event for event in events if isinstance(event, Step) and event.run_id == run_id]
        found = record.read_record(tmp_path / "study" / run_id)
        assert sum(event.tokens for event in told) == found.efficiency.train_tokens
        assert all(0 < event.answer_tokens < event.tokens for event in told)
        rows = [json.loads(line) for line in (tmp_path / "study" / run_id / "metrics.jsonl").read_text().splitlines()]
        written = [(row["tokens"], row["total_tokens"]) for row in rows if "loss" in row]
        assert written == [(event.answer_tokens, event.tokens) for event in told]
