"""What a command says it would cost, before it is carried out."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeper import config, models, record, tasks
from sweeper.arms import grouped
from sweeper.device import processor
from sweeper.record import Efficiency, Record
from sweeper.spec import RunSpec, Settings
from sweeper.study import forecast, launch, plan
from sweeper.study.lengths import Reader
from sweeper.study.search_settings import SearchSettings


@pytest.fixture
def specs(composer: Any) -> tuple[RunSpec, ...]:
    return config.expand(["experiment=smoke", "placement=attn,ff", "rank=4,8"], composer).specs


def test_costs_are_those_of_the_closed_forms(specs: tuple[RunSpec, ...], study: Settings) -> None:
    four, eight = forecast.costs(specs[:2], study)
    assert eight.parameters == 2 * four.parameters
    assert four.parameters == 4 * 4 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64)
    assert four.modules == 16
    assert eight.flops > four.flops > 0
    assert eight.memory > four.memory > 4 * four.total_parameters


def test_the_time_left_is_that_of_the_runs_left_at_the_pace_of_those_recorded(
    specs: tuple[RunSpec, ...], study: Settings, make_record: Callable[..., Record]
) -> None:
    study = dataclasses.replace(study, device="cpu")
    costs = forecast.costs(specs, study)

    def lines() -> list[str]:
        return forecast.estimate(plan.make(grouped(specs), study), SearchSettings(), study, costs)

    first, second = lines()
    assert first.startswith("4 runs, at most 4 at a time in a pack")
    assert "there is no estimate of time" in second
    cost = Efficiency(train_flops=sum(one.flops for one in costs[1:]), train_seconds_amortised=100.0)
    done = make_record(specs[0], efficiency=cost, environment={"device": processor()})
    record.write_record(study.folder / specs[0].run_id, done)
    first, second = lines()
    assert first.startswith("3 runs, at most 3 at a time in a pack")
    assert "training takes about 1:40, at the pace" in second


def test_the_pace_of_another_model_is_no_estimate(
    specs: tuple[RunSpec, ...], study: Settings, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeper.training.environment.describe", lambda *_: {"device": "here"})
    tiny = make_record(
        specs[0],
        environment={"device": "here"},
        efficiency=record.Efficiency(train_seconds_amortised=2.0, train_flops=6.0),
    )
    record.write_record(study.folder / specs[0].run_id, tiny)
    asked = plan.make(grouped(specs[1:2]), study)
    costs = forecast.costs([run.spec for run in asked.runs], study)
    own = forecast.estimate(asked, SearchSettings(), study, costs)
    assert own[0].startswith("1 run, at most 1 at a time")
    assert own[1].startswith("training takes about")
    other = dataclasses.replace(specs[1], model=dataclasses.replace(specs[1].model, name="large"))
    asked = plan.make(grouped([other]), study)
    assert forecast.estimate(asked, SearchSettings(), study, costs)[1].startswith("no run of large on this device")


def test_the_plan_says_what_a_placement_leaves(composer: Any, study: Settings) -> None:
    hybrid = [
        "model.location=lfm2",
        "+model.config.layer_types=[conv,full_attention]",
        "model.config.num_hidden_layers=2",
    ]
    arguments = ["experiment=smoke", "placement=attn,full,all", "rank=4,8", *hybrid]
    specs = config.expand(arguments, composer).specs
    precision, about, *lines = forecast.notes(specs, forecast.costs(specs, study), study)
    assert precision.startswith("trainer.precision=auto")
    assert about == "icd10_chapter on tiny_llama: training examples have 78 tokens on average, at most 128"
    assert [line.split(" leaves ")[0] for line in lines] == [
        "tiny_llama: placement=attn",
        "tiny_llama: placement=full",
    ]
    assert all("conv.in_proj" in line and "placement=all" in line for line in lines)
    plain = config.expand(["experiment=smoke", "placement=attn,full,all", "rank=4"], composer).specs
    assert forecast.notes(plain, forecast.costs(plain, study), study) == [precision, about]


def test_tokens_are_those_that_the_record_then_has_and_the_time_is_of_the_same_size(
    composer: Any, study: Settings, tmp_path: Path
) -> None:
    """Of CPU runs; the time within a factor of four, on a machine that others use as well."""
    study = dataclasses.replace(study, device="cpu", calibrate=False)
    words = ["experiment=smoke", "placement=attn,ff", "trainer.max_steps=40", "trainer.precision=float32"]
    former = config.expand([*words, "rank=4"], composer)
    launch.train(former.arms, study)
    asked = config.expand([*words, "rank=8", "seed=3"], composer)
    costs = forecast.costs(asked.specs, study)
    told = forecast.estimate(plan.make(asked.arms, study), SearchSettings(), study, costs)[1]
    found = launch.train(asked.arms, study)
    for spec, cost in zip(asked.specs, costs, strict=True):
        efficiency = found[spec.run_id].efficiency
        assert (cost.lengths.how, cost.lengths.tokens) == ("counted", efficiency.train_tokens)
        assert cost.lengths.tokens < 0.7 * 40 * 2 * spec.dataset.max_length
        assert cost.flops == pytest.approx(efficiency.train_flops, rel=0.01)
    minutes, seconds = re.search(r"about (\d+):(\d+),", told).groups()  # type: ignore[union-attr]
    taken = sum(one.efficiency.train_seconds_amortised or 0.0 for one in found.values())
    assert taken / 4 - 1 < 60 * int(minutes) + int(seconds) < 4 * taken + 1


def rows(count: int, words: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {n} " + "word " * (n % words), "response": "yes"} for n in range(count)]


def of_file(composer: Any, path: Path, *more: str) -> RunSpec:
    words = ["experiment=smoke", "dataset=jsonl", f"dataset.path={path}", "dataset.max_length=512"]
    (spec,) = config.expand([*words, "dataset.train_examples=null", *more], composer).specs
    return spec


def test_of_a_large_dataset_a_sample_is_read_and_kept(
    composer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "FEW", 100)
    monkeypatch.setattr(tasks, "SAMPLED", 50)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(400, 17))))
    spec = of_file(composer, path, "trainer.max_steps=100")
    sampled = Reader().of(spec)
    assert (sampled.how, sampled.longest) == ("sampled", 512)
    assert len(list((tmp_path / "cache/tokens").glob("*-sample.npz"))) == 1
    monkeypatch.setattr(tasks, "load", lambda _: pytest.fail("the file was read again"))
    assert Reader().of(spec) == sampled
    monkeypatch.undo()
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "other"))
    assert Reader().of(spec).how == "counted"
    assert sampled.tokens == pytest.approx(Reader().of(spec).tokens, rel=0.1)


def test_a_run_of_several_tasks_is_counted_as_it_mixes_them(composer: Any, tmp_path: Path) -> None:
    for name, words in (("short", 2), ("long", 60)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(60, words))))
    parts = ",".join(
        f"{{jsonl: {{name: {name}, path: {tmp_path / name}.jsonl, max_length: 512}}}}" for name in ("short", "long")
    )
    (spec,) = config.expand(["experiment=smoke", "dataset=mixture", f"dataset.parts=[{parts}]"], composer).specs
    found = Reader().of(spec)
    assert found.how == "counted"
    alone = [Reader().of(dataclasses.replace(spec, dataset=part)).tokens for part in spec.dataset.parts]
    assert min(alone) < found.tokens < max(alone)


def test_without_a_tokenizer_characters_are_counted_and_without_data_the_most_is_assumed(
    composer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(60, 17))))
    spec = of_file(composer, path)
    monkeypatch.setattr(models, "tokenizer_at_hand", lambda _: False)
    guess = Reader().of(spec)
    assert guess.how == "characters"
    assert guess.mean < 40
    path.unlink()
    assumed = Reader().of(spec)
    assert (assumed.how, assumed.mean) == ("assumed", 512)
    about = [forecast._of_lengths(spec, one) for one in (guess, assumed)]
    assert "taking 4.5 characters for one: tiny_llama is not unpacked yet" in about[0]
    assert about[1].startswith("jsonl: its examples cannot be read yet")


def test_steps_cost_what_their_examples_are_long_where_arms_differ_in_that(
    composer: Any, study: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = dataclasses.replace(study, device="cpu")
    alike = config.expand(["experiment=smoke", "rank=4,8"], composer)
    assert forecast.step_costs(plan.make(alike.arms, study), study) == {}
    arms = config.expand(["experiment=smoke", "dataset=icd10_chapter,chain_sum"], composer).arms
    own = forecast.step_costs(plan.make(arms, study), study)
    tokens = {arm.key: Reader().of(arm.default).tokens for arm in arms}
    first, second = own
    longer = tokens[first] / tokens[second]
    assert longer > 1.5
    assert longer < own[first] / own[second] < 1.5 * longer  # attention's part grows with the square
