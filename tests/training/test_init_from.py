"""Runs that begin with the adapter that another run left."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from analysis import load as load_study
from sweeper.arms import Dimension, grouped, single
from sweeper.errors import Problems, RunsFailed, SpecError
from sweeper.identity import Identities
from sweeper.lora.forms import peft
from sweeper.placement import placement
from sweeper.record import Record, read_record
from sweeper.run import Run
from sweeper.spec import OptimSpec, RunSpec, Settings, TrainerSpec, run_spec, to_mapping
from sweeper.study import launch, plan
from sweeper.study.search_settings import SearchSettings
from sweeper.tasks import encode
from sweeper.training import train_runs
from sweeper.training.batches import DataOrder
from sweeper.training.run_state import RunState

from .plain import Plain

MakeSpec = Callable[..., RunSpec]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    return Settings(study="study", output_root=str(tmp_path), device="cpu", calibrate=False)


def after(spec: RunSpec, former: RunSpec | Path | str) -> RunSpec:
    """The run from another one's adapter."""
    given = former.run_id if isinstance(former, RunSpec) else str(former)
    return dataclasses.replace(spec, trainer=dataclasses.replace(spec.trainer, init_from=given))


def recorded(settings: Settings, spec: RunSpec) -> Record:
    return read_record(settings.folder / spec.run_id)


def adapter(settings: Settings, spec: RunSpec) -> dict[str, Tensor]:
    return load_file(settings.folder / spec.run_id / "adapter" / "adapter_model.safetensors")


def go(specs: list[RunSpec], settings: Settings, **more: Any) -> list[RunSpec]:
    """Trains runs as a command does; returns their specs as they were planned."""
    launch.carry_out(grouped(specs), settings, **more)
    return [run.spec for run in plan.make(grouped(specs), settings).runs]


def planned(spec: RunSpec, settings: Settings) -> RunSpec:
    """As a command plans it."""
    return Identities(settings.folder)(spec)


def test_a_run_of_no_steps_leaves_what_it_began_with_and_scores_as_that(make_run: MakeSpec, settings: Settings) -> None:
    first = planned(make_run(trainer={"max_steps": 6}), settings)
    still = after(make_run(trainer={"max_steps": 0, "ema_decay": 0.9}, seed=7), first)
    _, still = go([first, still], settings)
    for name, value in adapter(settings, first).items():
        assert torch.equal(adapter(settings, still)[name], value)
    left, found = recorded(settings, first), recorded(settings, still)
    for split in ("validation", "test"):
        assert found.scores[split]["after"].nll == pytest.approx(left.scores[split]["after"].nll, rel=1e-6)
        assert found.scores[split]["before"].nll == left.scores[split]["before"].nll  # the base's, as ever
        assert found.init_from["nll"][split] == pytest.approx(left.scores[split]["after"].nll, rel=1e-6)
    assert found.init_from["run_id"] == first.run_id
    assert found.init_from["digest"].startswith("sha256:")
    assert found.environment["content"]["init_from"] == found.init_from["digest"]
    assert left.init_from == {}
    row = load_study(settings.folder).runs.set_index("run_id").loc[still.run_id]
    assert row["init_from.run_id"] == first.run_id
    assert row["init_from.test.nll"] == found.init_from["nll"]["test"]


