"""The engine's variances, floors and exact intervals against hand arithmetic and other libraries."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize
from scipy import stats as reference

from analysis import compare, seeds, stats
from analysis.arms import Arm, Scores
from analysis.compare import detectable
from analysis.seeds import SeedVariance
from analysis.stats import Components
from benchmarks import simulation


def ids(counts: list[int]) -> list[str]:
    return [f"g{i}" for i, count in enumerate(counts) for _ in range(count)]


# -- variance between seeds


def test_variance_of_two_arms_is_pooled_as_by_hand() -> None:
    """Variances 1 and 4 over three seeds; both arms move alike, so the 4 degrees of freedom are no fewer by chance."""
    rows_AR = np.array([[1.0, 2, 3], [2, 4, 6]])
    own = seeds.pooled(rows_AR, blocks=False)
    assert own is not None
    assert [one.variance for one in own] == pytest.approx([2.5, 2.5])
    assert [one.df for one in own] == pytest.approx([4, 4])
    contrast = seeds.pooled(rows_AR, blocks=True)
    assert contrast is not None
    # the difference is 1, 2, 3: variance 1, and with two arms no other seeds to learn from
    both = seeds.of_difference(*contrast)
    assert (both.variance, both.df) == pytest.approx((1.0, 2.0))


def test_variance_of_many_arms_is_the_residual_mean_square() -> None:
    """Shrinkage moves the arms' variances towards their mean and leaves the mean: the two-way table's MS residual."""
    rows_AR = np.random.default_rng(1).normal(size=(6, 5)) + np.arange(5)  # what a seed adds to all arms is no noise
    found = seeds.pooled(rows_AR, blocks=True)
    assert found is not None
    assert not any(one.unequal for one in found)
    rest = rows_AR - rows_AR.mean(axis=0) - rows_AR.mean(axis=1, keepdims=True) + rows_AR.mean()
    assert np.mean([one.variance for one in found]) == pytest.approx((rest**2).sum() / (5 * 4))
    assert all(4 <= one.df <= 20 for one in found)


def test_arms_that_move_together_do_not_count_as_many() -> None:
    """Six arms of four degrees of freedom each, all of one shape: tr² Σ / tr Σ² is 1, which Bai & Saranadasa's estimate
    makes (n + 2)/n of; independent arms would have 24."""
    one = np.array([[0.0, 1, 5, 2, 7]])
    found = seeds.pooled(np.repeat(one, 6, axis=0) + np.arange(6)[:, None], blocks=False)
    assert found is not None
    assert found[0].df == pytest.approx(6)
    assert found[0].variance == pytest.approx(np.var(one, ddof=1))


def test_an_arm_known_to_spread_wider_keeps_its_own_variance() -> None:
    rows_AR = np.array([[0.0, 8, -8, 9, -9], *[[0.1 * (-1) ** (i + j) * (1 + j) for j in range(5)] for i in range(3)]])
    found = seeds.pooled(rows_AR, blocks=False)
    assert found is not None
    assert all(one.unequal for one in found)
    tested = stats.interval(rows_AR[:1].T, seed_variance=found[0])
    assert tested.terms == ((pytest.approx(np.var(rows_AR[0], ddof=1) / 5), 4.0),)


def test_an_arm_that_may_spread_wider_has_a_share_of_its_own_variance() -> None:
    """Own variances 9, 1, 1, 1 over three seeds: no test tells them apart. Equal arms' largest is 2.43 times their mean
    with chance 30% at most: 4 · P(F(2, 6) > f) = 0.3 at f = 4.64, and 4f / (f + 3) = 2.43."""
    shape = np.array([[-1.0, 0, 1], [1, 0, -1], [0, 1, -1], [1, -1, 0]])
    found = seeds.pooled(shape * np.array([[3.0], [1], [1], [1]]), blocks=False)
    assert found is not None
    assert not any(one.unequal for one in found)
    ratio = optimize.brentq(lambda f: 4 * reference.f.sf(f, 2, 6) - seeds.WIDE, 0.1, 100)
    assert found[0].variance == pytest.approx(9 / (4 * ratio / (ratio + 3)))
    assert found[0].df == 2
    assert found[1].variance == pytest.approx(3)
    assert found[1].df > 2


def test_two_seeds_one_arm_or_no_variance_are_not_pooled() -> None:
    rng = np.random.default_rng(2)
    assert seeds.pooled(rng.normal(size=(4, 2)), blocks=True) is None
    assert seeds.pooled(rng.normal(size=(1, 5)), blocks=False) is None
    assert seeds.pooled(np.ones((4, 5)), blocks=True) is None


def test_what_a_share_leaves_is_the_difference_at_1_and_the_arm_at_0() -> None:
    contrast = [SeedVariance(variance=v, df=6, unequal=False) for v in (1.0, 2.0)]
    whole = [SeedVariance(variance=v, df=4, unequal=False) for v in (4.0, 5.0)]
    at_one = seeds.of_remainder(1.0, *zip(contrast, whole, strict=True))
    assert at_one.variance == pytest.approx(seeds.of_difference(*contrast).variance)
    at_zero = seeds.of_remainder(0.0, *zip(contrast, whole, strict=True))
    assert at_zero.variance == pytest.approx(whole[0].variance)
    assert at_zero.df >= 4


def test_the_share_kept_is_covered_and_has_the_pooled_variance() -> None:
    """Four arms, three seeds that all share an effect; the second arm keeps 0.9 of the first one's gain of 1."""
    rng, hits, widths = np.random.default_rng(7), 0, {"pooled": 0.0, "own": 0.0}
    cell = simulation.Cell(name="share", seed_sd=(0.02,), groups=20, each=3)
    base = Scores(x_RE=np.ones((1, 60)), w_E=np.ones(60), seeds=(), ids=tuple(map(str, range(60))))
    for _ in range(400):
        x_ARE = simulation.draw(cell, rng) + rng.normal(0, 0.02, (1, 3, 1))
        x_ARE[1] += 0.1
        found = simulation.arrangement(cell, x_ARE, np.ones(60)).settings[0]
        base.groups = found.arms[0].scores["score"].groups
        found.base = Arm(setting="s", label="base", factors={}, trial={}, runs=pd.DataFrame(), scores={"score": base})
        kept = compare.kept(found, found.arms[1], found.arms[0], "score")
        assert kept is not None
        hits += kept["low"] <= 0.9 <= kept["high"]
        widths["pooled"] += kept["high"] - kept["low"]
        for arm in found.arms:
            arm.scores["score"].seed_variance = arm.scores["score"].contrast_variance = None
        alone = compare.kept(found, found.arms[1], found.arms[0], "score")
        assert alone is not None
        widths["own"] += alone["high"] - alone["low"]
    assert hits >= 0.93 * 400
    assert widths["pooled"] < 0.75 * widths["own"]


