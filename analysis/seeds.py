"""Variance between seeds, pooled over the arms of a setting. Letters: A arms, R seeds.

Three seeds give a variance 2 degrees of freedom. The arms of one setting are trained alike, so each variance is shrunk
towards their mean as far as the arms agree with each other (Smyth 2004, "Linear models and empirical Bayes methods").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
UNEQUAL = 0.05  # level of the two tests of equal variances together
WIDE = 0.3  # chance that any of equal arms is taken for a wide one


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedVariance:
    """Variance of one seed's score, its degrees of freedom, and whether the arms' variances differ.

    If they do (`unequal`), an arm's or a pair's own variance is used wherever it is larger.
    """

    variance: float
    df: float
    unequal: bool


def pooled(rows_AR: Array, *, blocks: bool) -> list[SeedVariance] | None:
    """Shrunken variance between seeds of each arm; None with fewer than 3 seeds or 2 arms, or if no arm varies.

    `blocks` takes out what all arms of one seed share, which a difference of two arms does not contain. Degrees of
    freedom are of the mean eigenvalue of the arms' covariance matrix (Box 1954; tr Σ² after Bai & Saranadasa 1996), so
    that arms which move together, or one arm that varies most, do not count as many. Equality of variances is tested
    with Bartlett's test and with the largest variance against the rest (Cochran's C), Bonferroni-corrected. Three seeds
    rarely tell an arm that spreads wider from one that does not, so an arm whose variance is above k times the mean,
    the largest of equal arms' with chance `WIDE`, has at least 1/k of its own, with its own n degrees of freedom.
    """
    A, R = rows_AR.shape
    if R < 3 or A < 2:
        return None
    n = R - 1
    e_AR = rows_AR - rows_AR.mean(axis=1, keepdims=True)
    if blocks:
        e_AR = e_AR - e_AR.mean(axis=0, keepdims=True)
    free = A - 1 if blocks else A
    own_A = (e_AR**2).sum(axis=1) * A / (free * n)
    mean = float(own_A.mean())
    if not mean > (1e-12 * float(np.abs(rows_AR).max())) ** 2:
        return None
    cov_RR = e_AR.T @ e_AR / n  # has the traces of the arms' covariance
    trace, square = float(np.trace(cov_RR)), float((cov_RR**2).sum())
    square = n**2 / ((n + 2) * (n - 1)) * (square - trace**2 / n)
    df = float(np.clip(n * trace**2 / square, n, n * free)) if square > 0 else float(n * free)
    own_A = np.maximum(own_A, 1e-3 * mean)  # scores in steps (accuracies) can agree by chance
    weight = _weight(own_A, n)
    unequal = _unequal(own_A, n)
    shrunk_A = np.full(A, mean) if np.isinf(weight) else (weight * mean + n * own_A) / (weight + n)
    df = min(df, (min(weight, n) if unequal else weight) + n) if unequal else df
    floor_A = own_A / _most(A, n)
    return [
        SeedVariance(variance=float(max(shrunk, floor)), df=df if shrunk >= floor else float(n), unequal=unequal)
        for shrunk, floor in zip(shrunk_A, floor_A, strict=True)
    ]


def _most(A: int, n: int) -> float:
    """What the largest of equal arms' variances exceeds with chance `WIDE`, over their mean (Cochran's C times A)."""
    ratio = float(special.fdtri(n, n * (A - 1), 1 - WIDE / A))
    return A * ratio / (ratio + A - 1)


def _weight(own_A: Array, n: int) -> float:
    """Weight of the mean in degrees of freedom, from the spread of the logarithms (Smyth 2004, section 6.2)."""
    if len(own_A) < 3:
        return np.inf
    spread = float(np.var(np.log(own_A), ddof=1)) - float(special.polygamma(1, n / 2))
    if spread <= 0:
        return np.inf
    # trigamma falls from about 1e6 to 1e-6 between these bounds
    return 2 * float(np.exp(scipy.optimize.brentq(lambda x: special.polygamma(1, np.exp(x)) - spread, -6.9, 13.8)))


def _unequal(own_A: Array, n: int) -> bool:
    A = len(own_A)
    if A < 3:
        return False
    bartlett = n * (A * np.log(own_A.mean()) - np.log(own_A).sum()) / (1 + (A + 1) / (3 * A * n))
    largest = own_A.max() / ((own_A.sum() - own_A.max()) / (A - 1))
    p = min(special.chdtrc(A - 1, bartlett), A * special.fdtrc(n, n * (A - 1), largest))
    return bool(p < UNEQUAL / 2)


def of_difference(a: SeedVariance, b: SeedVariance) -> SeedVariance:
    """Of b − a, for arms of one family whose shared seed effects were taken out."""
    return SeedVariance(variance=a.variance + b.variance, df=min(a.df, b.df), unequal=a.unequal or b.unequal)


def of_blend(parts: Sequence[tuple[float, SeedVariance]]) -> SeedVariance:
    """Of a weighted sum of arms: (weight, variance) of each."""
    return SeedVariance(
        variance=sum(weight**2 * one.variance for weight, one in parts),
        df=min(one.df for _, one in parts), unequal=any(one.unequal for _, one in parts),
    )  # fmt: skip


def of_remainder(
    share: float, arm: tuple[SeedVariance, SeedVariance], reference: tuple[SeedVariance, SeedVariance]
) -> SeedVariance:
    """Of arm − share · reference: of each the variance in differences and that of the score. What all arms of a seed
    share is the rest of the latter, and stays with the weight 1 − share. Degrees of freedom are Satterthwaite's."""
    (a, whole_a), (b, whole_b) = arm, reference
    common = max((whole_a.variance - a.variance + whole_b.variance - b.variance) / 2, 0.0)
    # one pooled estimate, so the arms' parts add before they are squared
    own, shared = a.variance + share**2 * b.variance, (1 - share) ** 2 * common
    below = own**2 / min(a.df, b.df) + shared**2 / min(whole_a.df, whole_b.df)
    df = (own + shared) ** 2 / below
    return SeedVariance(variance=own + shared, df=df, unequal=a.unequal or b.unequal)
