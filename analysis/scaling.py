"""How the score falls with rank and parameters: a straight line in log parameters, and, with four sizes or more, a
power law with a floor, each with its uncertainty from the joint bootstrap of seeds and groups."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from . import stats
from .arms import FULL, Arm, Arrangement, Setting, higher_is_better
from .stats import Array, Draws

COLUMNS = [
    "setting", "metric", "placement", "by", "sizes", "per_doubling", "low", "high", "rms_residual", "exponent",
    "exponent_low", "exponent_high", "floor", "floor_low", "floor_high",
]  # fmt: skip
LEAST_SIZES = 4
DRAWS = 200
EXPONENTS = (0.01, 4.0)
GRID, STEPS, GOLDEN = 31, 30, (5**0.5 - 1) / 2


def table(found: Arrangement, metric: str, *, draws: Draws) -> pd.DataFrame:
    """One row per setting, placement and measure of size (`rank`, `parameters`).

    `per_doubling` is the change of the score when the size doubles. The power law score = floor + scale ·
    size^-exponent is fitted to four sizes or more; its interval is that of the draws it could be fitted to, empty where
    fewer than half could. A ladder holds arms that differ in rank alone.
    """
    rows = []
    for setting in found.settings:
        for placement, arms in _ladders(setting, metric).items():
            scores = [(arm.scores[metric].x_RE, arm.scores[metric].w_E) for arm in arms]
            groups = [arm.scores[metric].groups for arm in arms]
            drawn_BA = stats.joint_draws(scores, draws=draws, groups=groups)
            mean_A = np.array([float((x_RE @ w_E / w_E.sum()).mean()) for x_RE, w_E in scores])
            known = all(x_RE.size > 1 for x_RE, _ in scores)
            for by, size_A in (
                ("rank", [arm.factors["rank"] for arm in arms]),
                ("parameters", [a.parameters for a in arms]),
            ):
                row: dict[str, Any] = {"setting": setting.name, "metric": metric, "placement": placement, "by": by}
                row |= {"sizes": len(arms), **_line(np.log2(np.array(size_A, dtype=float)), mean_A, drawn_BA, known)}
                if len(arms) >= LEAST_SIZES:
                    sign = -1.0 if higher_is_better(metric) else 1.0
                    row |= _law(np.array(size_A, dtype=float), sign * mean_A, sign * drawn_BA[:DRAWS], sign)
                rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def _ladders(setting: Setting, metric: str) -> dict[str, list[Arm]]:
    """Arms with a rank, by what else tells them apart; of two sizes or more."""
    ranked = [arm for arm in setting.arms if metric in arm.scores and not pd.isna(arm.factors["rank"])]
    ranked = [arm for arm in ranked if arm.factors["placement"] != FULL]
    vary = [key for key in (ranked[0].factors if ranked else []) if key not in ("rank", "alpha", "placement")]
    vary = [key for key in vary if len({str(arm.factors[key]) for arm in ranked}) > 1]
    found: dict[str, list[Arm]] = {}
    for arm in ranked:
        name = " ".join([str(arm.factors["placement"]), *(str(arm.factors[key]) for key in vary)])
        found.setdefault(name, []).append(arm)
    ladders = {name: sorted(arms, key=lambda arm: arm.factors["rank"]) for name, arms in found.items()}
    return {name: arms for name, arms in ladders.items() if len({arm.factors["rank"] for arm in arms}) > 1}


def _line(x_A: Array, mean_A: Array, drawn_BA: Array, known: bool) -> dict[str, float]:
    centered_A = x_A - x_A.mean()
    weights_A = centered_A / (centered_A @ centered_A)
    slope = float(mean_A @ weights_A)
    rest = mean_A - mean_A.mean() - slope * centered_A
    low, high = np.quantile(drawn_BA @ weights_A, [0.025, 0.975]) if known else (np.nan, np.nan)
    return {"per_doubling": slope, "low": low, "high": high, "rms_residual": float(np.sqrt((rest**2).mean()))}


def _law(size_A: Array, mean_A: Array, drawn_BA: Array, sign: float) -> dict[str, float]:
    floor_B, exponent_B = fits(size_A, np.vstack([mean_A, drawn_BA]))
    if np.isnan(exponent_B[0]):
        return {}
    row = {"exponent": float(exponent_B[0]), "floor": sign * float(floor_B[0])}
    drawn = ~np.isnan(exponent_B[1:])
    if 2 * drawn.sum() >= len(drawn):
        for name, values in (("exponent", exponent_B[1:][drawn]), ("floor", sign * floor_B[1:][drawn])):
            row[f"{name}_low"], row[f"{name}_high"] = np.quantile(values, [0.025, 0.975])
    return row


def fit(size_A: Sequence[float] | Array, loss_A: Sequence[float] | Array) -> tuple[float, float] | None:
    """Floor and exponent of loss = floor + scale · (size / smallest)^-exponent, least squares; None where the best
    exponent is at the edge of `EXPONENTS`, so that the data do not tell a floor from a straight line or from none."""
    floor_B, exponent_B = fits(np.asarray(size_A, dtype=float), np.asarray(loss_A, dtype=float)[None])
    return None if np.isnan(exponent_B[0]) else (float(floor_B[0]), float(exponent_B[0]))


def fits(size_A: Array, loss_BA: Array) -> tuple[Array, Array]:
    """`fit` of many losses at once: floors and exponents, NaN where there is none."""
    x_A = size_A / size_A.min()
    edges_K = np.linspace(math.log(EXPONENTS[0]), math.log(EXPONENTS[1]), GRID)
    rests_KB = np.array([_solved(x_A, loss_BA, np.full(len(loss_BA), log))[0] for log in edges_K])
    best_B = np.clip(rests_KB.argmin(axis=0), 1, GRID - 2)
    low_B, high_B = edges_K[best_B - 1], edges_K[best_B + 1]
    for _ in range(STEPS):  # golden sections of all intervals at once
        left_B, right_B = high_B - GOLDEN * (high_B - low_B), low_B + GOLDEN * (high_B - low_B)
        is_left_B = _solved(x_A, loss_BA, left_B)[0] < _solved(x_A, loss_BA, right_B)[0]
        low_B, high_B = np.where(is_left_B, low_B, left_B), np.where(is_left_B, right_B, high_B)
    _, scale_B, floor_B = _solved(x_A, loss_BA, (low_B + high_B) / 2)
    exponent_B = np.exp((low_B + high_B) / 2)
    known_B = (EXPONENTS[0] * 1.1 < exponent_B) & (exponent_B < EXPONENTS[1] / 1.1) & (scale_B > 0)
    return np.where(known_B, floor_B, np.nan), np.where(known_B, exponent_B, np.nan)


def _solved(x_A: Array, loss_BA: Array, log_B: Array) -> tuple[Array, Array, Array]:
    """Residual sum of squares, scale and floor of the best line in size^-exponent, for a log exponent each."""
    power_BA = x_A ** -np.exp(log_B)[:, None]
    u_BA = power_BA - power_BA.mean(axis=1, keepdims=True)
    v_BA = loss_BA - loss_BA.mean(axis=1, keepdims=True)
    scale_B = (u_BA * v_BA).sum(axis=1) / (u_BA**2).sum(axis=1)
    rest_BA = v_BA - scale_B[:, None] * u_BA
    return (rest_BA**2).sum(axis=1), scale_B, loss_BA.mean(axis=1) - scale_B * power_BA.mean(axis=1)