# -- variance between groups


@pytest.mark.parametrize("weighted", [False, True])
def test_variance_of_equal_groups_is_the_cluster_robust_one(weighted: bool) -> None:
    """CR1 of statsmodels, which corrects by G/(G−1), is ours where the groups weigh the same."""
    linear = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(3)
    weights = np.tile([1.0, 2, 4, 1], 12) if weighted else np.ones(48)
    groups = np.repeat(np.arange(12), 4)
    x_E = rng.normal(size=48) + rng.normal(size=12)[groups]
    found = stats.interval(x_E[None], weights, groups=[str(one) for one in groups])
    fitted = linear.WLS(x_E, np.ones(48), weights=weights).fit(cov_type="cluster", cov_kwds={"groups": groups})
    assert found.estimate == pytest.approx(fitted.params[0])
    assert found.se == pytest.approx(fitted.bse[0])
    low, high = reference.t.interval(0.95, 11, found.estimate, found.se)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_variance_of_unequal_groups_is_unbiased() -> None:
    """A quadratic form of the groups' means, whose expectation under variance 1 is its trace: that of the mean."""
    counts = [1, 2, 3, 5, 13]
    share = np.array(counts) / sum(counts)
    trace = 0.0
    for i in range(len(counts)):
        x_E = np.repeat(np.eye(len(counts))[i], counts) * 2 + 3  # 2, so that no score looks like a 0/1 one
        trace += stats.interval(x_E[None], groups=ids(counts)).se ** 2 / 4
    assert trace == pytest.approx((share**2).sum())


def test_groups_of_one_are_examples() -> None:
    x_RE = np.random.default_rng(4).normal(size=(3, 30))
    assert stats.interval(x_RE, groups=[f"{i}" for i in range(30)]) == stats.interval(x_RE)


