"""Parts of a user's own: options like the built-in ones, their source part of a run's id, and nothing else changed."""

import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sweeper
from sweeper import config, record, register
from sweeper.arms import single
from sweeper.errors import Problems, SpecError
from sweeper.identity import Identities, known
from sweeper.methods import METHODS
from sweeper.methods.method import Method
from sweeper.placement.placement import PLACEMENTS
from sweeper.record import Record
from sweeper.rescoring import rescore
from sweeper.spec import DatasetSpec, RunSpec, Settings, run_spec, to_mapping
from sweeper.tasks import FAMILIES, SPLITS, load
from tests.test_api import SMOKE, blocks, trains

__all__ = ["trains"]


@pytest.fixture(autouse=True)
def alone(registering: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it, and it works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mine(root: Path, tmp_path: Path) -> Path:
    """The file of docs/extending.md."""
    path = tmp_path / "mine.py"
    path.write_text(blocks(root / "docs/extending.md")[0])
    return path


OWN = ("dataset=backwards", "method=eager", "placement=ends")


def ids(study: sweeper.Study) -> list[str]:
    return [run.run_id for run in study.runs]


@pytest.mark.slow
def test_the_page_runs(root: Path, mine: Path, tmp_path: Path) -> None:
    page = root / "docs/extending.md"
    assert len(blocks(page)[0].splitlines()) <= 50
    (command,) = [line for line in page.read_text().splitlines() if line.startswith("    .venv/bin/python train.py")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "sweeper/plugins")])}
    words = [sys.executable, str(root / "train.py"), *shlex.split(command)[2:]]
    out = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert out.returncode == 0, out.stderr
    names: dict[str, Any] = {}
    exec(blocks(page)[1], names)  # finds all of it done
    study = names["study"]
    assert [(run.spec.method.name, run.spec.placement.name, run.status) for run in study.runs] == [
        ("lora", "attn", "completed"), ("lora", "ends", "completed"),
        ("eager", "attn", "completed"), ("eager", "ends", "completed"),
    ]  # fmt: skip
    found = study.runs[3].record
    assert {module.layer for module in found.modules} == {0, 3}
    assert {module.role for module in found.modules} == {"attn_q", "attn_v"}
    codes = [found.spec[group]["code"] for group in ("dataset", "method", "placement", "objective")]
    assert {(code["plugin"], code["content"][:7]) for code in codes} == {(str(mine), "sha256:")}
    assert [run.run_id for run in sweeper.load_study(study.folder).runs if run.spec.run_id != run.run_id] == []


def test_the_source_is_part_of_the_id_and_its_place_is_not(mine: Path, tmp_path: Path, trains: Any) -> None:
    (own,) = sweeper.sweep(*SMOKE, *OWN, plugins=["mine.py"]).runs
    assert own.run_id == Identities(Path("elsewhere"))(own.spec).run_id == run_spec(to_mapping(own.spec)).run_id
    del sys.modules["mine"]
    (tmp_path / "sub").mkdir()
    moved = mine.rename(tmp_path / "sub/mine.py")
    (again,) = sweeper.sweep(*SMOKE, *OWN, plugins=[str(moved)]).runs
    assert (again.run_id, again.arm, len(trains.trained)) == (own.run_id, own.arm, 1)
    moved.write_text(moved.read_text().replace("4.0", "5.0"))
    (edited,) = sweeper.sweep(*SMOKE, *OWN, plugins=[str(moved)]).runs
    assert edited.run_id != own.run_id
    assert edited.spec.method.options == {"ratio": 5.0}
    assert len(trains.trained) == 2


def test_built_in_parts_keep_their_ids(mine: Path, trains: Any) -> None:
    words = (*SMOKE, "sweep.dry_run=true", "placement=attn,ff")
    before = ids(sweeper.sweep(*words))
    assert ids(sweeper.sweep(*words, plugins=["mine.py"])) == before


