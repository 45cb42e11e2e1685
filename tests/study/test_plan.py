"""A plan is what is missing, checked; a plan that cannot be carried out leaves nothing behind."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeper import config, record
from sweeper.arms import grouped
from sweeper.errors import Problems
from sweeper.record import Record
from sweeper.spec import RunSpec, Settings
from sweeper.study import plan


@pytest.fixture
def specs(composer: Any) -> tuple[RunSpec, ...]:
    return config.expand(["experiment=smoke", "placement=attn,ff", "rank=4,8"], composer).specs


def test_finished_runs_are_not_planned_again(
    specs: tuple[RunSpec, ...], study: Settings, make_record: Callable[..., Record]
) -> None:
    for spec, status in zip(specs, ("completed", "diverged", "failed"), strict=False):
        record.write_record(study.folder / spec.run_id, make_record(spec, status=status))
    made = plan.make(grouped(specs), study)
    assert [made.statuses[run.run_id] for run in made.runs] == ["completed", "diverged", "failed", None]
    assert [run.run_id for run in made.todo] == [specs[2].run_id, specs[3].run_id]
    once = plan.make(grouped(specs), dataclasses.replace(study, retry_failed=False))
    assert [run.run_id for run in once.todo] == [specs[3].run_id]


def test_a_broken_record_counts_as_missing(specs: tuple[RunSpec, ...], study: Settings) -> None:
    folder = study.folder / specs[0].run_id
    folder.mkdir(parents=True)
    (folder / record.RECORD).write_text('{"schema": 1, "status"')
    assert plan.make(grouped(specs), study).statuses[specs[0].run_id] is None


def problems(overrides: list[str], composer: Any, study: Settings) -> tuple[str, ...]:
    found = config.expand(["experiment=smoke", *overrides], composer)
    settings = dataclasses.replace(found.settings, output_root=study.output_root)
    with pytest.raises(Problems) as caught:
        plan.make(found.arms, settings)
    assert not settings.folder.exists()
    return caught.value.lines


def test_texts_longer_than_a_models_learned_positions_are_refused(composer: Any, study: Settings) -> None:
    lines = problems(["model=tiny_gpt2", "dataset.max_length=513"], composer, study)
    assert lines == ("dataset.max_length=513: model=tiny_gpt2 has learned 512 positions. Choose at most 512.",)
    for model, length in (("tiny_gpt2", 512), ("tiny_llama", 513), ("tiny_neox", 513)):
        found = config.expand(["experiment=smoke", f"model={model}", f"dataset.max_length={length}"], composer)
        plan.make(found.arms, study)


def test_texts_longer_than_a_model_was_made_for_are_warned_of_once(composer: Any, study: Settings) -> None:
    """Rotary positions have no end, and still the model has seen none beyond its own."""
    grid = ["experiment=smoke", "placement=attn,ff", "rank=4,8"]

    def warnings(*more: str) -> tuple[str, ...]:
        return plan.make(config.expand([*grid, *more], composer).arms, study).notes

    assert warnings("dataset.max_length=513") == (
        "dataset.max_length=513: model=tiny_llama was made for texts of 512 tokens; the positions beyond are new to it",
    )
    assert warnings("dataset.max_length=512") == ()
    yarn = "{rope_type: yarn, factor: 4.0, original_max_position_embeddings: 512}"
    assert warnings("dataset.max_length=2048", f"+model.config.rope_scaling={yarn}") == ()
    assert len(warnings("dataset.max_length=2049", f"+model.config.rope_scaling={yarn}")) == 1
    endless = ["model.location=bloom", "model.config.max_position_embeddings=null"]
    assert warnings("dataset.max_length=9000", *endless) == ()


def test_an_adapter_that_a_mamba_kernel_would_pass_by_is_refused(composer: Any, study: Settings) -> None:
    mamba = ["model.location=mamba", "placement=custom"]
    (line,) = problems([*mamba, "placement.patterns=[in_proj,out_proj]"], composer, study)
    assert "mixer.out_proj can have no adapter: a Mamba layer's kernel reads the weight and passes the adapter" in line
    assert line.endswith("this placement also has in_proj.")
    fine = [
        ["placement.patterns=[in_proj]"],
        ["placement.patterns=[out_proj]", "method=full_ft", "method.options.modules=placed"],
    ]
    for chosen in fine:
        found = config.expand(["experiment=smoke", *mamba, *chosen], composer)
        assert len(plan.make(found.arms, study).todo) == 1


def test_what_does_not_fit_the_model_is_told_at_once(composer: Any, study: Settings) -> None:
    lines = problems(["placement=attn,ff", "rank=4,65", "placement.layers=all,last:9,lowr"], composer, study)
    text = "\n".join(lines)
    assert "rank=65 is above the size of model.layers.0.self_attn.q_proj" in text
    assert "placement.layers=last:9: this model has 4 layers" in text
    assert "placement.layers=lowr: no such choice of layers. Choose from all" in text
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["trainer.device=cuda:77"], "trainer.device=cuda:77: no such device here"),
        (["dataset=jsonl", "dataset.path=/nowhere/x.jsonl"], "/nowhere/x.jsonl"),
        (["model=path", "model.location=/nowhere"], "/nowhere"),
        (["placement=custom", "placement.patterns=[nothing_like_it]"], "matches no module"),
        (["tracking=wandb", "+tracking.projct=1"], "tracking.projct: no such field"),
        (["dataset.template=chatt"], "Did you mean chat?"),
        (["allocation=importance", "allocation.options.score=gradent"], "Did you mean gradient?"),
        (["+allocation.options.batches=3"], "allocation.options: allocation=uniform has none, importance has"),
        (["+evaluation.options.limit=3"], "evaluation.options: evaluation=default has none, lm_eval has"),
        (["allocation=importance", "allocation.budget=9G"], "allocation=importance: ranks 1 to"),
    ],
)
def test_each_mistake_has_its_line(overrides: list[str], line: str, composer: Any, study: Settings) -> None:
    found = problems(overrides, composer, study)
    assert len(found) == 1
    assert line in found[0]


def test_a_folder_that_cannot_be_written_is_told(specs: tuple[RunSpec, ...], study: Settings, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    with pytest.raises(Problems, match=r"cannot be written .*choose another study"):
        plan.make(grouped(specs), dataclasses.replace(study, output_root=str(blocked)))
    assert blocked.read_text() == "mine"


def test_a_finished_study_needs_no_model(
    make_spec: Callable[..., RunSpec], study: Settings, make_record: Callable[..., Record]
) -> None:
    """Nothing to train, nothing to check: the data or model may be gone since."""
    spec = make_spec(model={"source": "path", "location": "/gone"})
    record.write_record(study.folder / spec.run_id, make_record(spec))
    assert not plan.make(grouped([spec]), study).todo


def test_records_are_read_only_while_planning(
    specs: tuple[RunSpec, ...], study: Settings, make_record: Callable[..., Record]
) -> None:
    path = record.write_record(study.folder / specs[0].run_id, make_record(specs[0]))
    before = path.read_text()
    plan.make(grouped(specs), study)
    assert path.read_text() == before
    assert json.loads(before)["status"] == "completed"


def arms_of(overrides: list[str], composer: Any, study: Settings) -> plan.Plan:
    found = config.expand(["experiment=smoke", "placement=attn,ff", "rank=4,8", *overrides], composer)
    return plan.make(found.arms, study)


def test_arms_that_would_train_the_same_are_one(composer: Any, study: Settings) -> None:
    made = arms_of(["method=lora,bitfit,full_ft", "seed=0,1"], composer, study)
    kinds = [(arm.default.method.name, arm.default.placement.name, arm.default.rank) for arm in made.arms]
    lora = [("lora", name, rank) for name in ("attn", "ff") for rank in (4, 8)]
    assert sorted(kinds) == [("bitfit", "attn", 4), ("bitfit", "ff", 4), ("full_ft", "attn", 4), *lora]
    assert len(made.left_out) == 2 + 3
    assert [run.run_id for run in made.runs] == [spec.run_id for arm in made.arms for spec in arm.defaults]
    placed = arms_of(["method=full_ft", "method.options.modules=placed"], composer, study)
    assert [arm.default.placement.name for arm in placed.arms] == ["attn", "ff"]


def test_of_arms_that_would_train_the_same_the_one_that_has_runs_is_kept(
    composer: Any, study: Settings, make_record: Callable[..., Record]
) -> None:
    *_, last = config.expand(["experiment=smoke", "placement=ff", "rank=8", "method=full_ft"], composer).specs
    record.write_record(study.folder / last.run_id, make_record(last))
    made = arms_of(["method=full_ft", "seed=0,1"], composer, study)
    assert [(run.spec.placement.name, run.spec.rank, made.statuses[run.run_id]) for run in made.runs] == [
        ("ff", 8, "completed"),
        ("ff", 8, None),
    ]


def test_a_record_that_was_edited_is_named_before_its_run_trains_again(
    specs: tuple[RunSpec, ...], study: Settings, make_record: Callable[..., Record]
) -> None:
    spec = specs[0]
    path = record.write_record(study.folder / spec.run_id, make_record(spec, steps=10))
    before = plan.make(grouped([spec]), study)
    assert not before.todo
    path.write_text(path.read_text().replace('"steps": 10', '"steps": 20'))
    found = plan.make(grouped([spec]), study)
    assert [run.run_id for run in found.todo] == [spec.run_id]
    (line,) = [note for note in found.notes if note not in before.notes]
    assert line.startswith(f"{spec.run_id} trains again")
    assert "edited or damaged" in line