def test_a_repeated_example_adds_nothing() -> None:
    """Every example five times, in groups: the interval of the single ones. Without groups it is too narrow."""
    x_RE = np.random.default_rng(5).normal(size=(3, 20))
    repeated = np.repeat(x_RE, 5, axis=1)
    found, once = stats.interval(repeated, groups=ids([5] * 20)), stats.interval(x_RE)
    assert (found.low, found.high) == pytest.approx((once.low, once.high))
    assert stats.interval(repeated[:1]).se < 0.5 * stats.interval(x_RE[:1]).se


# -- floors


def test_p_is_never_0() -> None:
    rng = np.random.default_rng(6)
    a = rng.normal(size=(5, 100))
    far = stats.paired(a, a + 1e3 + rng.normal(0, 1e-6, (5, 100)))
    assert 0 < far.p <= 1e-12
    same = stats.paired(a, a + 0.25)  # no variance is seen, which is not to be sure
    assert np.isnan(same.p)
    assert np.isnan(same.difference.low)
    wrong, right = np.zeros((3, 40)), np.ones((3, 40))
    assert 0 < stats.paired(wrong, right).p < 1e-3


@pytest.mark.parametrize("score", [0.0, 1.0])
@pytest.mark.parametrize("groups", [(), tuple(ids([4] * 10))])
def test_scores_that_are_all_0_or_1_have_an_interval(score: float, groups: tuple[str, ...]) -> None:
    found = stats.interval(np.full((3, 40), score), groups=groups)
    assert found.high - found.low > 0.05
    assert found.low <= score <= found.high


def test_an_arm_whose_seeds_agree_by_chance_has_a_variance() -> None:
    rows_AR = np.array([[0.5, 0.5, 0.5], [0.4, 0.5, 0.6], [0.3, 0.5, 0.4]])
    found = seeds.pooled(rows_AR, blocks=False)
    assert found is not None
    assert all(one.variance > 0 for one in found)


# -- exact intervals


def exact(p: float, size: float) -> tuple[float, float]:
    hits = p * size
    low = reference.beta.ppf(0.025, hits, size - hits + 1) if hits else 0.0
    return low, reference.beta.ppf(0.975, hits + 1, size - hits)


def test_no_hit_in_few_groups_is_clopper_pearsons_at_the_groups_number() -> None:
    """10 groups, made smaller by the squared ratio of the normal to the t quantile with 9 degrees of freedom."""
    found = stats.interval(np.zeros((1, 40)), groups=ids([4] * 10))
    size = 10 * (reference.norm.ppf(0.975) / reference.t.ppf(0.975, 9)) ** 2
    assert (found.low, found.high) == pytest.approx(exact(0.0, size))


def test_hits_in_one_group_count_once_and_hits_in_many_by_their_variance() -> None:
    shrink = (reference.norm.ppf(0.975) / reference.t.ppf(0.975, 9)) ** 2
    one = np.zeros((1, 40))
    one[0, :2] = 1  # both of the first group: the variance over groups says 19 examples, no more than 10 are allowed
    found = stats.interval(one, groups=ids([4] * 10))
    assert (found.low, found.high) == pytest.approx(exact(0.05, 10 * shrink))
    many = np.zeros((1, 40))
    many[0, [0, 4, 8, 12, 13]] = 1  # four groups
    p_G = many.reshape(10, 4).mean(axis=1)
    size = p_G.mean() * (1 - p_G.mean()) / (p_G.var(ddof=1) / 10)
    assert 10 < size < 40
    found = stats.interval(many, groups=ids([4] * 10))
    assert (found.low, found.high) == pytest.approx(exact(p_G.mean(), size * shrink))


# -- smallest detectable difference


@pytest.mark.parametrize(("parts", "size", "df"), [((0.0, 1.0, 0.0), (1, 30), 29), ((1.0, 0.0, 0.0), (5, 1), 4)])
def test_the_detectable_difference_is_the_t_tests(
    parts: tuple[float, float, float], size: tuple[int, int], df: int
) -> None:
    """Of groups alone and of seeds alone: where the noncentral t has a power of 80%."""
    n = df + 1
    critical = reference.t.ppf(0.975, df)

    def power(difference: float) -> float:
        shift = difference * n**0.5
        return float(reference.nct.sf(critical, df, shift) + reference.nct.cdf(-critical, df, shift))

    expected = optimize.brentq(lambda difference: power(difference) - 0.8, 0.01, 10)
    seeds_, groups, cell = parts
    found = detectable(Components(seeds=seeds_, groups=groups, cell=cell), *size)
    assert found == pytest.approx(expected, rel=2e-3)