def test_training_on_equals_plain_pytorch(make_run: MakeSpec, settings: Settings, load: Any) -> None:
    first = planned(make_run("full", trainer={"max_steps": 20}), settings)
    second = after(make_run("full", trainer={"max_steps": 20}, seed=1, optim={"lr": 3e-3}), first)
    beside = make_run("full", trainer={"max_steps": 30}, seed=2)
    first, second, _ = go([first, second, beside], settings)
    base = load("llama")
    examples = encode(first.dataset, base.tokenizer, model_key="", cache=None)["train"].examples
    targets = placement.resolve(base.targets, first.placement, layers=placement.number_of_layers(base.targets))
    values: dict[str, tuple[Tensor, Tensor]] = {}
    for spec in (first, second):
        from sweeper import methods
        from sweeper.lora.forms.begin import uniform

        made = methods.adapter(spec, dict.fromkeys(targets, spec.rank))
        order = DataOrder([len(e.input_ids) for e in examples], spec.trainer.batch_size, spec.seed)
        job = RunState(
            run=Run.of(spec, settings.folder), adapter=made, examples=examples, order=order,
            ranks=dict.fromkeys(targets, spec.rank),
        )  # fmt: skip
        if not values:
            for target in targets:
                a, b = torch.zeros(spec.rank, target.in_features), torch.zeros(spec.rank, target.out_features)
                uniform(target, a, b, spec.seed)
                values[target.name] = a, b
        plain = Plain(base, job, values)
        for step in range(20):
            plain.step(step, 20, [examples[i] for i in order.batch(step)])
        config = json.loads((settings.folder / spec.run_id / "adapter" / "adapter_config.json").read_text())
        saved = peft.loaded(config, adapter(settings, spec))
        assert saved is not None
        for target in targets:
            for mine, own in zip(saved.parts(target), plain.pairs[target.name], strict=True):
                torch.testing.assert_close(mine, own.data, rtol=0, atol=1e-4)
        values = {name: (a.data, b.data) for name, (a, b) in plain.pairs.items()}


def test_a_run_waits_for_the_one_it_begins_from_and_no_slot_for_either(make_run: MakeSpec, settings: Settings) -> None:
    """Whatever the order of the grid; runs that wait for nothing share the packs meanwhile."""
    first = planned(make_run(trainer={"max_steps": 4}), settings)
    second = planned(after(make_run(trainer={"max_steps": 3}, optim={"lr": 3e-3}), first), settings)
    third = planned(after(make_run(trainer={"max_steps": 2}, optim={"lr": 1e-3}), second), settings)
    long = make_run("ff", trainer={"max_steps": 16})
    seen: list[tuple[str, str]] = []

    def listening(source: Any, chosen: Settings, *, should_stop: Any) -> None:
        report = source.report

        def told(event: Any) -> None:
            kind = type(event).__name__
            if kind in ("RunStarted", "RunFinished"):
                seen.append((kind, event.run_id if kind == "RunStarted" else event.record.run_id))
            report(event)

        source.report = told
        train_runs(source, chosen, should_stop=should_stop)

    go([third, second, long, first], settings, engine=listening)
    ids = {first.run_id: "A", second.run_id: "B", third.run_id: "C"}
    order = [(kind, ids.get(run_id, "long")) for kind, run_id in seen]
    places = [order.index((kind, name)) for name in "ABC" for kind in ("RunStarted", "RunFinished")]
    assert places == sorted(places)
    assert order[-1] == ("RunFinished", "long")  # all three went through the slot beside it
    for former, spec in ((first, second), (second, third)):
        assert recorded(settings, spec).init_from["run_id"] == former.run_id
    again = plan.make(grouped([third, second, long, first]), settings)
    assert again.todo == ()  # the same command finds all of them


@pytest.mark.parametrize("other", [{"batch_size": 1}, {"precision": "auto"}, {"batch_size": 8}])
def test_runs_that_cannot_share_a_pack_or_a_model_wait_too(
    other: dict[str, Any], make_run: MakeSpec, settings: Settings
) -> None:
    first = planned(make_run(trainer={"max_steps": 3}), settings)
    second = after(make_run(trainer={"max_steps": 2} | other), first)
    _, second = go([first, second], settings)
    assert recorded(settings, second).status == "completed"


