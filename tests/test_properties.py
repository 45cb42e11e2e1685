"""Properties over made-up overrides and records: what is valid comes back as it was, what is not is one line."""

import contextlib
import io
import json
import shutil
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.__main__ import main
from analysis.load import load
from sweeper import config, installation, record
from sweeper.errors import SweeperError
from sweeper.record import ADAPTER, RECORD, Efficiency, Module, Record, Score
from sweeper.rescoring import rescore
from sweeper.spec import RunSpec, run_spec, to_mapping
from tests import fuzzing
from tests.analysis.synthetic import write_study

SHARED = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=SHARED, derandomize=True, database=None)
LONG = settings(max_examples=1500, deadline=None, suppress_health_check=SHARED, derandomize=True, database=None)
BASE = ("experiment=smoke",)

# ---- overrides ----

finite = st.floats(min_value=1e-8, max_value=1.0, allow_subnormal=False)
words = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=12).filter(
    lambda word: word[0].isalpha() and word.lower() not in ("null", "true", "false", "nan", "inf")
)


@QUICK
@given(rank=st.integers(1, 512), seed=st.integers(0, 2**31 - 1), lr=finite, study=words)
def test_a_valid_value_comes_back(rank: int, seed: int, lr: float, study: str, composer: Any) -> None:
    found = config.expand([*BASE, f"rank={rank}", f"seed={seed}", f"optim.lr={lr!r}", f"study={study}"], composer)
    (spec,) = found.specs
    assert (spec.rank, spec.alpha, spec.seed, spec.optim.lr) == (rank, 2.0 * rank, seed, lr)
    assert found.settings.study == study
    assert run_spec(json.loads(json.dumps(to_mapping(spec)))) == spec


@pytest.mark.slow
@QUICK
@given(
    ranks=st.lists(st.integers(1, 64), min_size=2, max_size=4, unique=True),
    places=st.lists(st.sampled_from(["attn", "ff", "full", "attn_q"]), min_size=2, max_size=3, unique=True),
)
def test_an_axis_has_every_value_once(ranks: list[int], places: list[str], composer: Any) -> None:
    axes = [f"rank={','.join(map(str, ranks))}", f"placement={','.join(places)}"]
    found = config.expand([*BASE, *axes], composer)
    assert [(spec.rank, spec.placement.name) for spec in found.specs] == [(r, p) for r in ranks for p in places]
    assert {arm.overrides[-2:] for arm in found.arms} == {
        (f"rank={r}", f"placement={p}") for r in ranks for p in places
    }


def expanded(lines: list[str], composer: Any) -> None:
    """Expands a command, which may fail by errors of ours alone, each of them whole lines."""
    told: tuple[str, ...] = ()
    try:
        told = tuple(spec.run_id for spec in config.expand([*BASE, *lines], composer).specs)
    except SweeperError as error:
        told = error.lines
    assert told
    assert all(line.strip() for line in told)


noise = st.text(st.characters(codec="utf-8"), max_size=20)
lines = st.one_of(
    st.randoms(use_true_random=False).map(fuzzing.override),
    st.tuples(st.sampled_from((*fuzzing.FIELDS, *fuzzing.GROUPS)), noise).map("=".join),
    noise,
)


@pytest.mark.slow
@QUICK
@given(found=st.lists(lines, min_size=1, max_size=4))
def test_a_wrong_override_is_a_line(found: list[str], composer: Any) -> None:
    expanded(found, composer)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
@LONG
@given(found=st.lists(lines, min_size=1, max_size=6))
def test_many_wrong_overrides_are_lines(found: list[str], composer: Any) -> None:
    expanded(found, composer)


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        (["rank=range(1,1000000000)"], "rank=range(1,1000000000): more than 10,000 values"),
        (["method=range(0,1e9)"], "more than 10,000 values"),
        (["optim.lr=tag(tune,range(1,1000000))"], "more than 10,000 values"),
        (["rank=range(1,2000)", "seed=range(0,2000)"], "a grid of 3,998,000 runs: more than 100,000 are not made"),
    ],
)
def test_a_grid_without_end_is_a_line(axes: list[str], line: str, composer: Any) -> None:
    with pytest.raises(SweeperError) as caught:
        config.expand([*BASE, *axes], composer)
    assert line in "\n".join(caught.value.lines)


@pytest.mark.parametrize("value", ["0", "3.5", "true", "null", "abc"])
def test_what_is_no_list_is_named(value: str, composer: Any) -> None:
    with pytest.raises(SweeperError, match=r"^dataset\.metrics must be a list, got "):
        config.expand([*BASE, f"dataset.metrics={value}"], composer)


