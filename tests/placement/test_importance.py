"""Scores become ranks: within the budget and the bounds, in proportion, even where scores are equal."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from sweeper import config, methods
from sweeper.errors import SpecError
from sweeper.models.budget import lora_parameters, uniform
from sweeper.placement.placement import Target
from sweeper.reporting.console import make_console
from sweeper.spec import RunSpec
from sweeper.study import forecast, launch, plan
from sweeper.study.search_settings import SearchSettings
from tests.placement.test_allocation import SHAPES, every, placed

Scores = Mapping[str, float]


def random_scores(kind: str, seed: int) -> Scores:
    """Scores that differ by orders of magnitude, as gradients do."""
    rng = np.random.default_rng(seed)
    return {target.name: float(rng.lognormal(0, 1.5)) for target in every(kind)}


def allocate(
    make_spec: Callable[..., RunSpec], kind: str, name: str, scores: Scores | None, *, rank: int = 8,
    budget: str | None = None, **options: Any,
) -> Mapping[Target, int]:  # fmt: skip
    section = {"name": "importance", "budget": budget, "options": options}
    return methods.allocated(make_spec(rank=rank, allocation=section), placed(kind, name), every(kind), scores)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ["attn", "ff", "full"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_budget_is_that_of_a_uniform_allocation(
    kind: str, name: str, seed: int, make_spec: Callable[..., RunSpec]
) -> None:
    found = allocate(make_spec, kind, name, random_scores(kind, seed))
    wanted = lora_parameters(uniform(placed(kind, name), 8))
    assert lora_parameters(found) == pytest.approx(wanted, rel=0.01)
    assert len(set(found.values())) > 3
    assert min(found.values()) >= 1
    assert max(found.values()) <= 32


def test_a_budget_of_ones_own(make_spec: Callable[..., RunSpec]) -> None:
    found = allocate(make_spec, "llama", "full", random_scores("llama", 0), budget="5M")
    assert lora_parameters(found) == pytest.approx(5_000_000, rel=0.01)


def test_bounds_are_kept_and_the_budget_with_them(make_spec: Callable[..., RunSpec]) -> None:
    found = allocate(make_spec, "llama", "attn", random_scores("llama", 0), least=4, most=10)
    assert (min(found.values()), max(found.values())) == (4, 10)
    wanted = lora_parameters(uniform(placed("llama", "attn"), 8))
    assert lora_parameters(found) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("scores", [None, dict.fromkeys([t.name for t in every("llama")], 3.7)])
def test_equal_scores_are_a_uniform_allocation(scores: Scores | None, make_spec: Callable[..., RunSpec]) -> None:
    for rank in (1, 3, 8):
        assert set(allocate(make_spec, "llama", "full", scores, rank=rank).values()) == {rank}


def test_ranks_are_in_proportion_to_scores(make_spec: Callable[..., RunSpec]) -> None:
    """Equal shapes, so that parameters are proportional to ranks: scores of 1, 2, 3 share 8 as 4, 8, 12."""
    scores = {target.name: 1.0 + (target.layer or 0) % 3 for target in every("llama")}
    found = allocate(make_spec, "llama", "full", scores, rank=8)
    assert {scores[target.name]: rank for target, rank in found.items()} == {1.0: 4, 2.0: 8, 3.0: 12}


def test_more_important_is_never_less_rank(make_spec: Callable[..., RunSpec]) -> None:
    scores = random_scores("gpt_neox", 4)
    found = allocate(make_spec, "gpt_neox", "attn", scores)
    for role in ("attn_qkv", "attn_o"):
        ordered = sorted((t for t in found if t.role == role), key=lambda t: scores[t.name])
        assert [found[t] for t in ordered] == sorted(found[t] for t in ordered)


def test_a_module_of_score_zero_has_the_lowest_rank(make_spec: Callable[..., RunSpec]) -> None:
    scores = {target.name: float(target.role != "attn_q") for target in every("llama")}
    found = allocate(make_spec, "llama", "attn", scores, least=2)
    assert {rank for target, rank in found.items() if target.role == "attn_q"} == {2}
    assert min(rank for target, rank in found.items() if target.role != "attn_q") > 8


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"score": "gradent"}, r"allocation.options.score=gradent: .* Did you mean gradient\?"),
        ({"batches": 0}, "allocation.options.batches must be at least 1, got 0"),
        ({"least": 5, "most": 4}, "allocation.options.most=4 is below allocation.options.least=5"),
        ({"btches": 3}, r"allocation.options.btches: no such field. .* Did you mean allocation.options.batches\?"),
        (
            {"most": 7},
            r"ranks 1 to 7 have [\d,]+ to [\d,]+ trainable parameters in this placement, not [\d,]+: change rank",
        ),
        ({"least": "two"}, "allocation.options.least must be a whole number, got two"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, Any], line: str, make_spec: Callable[..., RunSpec]) -> None:
    with pytest.raises(SpecError, match=line):
        allocate(make_spec, "llama", "attn", None, **options)


def test_a_dry_run_says_that_a_probe_decides(composer: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = config.expand(
        ["experiment=smoke", "placement=attn,ff", "allocation=importance", f"output_root={tmp_path}"], composer
    )
    made = plan.make(found.arms, found.settings)
    launch.show_plan(made, found.settings, SearchSettings(), make_console())
    shown = capsys.readouterr().out
    costs = forecast.costs(found.specs, found.settings)
    for name, cost in zip(("attn", "ff"), costs, strict=True):
        assert f"allocation=importance, {name}: a probe (gradient, 8 training batches) decides each module's" in shown
        assert f"{cost.parameters:,} parameters in all, to within 1%" in shown