def test_a_missing_registration_is_one_line(mine: Path, trains: Any, root: Path) -> None:
    study = sweeper.sweep(*SMOKE, *OWN, plugins=["mine.py"])
    plain = sweeper.load_study(study.folder).runs[0]
    register.FOUND.clear()
    from hydra.core.config_store import ConfigStore

    for group, name in (word.split("=") for word in OWN):
        ConfigStore.instance().repo[group].pop(f"{name}.yaml")
    with pytest.raises(Problems) as caught:
        sweeper.sweep(*SMOKE, "method=eager", "rank=4,8")
    first, second = caught.value.lines
    assert first.startswith("method=eager: no such method. Choose from adalora, ")
    assert second == f"method=eager is code of your own in outputs/smoke: give plugins=[{mine}]"
    lines = list(register.missing(plain.spec))
    assert lines[0] == f"dataset=backwards is code of your own that is not loaded: give plugins=[{mine}]"
    assert len(lines) == 3
    saved = rescore.Saved(folder=plain.folder, spec=plain.spec, ranks={})
    with pytest.raises(Problems, match="method=eager is code of your own that is not loaded"):
        rescore.check([saved], [DatasetSpec(name="chain_sum", family="chain_sum")], plain.spec.evaluation)


def test_another_source_than_a_runs_is_refused(mine: Path, trains: Any) -> None:
    (run,) = sweeper.sweep(*SMOKE, *OWN, plugins=["mine.py"]).runs
    assert list(register.missing(run.spec)) == []
    mine.write_text(mine.read_text() + "\n")
    register.load(["mine.py"])
    assert len(list(register.missing(run.spec))) == 3
    assert "method=eager: its source is not what it was for the run (then sha256:" in "".join(
        register.missing(run.spec, ["method"])
    )


def test_tables_of_a_study_do_without_its_code(
    mine: Path, trains: Any, make_spec: Callable[..., RunSpec], make_record: Callable[..., Record]
) -> None:
    study = sweeper.sweep(*SMOKE, *OWN, plugins=["mine.py"])
    METHODS.pop("eager")
    register.FOUND.clear()
    sweeper.sweep(*SMOKE, "method=lora")
    assert (study.folder / "summary.csv").read_text().count("completed") == 2


def test_other_processes_are_told_what_to_import(mine: Path, trains: Any) -> None:
    from sweeper.study import launch

    told: list[Settings] = []

    def workers(work: Any) -> Any:
        told.append(work.settings)
        return launch.Outcome(records={})

    config.load_plugins(["plugins=mine.py"])
    found = config.expand([*SMOKE, *OWN], config.composer_of())
    launch.carry_out(found.arms, found.settings, workers=workers)
    assert told[0].plugins == (str(mine),)
    exec(compile(mine.read_text(), str(mine), "exec"), {"__name__": "__main__"})  # as a script does
    with pytest.raises(SpecError, match="it was registered by a script or notebook; put it into a file"):
        launch.carry_out(found.arms, found.settings, workers=workers)


def test_a_worker_refuses_what_it_cannot_make(mine: Path, trains: Any) -> None:
    pytest.importorskip("ray")
    from sweeper.study.ray_workers import _Messenger
    from sweeper.training.source import Pulled

    (run,) = sweeper.sweep(*SMOKE, *OWN, plugins=["mine.py"]).runs
    messenger = _Messenger("worker 1", None)
    messenger._ask = lambda what, content: Pulled(runs=(run,))  # type: ignore[method-assign]
    assert messenger.pull(1, []).runs == (run,)
    register.FOUND.clear()
    with pytest.raises(Problems, match="is not loaded: give plugins="):
        messenger.pull(1, [])


def test_an_installed_package_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package_of_mine.py").write_text(
        "import sweeper\nsweeper.register.placement('q', roles=['attn_q'])\n"
    )
    about = tmp_path / "a_package-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: a_package\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[sweeper.plugins]\nmine = a_package_of_mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    register._of_packages.cache_clear()
    register.load()
    register._of_packages.cache_clear()
    assert register.FOUND["placement", "q"].code.plugin == "a_package_of_mine"


def test_a_notebooks_cell_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    import linecache

    def run_cell(name: str, text: str) -> str | None:
        monkeypatch.setitem(linecache.cache, name, (len(text), None, text.splitlines(True), name))
        exec(compile(text, name, "exec"), {"__name__": "__main__"})
        return register.FOUND["placement", "q"].code.content

    cell = "import sweeper\nsweeper.register.placement('q', roles=['attn_q'])\n"
    first = run_cell("<cell 1>", cell)
    assert run_cell("<cell 2>", cell) == first
    assert run_cell("<cell 3>", cell.replace("'attn_q'", "'attn_v'")) != first
    assert PLACEMENTS["q"] == ("attn_v",)
    with pytest.raises(SpecError, match="its source cannot be read: register it in a file or in a notebook cell"):
        exec(compile(cell, "<nowhere>", "exec"), {"__name__": "__main__"})


