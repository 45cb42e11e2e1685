import numpy as np
import pytest
from scipy import stats as reference

from analysis import stats
from analysis.arms import Arm, Scores
from analysis.compare import _blend, detectable, power
from analysis.effects import anova
from analysis.pareto import front, hypervolume, membership
from analysis.stats import Components, Draws


@pytest.fixture(scope="module")
def draws() -> Draws:
    return Draws(4000, seed=1)


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert stats.iqm(np.array([100.0, 1, 2, 3, 4, 5, 6, -100])) == pytest.approx(np.mean([2, 3, 4, 5]))
    values = np.random.default_rng(0).normal(size=(3, 21))
    assert stats.iqm(values, axis=1) == pytest.approx(reference.trim_mean(values, 0.25, axis=1))


def test_interval_over_seeds_is_students(draws: Draws) -> None:
    values = np.array([[0.11], [0.13], [0.12], [0.16], [0.10]])
    found = stats.interval(values, draws=draws)
    low, high = reference.t.interval(0.95, 4, values.mean(), reference.sem(values[:, 0]))
    assert found.estimate == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.02)


def test_interval_of_one_seed_is_over_examples(draws: Draws) -> None:
    values = np.random.default_rng(0).normal(size=(1, 80))
    found = stats.interval(values, draws=draws)
    expected = reference.t.interval(0.95, 79, values.mean(), reference.sem(values[0]))
    assert (found.low, found.high) == pytest.approx(expected, rel=0.05)
    assert (found.seeds, found.examples) == (1, 80)


def test_interval_of_one_number_is_unknown(draws: Draws) -> None:
    found = stats.interval(np.array([[0.3]]), draws=draws)
    assert found.estimate == 0.3
    assert np.isnan(found.low)
    assert np.isnan(found.high)


def test_nll_is_weighted_by_tokens(draws: Draws) -> None:
    tokens = np.array([1.0, 3.0])
    found = stats.interval(np.array([[4.0, 0.0]]), tokens, draws=draws)
    assert found.estimate == 1.0


def test_interval_is_equivariant_and_seeded(draws: Draws) -> None:
    x_RE = np.random.default_rng(2).normal(size=(4, 50))
    one, two = stats.interval(x_RE, draws=draws), stats.interval(10 * x_RE + 3, draws=Draws(4000, seed=1))
    assert two.low == pytest.approx(10 * one.low + 3)
    assert one == stats.interval(x_RE, draws=Draws(4000, seed=1))
    drawn = [stats.interval(x_RE, draws=Draws(4000, seed=seed), statistic="iqm") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0].low != drawn[2].low


def test_combining_tasks_adds_variances(draws: Draws) -> None:
    rng = np.random.default_rng(3)
    parts = [stats.interval(rng.normal(size=(5, 40)), draws=draws) for _ in range(2)]
    both = stats.combine(parts)
    assert both.estimate == pytest.approx(np.mean([one.estimate for one in parts]))
    assert both.se == pytest.approx(np.hypot(parts[0].se, parts[1].se) / 2)
    half = [(one.high - one.low) / 2 for one in parts]
    assert (both.high - both.low) / 2 == pytest.approx(np.hypot(*half) / 2)


def test_components_are_found_again() -> None:
    rng = np.random.default_rng(4)
    seeds, examples = rng.normal(0, 0.3, (60, 1)), rng.normal(0, 1.0, (1, 400))
    found = stats.components(seeds + examples + rng.normal(0, 0.5, (60, 400)))
    assert found.seeds**0.5 == pytest.approx(0.3, rel=0.2)
    assert found.groups**0.5 == pytest.approx(1.0, rel=0.1)
    assert found.cell**0.5 == pytest.approx(0.5, rel=0.02)


def test_holm_on_a_worked_example() -> None:
    # 0.01*4, 0.02*3, 0.03*2 raised to 0.06, 0.2*1
    assert stats.holm([0.02, 0.2, 0.01, 0.03]) == pytest.approx([0.06, 0.2, 0.04, 0.06])
    assert stats.holm([0.6, np.nan, 0.7]) == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)
    assert len(stats.holm([])) == 0


