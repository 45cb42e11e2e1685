"""What a command says it would cost, before it is carried out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from sweeper import compose, forecast, plan, record
from sweeper.arms import grouped
from sweeper.device import processor
from sweeper.record import Efficiency, Record
from sweeper.search.settings import SearchSettings
from sweeper.spec import RunSpec, Settings


@pytest.fixture
def specs(composer: Any) -> tuple[RunSpec, ...]:
    return compose.expand(["experiment=smoke", "placement=attn,ff", "rank=4,8"], composer).specs


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