@pytest.mark.parametrize("field", ["trainer.max_steps", "rank", "seed", "dataset.train_examples"])
def test_a_number_that_no_count_has_is_named(field: str, composer: Any) -> None:
    with pytest.raises(SweeperError, match=rf"{field} must be a number that fits in 64 bits, got 9999"):
        config.expand([*BASE, f"{field}={'9' * 40}"], composer)


def test_what_a_stream_has_no_letters_for_is_printed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    with pytest.raises(UnicodeEncodeError):
        print("×", flush=True)
    installation.forgive_output()
    print("× \udcff", flush=True)
    assert raw.getvalue() == b"\\xd7 \\udcff\n"


# ---- records ----

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=10)
scores = st.builds(
    Score, nll=st.floats(0, 100), tokens=st.integers(0, 10**9), examples=st.integers(0, 10**6),
    metrics=st.dictionaries(names, st.floats(-1e9, 1e9), max_size=3),
)  # fmt: skip
modules = st.builds(
    Module, name=st.text(max_size=20), role=names, layer=st.none() | st.integers(0, 200), rank=st.integers(1, 999),
    parameters=st.integers(0, 10**12), score=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
records = st.builds(
    Record, run_id=st.text(max_size=20), study=st.text(max_size=20), spec=st.just({}),
    status=st.sampled_from(["completed", "pruned", "failed", "diverged"]),
    modules=st.lists(modules, max_size=3).map(tuple),
    steps=st.integers(0, 10**9), scores=st.dictionaries(names, st.dictionaries(names, scores, max_size=2), max_size=2),
    efficiency=st.builds(Efficiency, step_seconds_solo=st.lists(st.floats(0, 1), max_size=3).map(tuple)),
    error=st.none() | st.dictionaries(names, st.text(max_size=30), max_size=3),
)  # fmt: skip


@QUICK
@given(found=records)
def test_a_record_comes_back(found: Record, tmp_path: Path) -> None:
    record.write_record(tmp_path, found)
    assert record.read_record(tmp_path) == found
    assert record.status(tmp_path) == found.status


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [path] if path else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def put(node: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


@st.composite
def changes(draw: Any, original: dict[str, Any]) -> dict[str, Any]:
    """A record with some values replaced by others of any type."""
    made: dict[str, Any] = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        every = places(made)
        put(made, draw(st.sampled_from(every)), draw(plain))
    return made


def looked_at(folder: Path, made: dict[str, Any]) -> None:
    """Reads a changed record in every way that there is: each gives it, or one line."""
    (folder / RECORD).write_text(json.dumps(made))
    for act in (record.read_record, record.status, lambda path: rescore.find([path])):
        with contextlib.suppress(ValueError, SweeperError):
            act(folder)
    found = load(folder)
    assert len(found.runs) + len(found.problems) >= 1


@pytest.fixture
def original(tmp_path: Path, make_spec: Callable[..., RunSpec], make_record: Callable[..., Record]) -> dict[str, Any]:
    folder = tmp_path / "run"
    record.write_record(
        folder, replace(make_record(make_spec()), environment={"device": "cpu", "versions": {"a": "1"}})
    )
    (folder / ADAPTER).mkdir()
    (folder / ADAPTER / "adapter_model.safetensors").write_bytes(b"")
    read: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return read


@QUICK
@given(data=st.data())
def test_a_changed_record_is_a_line(data: Any, original: dict[str, Any], tmp_path: Path) -> None:
    looked_at(tmp_path / "run", data.draw(changes(original)))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
@LONG
@given(data=st.data())
def test_many_changed_records_are_lines(data: Any, original: dict[str, Any], tmp_path: Path) -> None:
    looked_at(tmp_path / "run", data.draw(changes(original)))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
@settings(parent=QUICK, max_examples=80)
@given(data=st.data())
def test_an_analysis_of_a_changed_study_ends_without_a_traceback(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("study")
    write_study(folder / "s", ranks=(4,), seeds=(0, 1), examples=6, steps=2)
    for path in sorted(folder.glob("s/*"))[: data.draw(st.integers(1, 3))]:
        made = data.draw(changes(json.loads((path / RECORD).read_text())))
        (path / RECORD).write_text(json.dumps(made))
    assert main([str(folder / "s"), "--out", str(folder / "out"), "--no-figures", "--draws", "5"]) in (0, 2)
    shutil.rmtree(folder)
