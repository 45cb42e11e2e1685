"""Dimensions of a search space and arms of a grid."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from sweeper import config
from sweeper.arms import Dimension, grouped, labels, number_of_points
from sweeper.errors import SpecError
from sweeper.spec import RunSpec

LR = Dimension(key="optim.lr", kind="float", low=1e-5, high=1e-2, log=True)
BASE = ["experiment=smoke", "placement=attn,ff", "rank=4,8"]


def test_an_edge_is_measured_on_the_scale_of_the_range() -> None:
    assert [LR.edge(value) for value in (1e-5, 1.3e-5, 1e-4, 5e-3, 8e-3)] == ["low", "low", None, None, "high"]
    linear = Dimension(key="method.dropout", kind="float", low=0, high=1)
    assert [linear.edge(value) for value in (0.0, 0.04, 0.06, 0.96)] == ["low", "low", None, "high"]
    grid = Dimension(key="rank", kind="choice", choices=(8, 4, 16))  # ends are those of the numbers, not of the list
    assert [grid.edge(value) for value in grid.choices] == [None, "low", "high"]
    assert Dimension(key="placement", kind="choice", choices=("attn", "ff")).edge("attn") is None


def test_widening_moves_one_end_by_half_the_range() -> None:
    assert LR.widened("high") == Dimension(key="optim.lr", kind="float", low=1e-5, high=0.316, log=True)
    assert LR.widened("low").low == pytest.approx(3.16e-7)
    ranks = Dimension(key="rank", kind="int", low=4, high=64, log=True)
    assert ranks.widened("low").low == 1
    decay = Dimension(key="optim.weight_decay", kind="float", low=0.01, high=0.1)
    assert decay.widened("low").low == pytest.approx(0.001)


def test_points_are_counted() -> None:
    assert (
        number_of_points(
            [Dimension(key="a", kind="choice", choices=(1, 2)), Dimension(key="b", kind="int", low=1, high=3)]
        )
        == 6
    )
    assert number_of_points([LR]) == math.inf


@pytest.mark.parametrize(("low", "high", "log"), [(1, 1, False), (2, 1, False), (0, 1, True), (math.nan, 1, False)])
def test_a_range_that_is_none_is_refused(low: float, high: float, log: bool) -> None:
    with pytest.raises(SpecError, match="a range"):
        Dimension(key="x", kind="float", low=low, high=high, log=log)


def test_replicates_and_tuned_fields_make_no_arm(composer: Any) -> None:
    plain = config.expand(BASE, composer)
    tuned = config.expand([*BASE, "seed=0,1,2", "optim.lr=tag(log,interval(1e-5,1e-2))"], composer)
    assert len(plain.arms) == len(tuned.arms) == 4
    assert all(arm.seeds == (0, 1, 2) for arm in tuned.arms)
    assert {arm.key for arm in tuned.arms} == {
        arm.key for arm in config.expand([*BASE, "optim.lr=tag(log,interval(1e-4,1e-1))"], composer).arms
    }
    assert not {arm.key for arm in plain.arms} & {arm.key for arm in tuned.arms}


def test_a_trial_is_the_run_that_its_overrides_compose(composer: Any) -> None:
    found = config.expand(
        [*BASE, "seed=0,1", "optim.lr=tag(log,interval(1e-5,1e-2))", "trainer.max_steps=int(interval(2,5))"], composer
    )
    arm = found.arms[2]
    params = {"optim.lr": 0.00123456789, "trainer.max_steps": 3}
    spec, _ = config.from_config(composer.compose(arm.typed(params, 1)), composer.loader)
    assert spec == arm.make(params, 1)
    assert (spec.optim.lr, spec.trainer.max_steps, spec.seed, spec.placement.name) == (0.00123456789, 3, 1, "ff")


def test_a_tuned_rank_takes_alpha_along_and_slots_hold_the_widest(composer: Any) -> None:
    (arm,) = config.expand(["experiment=smoke", "rank=tag(tune,choice(4,16,8))", "optim.lr=1e-3"], composer).arms
    assert arm.default_params == {"rank": 8}
    assert [arm.make({"rank": rank}, 0).alpha for rank in (4, 8)] == [8, 16]
    assert arm.widest is not None
    assert arm.widest.rank == 16


def test_a_tuned_group_changes_with_its_option(composer: Any) -> None:
    (arm,) = config.expand(["experiment=smoke", "placement=tag(tune,choice(attn,ff))", "rank=4"], composer).arms
    assert [arm.make({"placement": name}, 0).placement.name for name in ("attn", "ff")] == ["attn", "ff"]
    assert arm.default_params == {"placement": "attn"}


def test_a_default_outside_of_the_range_is_no_trial(composer: Any) -> None:
    (arm,) = config.expand(["experiment=smoke", "optim.lr=interval(0.5,0.6)", "rank=4"], composer).arms
    assert arm.default_params is None


def test_specs_that_differ_in_their_seed_are_one_arm(make_spec: Callable[..., RunSpec]) -> None:
    arms = grouped([make_spec(seed=0), make_spec(rank=8), make_spec(seed=1)])
    assert [arm.seeds for arm in arms] == [(0, 1), (0,)]


def test_an_arm_is_named_by_what_is_not_tuned(composer: Any) -> None:
    def names(*overrides: str) -> list[str]:
        return list(
            labels(config.expand(["experiment=smoke", "placement=attn", "rank=4", *overrides], composer).arms).values()
        )

    lr = "optim.lr=interval(1e-5,1e-2)"
    assert names("method=lora,bitfit", lr) == ["attn r4 method=lora", "attn r4 method=bitfit"]
    assert names("method=lora,bitfit") == ["attn r4 method=lora lr=0.001", "attn r4 method=bitfit lr=0.01"]
    assert names("rank=tag(tune,choice(4,8))", lr) == ["attn"]
    assert names("placement=tag(tune,choice(attn,ff))", "rank=tag(tune,choice(4,8))") == ["all"]
