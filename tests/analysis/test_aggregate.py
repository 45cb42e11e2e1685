"""Scores over several tasks: what the paper's measures say of studies with a known truth."""

import numpy as np
import pytest

from analysis import aggregate, load
from analysis.arms import Arrangement, arrange
from analysis.stats import Draws
from tests.analysis.synthetic import Truth, write_study

TASKS = ("gsm_symbolic", "icd10_chapter")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Arrangement:
    truth = Truth(placements={"attn": 0.155, "ff": 0.125, "full": 0.105}, seed_sd=0.004)
    folder = tmp_path_factory.mktemp("tasks") / "s"
    write_study(folder, truth=truth, ranks=(4, 8), datasets=TASKS, examples=80, steps=2, groups=20, group_sd=0.02)
    return arrange(load(folder))


def test_the_mean_arm_gains_one_and_the_base_model_nothing(found: Arrangement) -> None:
    (one,) = aggregate.normalised(found, "nll", draws=Draws(200))
    assert one.tasks == TASKS
    assert one.x_ATR.mean() == pytest.approx(1.0)
    better = {name: one.x_ATR[i].mean() for i, name in enumerate(one.arms)}
    assert better["full r8"] > better["ff r8"] > better["attn r8"] > better["attn r4"]


def test_the_table_has_what_the_paper_asks_for(found: Arrangement) -> None:
    table = aggregate.table(found, draws=Draws(300))
    nll = table[table["metric"] == "nll"].set_index("arm")
    assert (nll["tasks"] == 2).all()
    assert (nll["seeds"] == 3).all()
    assert nll.loc["attn r4", "improvement"] == pytest.approx(0.5)  # against itself
    assert nll.loc["full r8", "improvement"] > 0.9
    for name in ("mean", "iqm", "improvement"):
        assert ((nll[f"{name}_low"] <= nll[name]) & (nll[name] <= nll[f"{name}_high"])).all()


def test_probability_of_improvement_counts_ties_half() -> None:
    a = np.array([[1.0, 2.0], [0.0, 0.0]])
    b = np.array([[1.0, 0.0], [1.0, 1.0]])
    # first task: 1 ties 1, beats 0; 2 beats both; second: none
    assert aggregate.improvement(a, b) == pytest.approx((3.5 / 4 + 0) / 2)


def test_a_profile_falls_from_all_to_none(found: Arrangement) -> None:
    (one,) = aggregate.normalised(found, "nll", draws=Draws(200))
    shares = aggregate.profile(one, np.array([0.0, 1.0, 2.0]))
    assert (shares[shares["level"] == 0.0]["share"] == 1).all()
    assert (shares[shares["level"] == 2.0]["share"] == 0).all()
    assert shares["share"].between(shares["low"], shares["high"]).all()


def test_intervals_cover_the_mean_of_what_could_have_been_drawn() -> None:
    """One hundred replications of two tasks with two arms of a known difference, groups and seeds drawn anew."""
    rng, hits = np.random.default_rng(5), 0
    for _ in range(100):
        drawn = _simulated(rng)
        i = aggregate.table(drawn, draws=Draws(200)).set_index("arm").loc["b"]
        hits += i["mean_low"] <= 1.2 <= i["mean_high"]
    assert hits >= 88


def _simulated(rng: np.random.Generator) -> Arrangement:
    from analysis.arms import BASE, Arm, Scores, Setting

    settings = []
    for task in ("s", "t"):
        groups = np.repeat(np.arange(20), 5)
        arms = []
        for name, gain in (("a", 0.8), ("b", 1.2)):
            noise = rng.normal(0, 0.3, 20)[groups] + rng.normal(0, 0.1, (6, 100)) + rng.normal(0, 0.05, (6, 1))
            ids = tuple(map(str, range(100)))
            score = Scores(
                x_RE=3 - gain - noise, w_E=np.ones(100), seeds=tuple(range(6)), ids=ids,
                groups=tuple(map(str, groups)),
            )  # fmt: skip
            arms.append(Arm(setting=task, label=name, factors={}, trial={}, runs=None, scores={"nll": score}))
        level = Scores(x_RE=np.full((1, 1), 3.0), w_E=np.ones(1), seeds=(), ids=())
        base = Arm(setting=task, label=BASE, factors={}, trial={}, runs=None, scores={"nll": level})
        settings.append(Setting(name=task, model="m", dataset=task, total=1e6, base=base, arms=arms))
    return Arrangement(settings=settings, metrics=["nll"], split="test", select="validation.nll", runs=None, tuned=[])
