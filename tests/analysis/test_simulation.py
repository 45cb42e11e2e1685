"""Simulated studies with a known truth: are the intervals, the tests and the front what they say they are?"""

import numpy as np
import pytest

from analysis import compare, stats
from analysis.arms import Arm, Arrangement, Scores, Setting
from analysis.compare import power
from analysis.pareto import front, membership
from analysis.stats import Array, Components, Draws

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


def study(
    rng: np.random.Generator, means: dict[str, float], R: int, E: int, seeds: float, cell: float, spread: float
) -> Arrangement:
    shared = rng.normal(0, 0.12, (1, E))
    arms = []
    for i, (name, mean) in enumerate(means.items()):
        mine = seeds * spread ** (i - 1)  # of four arms the widest spreads spread³ times more than the narrowest
        x_RE = scores(rng, mean, R, E, mine, 0.03, cell) + shared
        one = Scores(x_RE=x_RE, w_E=np.ones(E), seeds=tuple(range(R)), ids=tuple(map(str, range(E))))
        factors = {"placement": name, "rank": 8}
        arms.append(Arm(setting="s", label=name, factors=factors, trial={}, runs=None, scores={"nll": one}))
    setting = Setting(name="s", model="m", dataset="d", total=1e6, base=None, arms=arms)
    return Arrangement(settings=[setting], metrics=["nll"], split="test", select="validation.nll", runs=None, tuned=[])


@pytest.mark.parametrize(
    ("R", "seeds", "spread"), [(3, 0.0, 1), (3, 0.01, 1), (5, 0.03, 1), (3, 0.01, 2), (5, 0.01, 2), (3, 0.003, 4)]
)
def test_holm_keeps_false_positives_below_five_percent(R: int, seeds: float, spread: float) -> None:
    rng, runs = np.random.default_rng(22), 2000
    false = 0
    for _ in range(runs):
        found = compare.tests(study(rng, dict.fromkeys("abcd", 0.1), R, 150, seeds, 0.02, spread), draws=DRAWS)
        false += bool(found["significant"].any())
    print(f"family-wise false positives: {false / runs:.4f}")
    assert false / runs <= 0.05


def test_power_is_what_the_formula_says() -> None:
    rng, runs, parts = np.random.default_rng(23), 1500, Components(seeds=0.01**2, examples=0.15**2, cell=0.05**2)
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