def test_sign_flip_is_exact_for_few(draws: Draws) -> None:
    d = np.array([1.0, 2.0, 3.0, -0.5])
    expected = reference.permutation_test(
        (d,), lambda x, axis=-1: x.mean(axis=axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    ).pvalue
    assert stats.sign_flip(d, draws=draws) == pytest.approx(expected)


def test_sign_flip_of_many_agrees_with_t(draws: Draws) -> None:
    d = np.random.default_rng(5).normal(0.2, 1, 200)
    assert stats.sign_flip(d, draws=draws) == pytest.approx(reference.ttest_1samp(d, 0).pvalue, abs=0.01)


def test_paired_of_one_seed_is_the_t_test() -> None:
    rng = np.random.default_rng(6)
    a = rng.normal(size=(1, 150))
    b = a + rng.normal(0.1, 0.5, (1, 150))
    found = stats.paired(a, b)
    assert found.p == pytest.approx(reference.ttest_rel(b[0], a[0]).pvalue, rel=0.15)
    assert found.effect == pytest.approx((b - a).mean() / (b - a).std(ddof=1))
    assert found.share == pytest.approx((b < a).mean())
    mirrored = stats.paired(b, a)
    assert mirrored.p == found.p
    assert mirrored.difference.low == pytest.approx(-found.difference.high)


def test_p_and_interval_agree() -> None:
    rng = np.random.default_rng(7)
    for shift in (0.0, 0.05, 0.1, 0.2):
        a = rng.normal(size=(3, 60))
        found = stats.paired(a, a + rng.normal(shift, 0.4, (3, 60)))
        assert (found.p < 0.05) == (found.difference.low > 0 or found.difference.high < 0)


def test_arms_that_are_equal_do_not_differ() -> None:
    a = np.ones((3, 5))
    assert stats.paired(a, a).p == 1.0
    with pytest.raises(ValueError, match="one shape"):
        stats.paired(a, a[:2])


def test_front_and_hypervolume_on_a_drawing() -> None:
    cost, loss = np.array([1.0, 2, 3, 2, 4, 1]), np.array([5.0, 3, 1, 4, 1, 5])
    assert front(cost, loss).tolist() == [True, True, True, False, False, True]
    # gains on 6 of the best so far: 1 from cost 1 to 2, 3 from 2 to 3, 5 from 3 to 4
    assert hypervolume(cost, loss, (1.0, 4.0), 6.0) == pytest.approx((1 + 3 + 5) / 3)
    assert hypervolume(cost, loss, (2.5, 4.0), 6.0) == pytest.approx((0.5 * 3 + 5) / 1.5)
    assert hypervolume(cost, loss, (3.0, 3.0), 6.0) == 5.0
    assert hypervolume(cost, loss, (1.0, 4.0), 0.5) == 0.0
    with pytest.raises(ValueError, match=r"no arm costs at most 0\.5"):
        hypervolume(cost, loss, (0.5, 4.0), 6.0)


def test_a_cheaper_arm_alone_does_not_raise_the_hypervolume() -> None:
    window = (2.0, 4.0)
    dear = hypervolume(np.array([2.0, 4.0]), np.array([3.0, 1.0]), window, 6.0)
    assert hypervolume(np.array([1.0, 2.0, 4.0]), np.array([5.0, 3.0, 1.0]), window, 6.0) == dear


def test_membership_without_noise_is_the_front() -> None:
    rng = np.random.default_rng(8)
    cost, loss = rng.integers(0, 6, 40).astype(float), rng.integers(0, 9, 40).astype(float)
    assert membership(cost, loss[None, :]).astype(bool).tolist() == front(cost, loss).tolist()


def test_anova_of_a_balanced_table() -> None:
    import pandas as pd

    y = np.array([1.0, 2, 3, 6, 7, 8, 2, 3, 4, 9, 10, 11])
    table = pd.DataFrame({"a": list("xxxyyy") * 2, "b": ["p"] * 6 + ["q"] * 6})
    found = anova(y, table, [("a", "b")]).set_index("term")
    means = {key: y[table["a"] == key].mean() for key in "xy"}
    assert found.loc["a", "ss"] == pytest.approx(6 * sum((mean - y.mean()) ** 2 for mean in means.values()))
    assert found.loc["residual", "ss"] == pytest.approx(8.0)
    assert found["df"].to_list() == [1, 1, 1, 8]
    assert found["ss"].sum() == pytest.approx(((y - y.mean()) ** 2).sum())
    one = anova(y, table[["a"]]).set_index("term")
    assert one.loc["a", "f"] == pytest.approx(reference.f_oneway(y[table["a"] == "x"], y[table["a"] == "y"]).statistic)
    assert one.loc["a", "p"] == pytest.approx(reference.f_oneway(y[table["a"] == "x"], y[table["a"] == "y"]).pvalue)


def test_power_of_the_t_test() -> None:
    # only example noise: the one-sample t test, whose power is that of the noncentral t
    parts = Components(seeds=0.0, groups=1.0, cell=0.0)
    found = power(0.3, parts, 1, 50)
    critical = reference.t.ppf(0.975, 49)
    exact = reference.nct.sf(critical, 49, 0.3 * 50**0.5) + reference.nct.cdf(-critical, 49, 0.3 * 50**0.5)
    assert found == pytest.approx(exact, abs=2e-3)
    assert power(0.0, parts, 1, 50) == pytest.approx(0.05, abs=1e-3)


def test_power_rises_with_seeds_and_the_detectable_difference_falls() -> None:
    parts = Components(seeds=0.01, groups=0.5, cell=0.2)
    values = [power(0.2, parts, seeds, 200) for seeds in (2, 3, 5, 10, 30)]
    assert values == sorted(values)
    least = [detectable(parts, seeds, 200) for seeds in (2, 3, 5, 10, 30)]
    assert least == sorted(least, reverse=True)
    assert power(least[1], parts, 3, 200) == pytest.approx(0.8, abs=1e-3)
    assert detectable(Components(seeds=0.0, groups=0.0, cell=0.0), 3, 10) == 0.0


def test_interpolation_between_ranks_follows_a_convex_curve() -> None:
    """Three ranks of one placement; between the first two a line lies above the curve."""
    arms = []
    for parameters in (1e5, 2e5, 4e5):
        nll = 0.5 + 0.4 * np.log(parameters / 8e5) ** 2 + np.zeros((3, 5))
        one = Scores(x_RE=nll, w_E=np.ones(5), seeds=(0, 1, 2), ids=tuple("abcde"))
        arm = Arm(setting="s", label=f"{parameters:g}", factors={}, trial={}, runs=None, scores={"nll": one})
        arm.parameters = parameters  # type: ignore[misc]
        arms.append(arm)
    wanted = 0.5 + 0.4 * np.log(1.4e5 / 8e5) ** 2
    found = _blend(arms, (arms[0], arms[1]), 1.4e5, "nll")
    assert found is not None
    assert found.x_RE.mean() == pytest.approx(wanted)
    line = _blend(arms[:2], (arms[0], arms[1]), 1.4e5, "nll")
    assert line is not None
    assert line.x_RE.mean() > wanted + 0.03
