"""A handful of faults in the suite, each once in the slow part; `make faults` injects hundreds."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import report
from tests.faults.faults import FAULTS, by_name
from tests.faults.harness import Fault, Harness, Injection, warm
from tests.faults.outcomes import Result, judge
from tests.faults.services import PROGRAMS, can_mount

QUICK = ("driver killed", "out of memory, backward")
NEEDS_MOUNT = ("disk full, a small file system", "read-only file system")


def _result(**changes: object) -> Result:
    usual = {
        "status": "completed", "steps": 2, "place": ("arm", 0, 0, "trial"), "nll": {"test": 1.0},
        "losses": ((1, 2.0), (2, 1.0)), "weights": "w", "whole": True,
    }  # fmt: skip
    return Result(**usual | changes)  # type: ignore[arg-type]


def test_the_page_has_the_figures() -> None:
    figures = json.loads(report.FIGURES.read_text())
    assert report.section(figures) in report.PAGE.read_text()
    bad = ("lost", "duplicated", "corrupted", "not_ended", "unsaid")
    assert {key: sum(one[key] for one in figures["faults"]) for key in bad} == dict.fromkeys(bad, 0)
    assert {one["fault"] for one in figures["faults"]} == {fault.name for fault in FAULTS}
    assert min(one["times"] for one in figures["faults"]) >= 5
    assert sum(one["times"] for one in figures["faults"]) >= 500
    assert sum(one["killed"] for one in figures["faults"]) >= 150


def test_what_is_lost_counted_twice_or_changed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"a": _result(), "b": _result(place=("arm", 0, 1, "trial"))}
    cases = {
        "lost": {"a": expected["a"]},
        "duplicated": {**expected, "c": _result(place=("arm", 1, 0, "trial"))},
        "corrupted": {**expected, "b": _result(place=("arm", 0, 1, "trial"), nll={"test": 1.0001})},
    }
    for name, found in cases.items():
        monkeypatch.setattr("tests.faults.outcomes.outcome", lambda study, found=found: found)
        verdict = judge(tmp_path, expected)
        assert [key for key in cases if getattr(verdict, key)] == [name]
    twice = {**expected, "b": _result(place=("arm", 0, 1, "trial"), losses=((1, 2.0), (1, 2.0), (2, 1.0)))}
    monkeypatch.setattr("tests.faults.outcomes.outcome", lambda study: twice)
    assert judge(tmp_path, expected).corrupted
    other = {**expected, "b": _result(place=("arm", 0, 1, "trial"), weights="v")}
    monkeypatch.setattr("tests.faults.outcomes.outcome", lambda study: other)
    assert not judge(tmp_path, expected).corrupted
    assert judge(tmp_path, expected, exact=True).corrupted


@pytest.fixture(scope="module")
def injections(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator["Injector"]:
    """Injects in a process of its own, which is warm and forks sweeps; this one has threads."""
    injector = Injector(tmp_path_factory.mktemp("faults"))
    yield injector
    injector.close()


class Injector:
    def __init__(self, root: Path) -> None:
        self.mine, theirs = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, root))
        self.process.start()

    def __call__(self, name: str) -> Injection:
        self.mine.send(name)
        found = self.mine.recv()
        assert isinstance(found, Injection), found
        return found

    def close(self) -> None:
        self.mine.send(None)
        self.process.join()


def _serve(pipe: "multiprocessing.connection.Connection", root: Path) -> None:
    os.chdir(report.ROOT)
    warm()
    harness = Harness(root, 0)
    number = 0
    while (name := pipe.recv()) is not None:
        try:
            pipe.send(harness.inject(by_name(name), number))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
        number += 1


def check(fault: Fault, found: Injection) -> None:
    assert (found.lost, found.duplicated, found.corrupted) == ([], [], []), found.log
    assert found.ended, found.log
    assert found.at_stake > 0
    assert not report.unsaid(fault, vars(found)), found.log


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", QUICK)
def test_a_fault_costs_nothing(name: str, injections: Injector) -> None:
    check(by_name(name), injections(name))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [fault.name for fault in FAULTS if fault.name not in QUICK])
def test_each_fault_costs_nothing(name: str, injections: Injector) -> None:
    if name in NEEDS_MOUNT and not can_mount():
        pytest.skip("this user may not mount file systems")
    if name == "PostgreSQL restarted" and not PROGRAMS:
        pytest.skip("PostgreSQL is not installed")
    try:
        found = injections(name)
    except AssertionError as error:
        if "did not strike" in str(error):  # every sweep was over before: there is nothing to check
            pytest.skip(str(error).splitlines()[0])
        raise
    check(by_name(name), found)
