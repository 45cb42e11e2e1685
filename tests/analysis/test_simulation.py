"""Simulated studies with a known truth: are the intervals, the tests and the front what they say they are?"""

import numpy as np
import pytest

from analysis import stats
from analysis.compare import power
from analysis.pareto import front, membership
from analysis.stats import Array, Components, Draws
from benchmarks import simulation

pytestmark = pytest.mark.slow
DRAWS = Draws(1000, seed=0)


def scores(rng: np.random.Generator, mean: float, R: int, E: int, seeds: float, examples: float, cell: float) -> Array:
    noise = rng.normal(0, cell, (R, E))
    return mean + rng.normal(0, seeds, (R, 1)) + rng.normal(0, examples, (1, E)) + noise


@pytest.mark.parametrize(
    ("R", "E", "seeds", "examples", "cell", "statistic"),
    [
        (3, 200, 0.002, 0.12, 0.02, "mean"),  # as our studies are: examples differ most
        (3, 200, 0.02, 0.12, 0.05, "mean"),
        (5, 200, 0.05, 0.10, 0.05, "mean"),  # seeds differ most
        (3, 1, 0.05, 0.0, 0.0, "mean"),  # no per-example scores
        (10, 100, 0.01, 0.10, 0.05, "mean"),
        (8, 200, 0.01, 0.12, 0.05, "iqm"),
    ],
)
def test_intervals_cover_what_they_say(
    R: int, E: int, seeds: float, examples: float, cell: float, statistic: str
) -> None:
    rng, runs = np.random.default_rng(20), 3000
    hits = 0
    for _ in range(runs):
        found = stats.interval(scores(rng, 1.0, R, E, seeds, examples, cell), draws=DRAWS, statistic=statistic)
        hits += found.low <= 1.0 <= found.high
    print(f"coverage: {hits / runs:.4f}")
    assert 0.93 <= hits / runs <= 0.97


def test_accuracies_and_token_weights_are_covered_too() -> None:
    rng, runs, hits = np.random.default_rng(21), 2000, [0, 0]
    for _ in range(runs):
        chance_E = rng.beta(2, 2, 200)
        right_RE = (rng.random((4, 200)) < chance_E).astype(float)
        found = stats.interval(right_RE, draws=DRAWS)
        hits[0] += found.low <= 0.5 <= found.high
        tokens_E = rng.integers(2, 20, 200).astype(float)
        nll_RE = 1 + rng.normal(0, 0.01, (4, 1)) + rng.normal(0, 1, 200) / np.sqrt(tokens_E)
        found = stats.interval(nll_RE, tokens_E, draws=DRAWS)
        hits[1] += found.low <= 1.0 <= found.high
    assert all(0.93 <= count / runs <= 0.97 for count in hits)


CELLS = (
    "normal", "seeds alone", "20 groups of 10, 3 seeds", "13 groups of 16, 5 seeds", "skewed seeds, 5 seeds",
    "one arm's seeds twice as wide", "one arm's seeds eight times as wide", "accuracy 0.02, 200 groups of 1",
    "accuracy 0.5, 20 groups of 10", "token weights", "nearly constant",
)  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_a_whole_analysis_covers_and_keeps_its_level(name: str) -> None:
    """The benchmark's cells, smaller: coverage at least 93%, false positives at most 5%, each less two standard errors
    of 300 studies, and where its assumptions hold 0.85 of the pooled t's power."""
    cell, count = simulation.cells()[name], 300
    found = simulation.measure(cell, count, lambda part, numbers: map(part, numbers))
    print(name, found)
    assert found["coverage"] >= 0.93 - 2 * (0.93 * 0.07 / count) ** 0.5
    assert found["false ours"] <= 0.05 + 2 * (0.05 * 0.95 / count) ** 0.5
    if name == "seeds alone":
        assert found["power ours"] >= 0.85 * found["power pooled t"]


def test_power_is_what_the_formula_says() -> None:
    rng, runs, parts = np.random.default_rng(23), 1500, Components(seeds=0.01**2, groups=0.15**2, cell=0.05**2)
    for difference in (0.02, 0.04):
        hits = 0
        for _ in range(runs):
            d_RE = scores(rng, difference, 4, 120, 0.01, 0.15, 0.05)
            hits += stats.p_value(stats.interval(d_RE, draws=DRAWS, strict=True)) < 0.05
        assert power(difference, parts, 4, 120) == pytest.approx(hits / runs, abs=0.05)


def test_front_membership_is_right() -> None:
    rng = np.random.default_rng(24)
    cost = np.array([1.0, 2, 3, 4, 5])
    clear = np.array([0.30, 0.20, 0.35, 0.10, 0.15])  # the third and the fifth are dominated, by far
    coin = np.array([0.30, 0.20, 0.20, 0.10, 0.10])  # equal to a cheaper one: on the front in half of all studies
    for truth, expected in ((clear, [1, 1, 0, 1, 0]), (coin, [1, 1, 0.5, 1, 0.5])):
        chances, members = [], []
        for _ in range(300):
            common = rng.normal(0, 0.12, 200)
            arms = [scores(rng, mean, 3, 200, 0.002, 0.03, 0.02) + common for mean in truth]
            loss_BA = stats.joint_draws([(x_RE, np.ones(200)) for x_RE in arms], draws=DRAWS)
            chances.append(membership(cost, loss_BA))
            members.append(front(cost, np.array([x_RE.mean() for x_RE in arms])))
        assert np.mean(members, axis=0) == pytest.approx(expected, abs=0.1)
        assert np.mean(chances, axis=0) == pytest.approx(expected, abs=0.1)