def test_where_one_fails_those_that_begin_from_it_fail_with_a_line_that_names_it(
    make_run: MakeSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = planned(make_run(trainer={"max_steps": 3}), settings)
    second = planned(after(make_run(optim={"lr": 3e-3}), first), settings)
    third = planned(after(make_run(optim={"lr": 1e-3}), second), settings)
    beside = planned(make_run("ff"), settings)
    plain = RunState.note_step

    def broken(self: RunState, *args: Any) -> Any:
        if self.run_id == first.run_id and self.run.folder.parent == settings.folder:
            raise ValueError("it broke")
        return plain(self, *args)

    monkeypatch.setattr(RunState, "note_step", broken)
    with pytest.raises(RunsFailed) as caught:
        launch.train(grouped([first, second, third, beside]), settings)
    said = "\n".join(caught.value.lines)
    assert f"{second.run_id}: SpecError: the run that it begins from, {first.run_id}, failed" in said
    assert f"{third.run_id}: SpecError: the run that it begins from, {second.run_id}, failed" in said
    assert recorded(settings, beside).status == "completed"
    monkeypatch.setattr(RunState, "note_step", plain)
    found = launch.train(grouped([first, second, third, beside]), settings)
    assert {one.status for one in found.values()} == {"completed"}


def test_a_run_of_another_study_is_known_by_its_content_wherever_it_lies(
    make_run: MakeSpec, settings: Settings, tmp_path: Path
) -> None:
    elsewhere = dataclasses.replace(settings, study="elsewhere")
    (first,) = go([make_run(trainer={"max_steps": 3})], elsewhere)
    place = elsewhere.folder / first.run_id
    second = after(make_run(trainer={"max_steps": 2}), place)
    (found,) = go([second], settings)
    assert found.trainer.content is not None
    assert recorded(settings, found).init_from["run_id"] == first.run_id
    shutil.copytree(place, tmp_path / "copy")
    moved = planned(after(second, tmp_path / "copy"), settings)
    assert moved.run_id == found.run_id
    weights = tmp_path / "copy" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\\0\\0\\0\\1")
    assert planned(moved, settings).run_id != found.run_id
    assert run_spec(to_mapping(found)) == found


def test_an_id_and_its_folder_in_the_study_are_the_same_and_the_default_is_in_no_id(
    make_run: MakeSpec, settings: Settings
) -> None:
    (first,) = go([make_run(trainer={"max_steps": 2})], settings)
    by_id, by_folder = (
        planned(after(make_run(), given), settings) for given in (first, settings.folder / first.run_id)
    )
    assert by_id.run_id == by_folder.run_id != first.run_id
    assert by_id.trainer.content is None
    assert not {"init_from", "content"} & set(to_mapping(first)["trainer"])


def test_a_predecessor_that_was_trained_anew_is_named(make_run: MakeSpec, settings: Settings) -> None:
    first = planned(make_run(trainer={"max_steps": 2}), settings)
    second = planned(after(make_run(trainer={"max_steps": 2}, seed=1), first), settings)
    go([first, second], settings)
    assert plan.make(grouped([first, second]), settings).notes == ()
    name = Path("adapter") / "adapter_model.safetensors"
    shutil.copy(settings.folder / second.run_id / name, settings.folder / first.run_id / name)
    (said,) = plan.make(grouped([first, second]), settings).notes
    assert said.startswith(f"{second.run_id} began from {first.run_id} before that was trained anew")


def test_a_run_that_was_cut_off_goes_on_from_its_own_checkpoint(
    make_run: MakeSpec, settings: Settings, run_all: Any
) -> None:
    (first,) = go([make_run(trainer={"max_steps": 3})], settings)
    second = planned(after(make_run(trainer={"max_steps": 6}, seed=1), first), settings)
    run_all([second], "study", stop_after=3)
    assert not (settings.folder / second.run_id / "record.json").exists()
    run_all([second], "study")
    cut = adapter(settings, second), recorded(settings, second).init_from
    shutil.rmtree(settings.folder / second.run_id)
    run_all([second], "study")
    whole = adapter(settings, second), recorded(settings, second).init_from
    assert all(torch.equal(cut[0][name], value) for name, value in whole[0].items())
    assert cut[1] == whole[1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rank": 8, "alpha": 16.0}, "has rank 4 there and 8 here"),
        ({"alpha": 1.0}, "another scale, 2 there, 0.25 here"),
        ({"name": "ff"}, "other modules: "),
        ({"name": "full"}, " and others of this run alone"),
        ({"method": {"name": "dora"}}, "method=dora cannot go on from an adapter; lora, rslora, lora_plus"),
        ({"method": {"name": "bitfit"}}, "method=bitfit cannot go on from an adapter"),
        ({"model": {"config": {"hidden_size": 64}}}, "that run is on other weights of that name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_before_work_starts(
    changes: dict[str, Any], line: str, make_run: MakeSpec, settings: Settings
) -> None:
    first = planned(make_run(), settings)
    if config := changes.get("model", {}).get("config"):
        plain = dataclasses.asdict(make_run().model)
        changes = {"model": plain | {"config": plain["config"] | config}}
    second = after(make_run(**changes), first)
    for _ in range(2):  # planned, then recorded
        with pytest.raises(Problems) as caught:
            plan.make(grouped([first, second]), settings)
        (said,) = caught.value.lines
        assert said.startswith(f"trainer.init_from={first.run_id}: ")
        assert line in said
        if not (settings.folder / first.run_id).exists():
            go([first], settings)


def test_what_is_no_finished_run_is_one_line(make_run: MakeSpec, settings: Settings, tmp_path: Path) -> None:
    def said(spec: RunSpec) -> str:
        with pytest.raises(Problems) as caught:
            plan.make(grouped([spec]), settings)
        (line,) = caught.value.lines
        return line

    assert "no record in that folder; give the id of a run" in said(after(make_run(), tmp_path / "nothing"))
    assert "nor in this command; give the id of a run of the study" in said(after(make_run(), "0123456789ab"))
    (first,) = go([make_run(trainer={"max_steps": 2})], settings)
    path = settings.folder / first.run_id / "record.json"
    plain = json.loads(path.read_text())
    del plain["seal"]
    for status, words in (("diverged", "that run diverged"), ("pruned", "that run was pruned")):
        path.write_text(json.dumps(plain | {"status": status}))
        assert words in said(after(make_run(), first))
    path.write_text(json.dumps(plain))
    (settings.folder / first.run_id / "adapter" / "adapter_model.safetensors").unlink()
    assert "that run left no adapter, and a run begins with one" in said(after(make_run(), first))
    with pytest.raises(SpecError, match=r"trainer\.init_from must be the id of a run, its folder, or null"):
        TrainerSpec(max_steps=1, batch_size=1, init_from=" ")


def test_the_dry_run_shows_who_waits_for_whom(
    make_run: MakeSpec, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    first = planned(make_run(trainer={"max_steps": 2}), settings)
    second = after(make_run(), first)
    dry = dataclasses.replace(settings, dry_run=True)
    launch.carry_out(grouped([second, first]), dry)
    assert f"to train after {first.run_id}" in capsys.readouterr().out
    go([first], settings)
    capsys.readouterr()
    launch.carry_out(grouped([second]), dry)
    assert f"to train from {first.run_id}" in capsys.readouterr().out


def test_a_search_begins_from_a_finished_run_alone(
    make_run: MakeSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = planned(make_run(trainer={"max_steps": 2}), settings)
    second = after(make_run(), first)
    tuned = dataclasses.replace(
        single(second), space=(Dimension(key="optim.lr", kind="float", low=1e-3, high=1e-2, log=True),),
        make=lambda params, seed: dataclasses.replace(second, seed=seed, optim=OptimSpec(lr=params["optim.lr"])),
    )  # fmt: skip
    with pytest.raises(Problems, match="nor in this command"):
        plan.make([tuned], settings, SearchSettings(n_trials=2))
    with pytest.raises(Problems, match="is still to train, and searches do not wait: train it first"):
        plan.make([single(first), tuned], settings, SearchSettings(n_trials=2))
    go([first], settings)
    found = launch.train([tuned], settings, SearchSettings(n_trials=2, pruner="none"))
    assert [one.init_from["run_id"] for one in found.values()] == [first.run_id]