def test_whole_families_and_methods_may_be_given() -> None:
    from sweeper.methods import lora
    from sweeper.tasks import jsonl

    register.task("lines", jsonl, path="mine.jsonl")
    register.method("mine", Method(adapter=lora.adapter, options={"k": 1}, packs=lambda spec: True))
    register.objective("flat", object(), weight=2.0)
    assert register.FOUND["objective", "flat"].option == {"name": "flat", "weight": 2.0}
    assert FAMILIES["lines"].where is not None  # type: ignore[attr-defined]
    assert METHODS["mine"].options == {"k": 1}
    assert known(DatasetSpec(name="x", family="lines")).code is not None


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: register.method("lora", Method()), "method=lora is built in: give yours another name"),
        (lambda: register.placement("custom", roles=["attn_q"]), "placement=custom is built in"),
        (lambda: register.task("jsonl", lambda spec: {}), "dataset=jsonl is built in"),
        (lambda: register.task("t", lambda spec: {}, max_lenght=3), "Did you mean dataset.max_length?"),
        (lambda: register.placement("p", roles="attn_q"), "placement.roles must be a list, got attn_q"),
    ],
)
def test_mistakes_are_one_line(act: Callable[[], Any], line: str) -> None:
    with pytest.raises(SpecError) as caught:
        act()
    assert line in str(caught.value)


def test_a_function_that_returns_no_splits_is_named_before_a_model_is_loaded(trains: Any) -> None:
    register.task("broken", lambda spec: {"train": ()})
    with pytest.raises(SpecError, match="dataset=broken: its function must return the splits train, validation, test"):
        load(DatasetSpec(name="broken", family="broken"))


def test_a_pick_chooses_among_what_the_fields_choose(tiny_llama: Any) -> None:
    from sweeper.placement.placement import number_of_layers, resolve

    every = tiny_llama.targets
    register.placement("last", lambda modules: modules[-1:], layers="lower_half")
    option = register.FOUND["placement", "last"].option
    spec = replace(run_spec_of(option), name="last")
    (found,) = resolve(every, spec, layers=number_of_layers(every))
    assert (found.layer, found.role) == (1, "ff_down")
    register.placement("none", lambda modules: [])
    with pytest.raises(SpecError, match="placement=none: its function picks no module of this model"):
        resolve(every, replace(spec, name="none"), layers=number_of_layers(every))


def run_spec_of(option: Any) -> Any:
    from sweeper.spec import PlacementSpec, from_mapping

    return from_mapping(PlacementSpec, option)


@pytest.mark.parametrize(
    ("text", "line"),
    [("1 / 0\n", "cannot be imported (ZeroDivisionError: division by zero)"), ("def\n", "(SyntaxError: ")],
)
def test_a_plugin_that_fails_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "bad_plugin.py").write_text(text)
    with pytest.raises(SpecError) as caught:
        register.load(["bad_plugin.py"])
    assert line in str(caught.value)
    assert "bad_plugin" not in sys.modules


def test_a_module_in_the_folder_of_the_command_is_found(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    mine.rename(mine.with_name("a_module_of_mine.py"))
    register.load(["a_module_of_mine"])
    assert register.FOUND["method", "eager"].code.plugin == "a_module_of_mine"


def test_a_file_named_as_a_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("")
    with pytest.raises(SpecError, match="there is another module json: give the file another name"):
        register.load(["json.py"])


def test_tokens_of_another_source_are_others(mine: Path) -> None:
    register.load(["mine.py"])
    spec = known(DatasetSpec(name="backwards", family="backwards", options={"letters": 3}))
    before = FAMILIES["backwards"].version(spec)
    splits = load(spec)
    assert list(splits) == list(SPLITS)
    mine.write_text(mine.read_text() + "# edited\n")
    register.load(["mine.py"])
    assert FAMILIES["backwards"].version(spec) != before


def test_codes_survive_a_record(mine: Path, make_record: Callable[..., Record], tmp_path: Path, trains: Any) -> None:
    (run,) = sweeper.sweep(*SMOKE, *OWN, plugins=["mine.py"]).runs
    found = make_record(run.spec)
    record.write_record(tmp_path / "copy", found)
    again = run_spec(record.read_record(tmp_path / "copy").spec)
    assert (again, again.run_id, single(again).key) == (run.spec, run.run_id, run.arm)
