"""What a command says it would cost, before it is carried out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from sweeper import config, record
from sweeper.arms import grouped
from sweeper.device import processor
from sweeper.record import Efficiency, Record
from sweeper.spec import RunSpec, Settings
from sweeper.study import forecast, plan
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
    assert "training takes about 1:40 at most" in second


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
    precision, *lines = forecast.notes(specs, forecast.costs(specs, study), study)
    assert precision.startswith("trainer.precision=auto")
    assert [line.split(" leaves ")[0] for line in lines] == [
        "tiny_llama: placement=attn",
        "tiny_llama: placement=full",
    ]
    assert all("conv.in_proj" in line and "placement=all" in line for line in lines)
    plain = config.expand(["experiment=smoke", "placement=attn,full,all", "rank=4"], composer).specs
    assert forecast.notes(plain, forecast.costs(plain, study), study) == [precision]
