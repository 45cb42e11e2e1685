"""The whole analysis of a study as named tables, for the files, the report and the notebook."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from sweeper.record import perplexity

from . import (
    aggregate,
    blocks,
    checks,
    compare,
    conflict,
    continual,
    contrasts,
    effects,
    experts,
    gains,
    lattice,
    library,
    mixed,
    pareto,
    routing,
    scaling,
    spectra,
    stats,
    transfer,
    tuning,
)
from .arms import BASE, FULL, Arm, Arrangement, Setting, arrange, higher_is_better, main_metric
from .load import STATUSES, Study
from .stats import Draws

COSTS = (
    "train_flops", "train_seconds_solo", "peak_memory_solo_bytes", "tokens_per_second_solo", "adapter_bytes",
    "train_seconds_amortised", "train_tokens",
)  # fmt: skip


@dataclass(kw_only=True)
class Analysis:
    """A study, its arms and every table, by name."""

    study: Study
    found: Arrangement
    tables: dict[str, pd.DataFrame]
    draws: Draws
    metric: str = "nll"
    notes: list[str] = field(default_factory=list)

    @property
    def arms(self) -> pd.DataFrame:
        return self.tables["arms"]


def analyse(
    study: Study, *, metric: str | None = None, tuned: Iterable[str] = (), draws: int = 2000, seed: int = 0,
    mixed_model: bool = False,
) -> Analysis:  # fmt: skip
    """Computes every table.

    Args:
        metric: selects trials (on validation) and is shown in the main figures (on test). None: NLL, or where no run
            has it, as of those that PEFT publishes, the first score that there is.
        tuned: dotted fields besides `optim.*` that count as tuned inside an arm.
        draws, seed: of the bootstrap.
        mixed_model: whether to fit one (`analysis.mixed`), which takes seconds a setting.
    """
    if mixed_model:
        mixed.require()
    sampler = Draws(draws, seed)
    metric = main_metric(study.runs) if metric is None else metric
    found = arrange(study, tuned=tuned, metric=metric)
    tuning.judge(found)
    arms = summarise(found, draws=sampler, metric=metric)
    tables = {
        "arms": arms,
        "all_tasks": across_settings(found, draws=sampler),
        "aggregate": aggregate.table(found, draws=sampler),
        "tests": compare.tests(found, draws=sampler),
        "contrasts": contrasts.table(found, metric),
        "matched_budget": compare.matched(found, draws=sampler),
        "share_kept": compare.shares(found, draws=sampler),
        "anova": effects.placement_by_rank(found, metric),
        "slopes": effects.slopes(found, metric),
        "scaling": scaling.table(found, metric, draws=sampler),
        "transfer": transfer.table(found, draws=sampler),
        "routing": routing.table(found, draws=sampler),
        "experts": experts.table(found, draws=sampler),
        "gains": gains.table(found),
        "lattice": lattice.table(found),
        "lattice_best": lattice.best(found),
        "conflict": conflict.table(found, draws=sampler),
        "conflict_by_layer": conflict.by_layer(found, draws=sampler),
        "library": library.table(study),
        "continual": continual.table(found, draws=sampler),
        "importance": effects.importance(found, metric=metric, seed=seed),
        "power": compare.power_table(found, metric=metric),
        "hypervolume": hypervolumes(found, draws=sampler, metric=metric),
        "spectra": spectra_table(found),
        "block_spectra": blocks.table(found, draws=sampler),
        "tuned": tuning.table(found, study.note),
        "failures": failures(study),
        "checks": checks.check(study, found),
    }
    if mixed_model:
        tables["mixed"] = mixed.table(found, metric)
    return Analysis(study=study, found=found, tables=tables, draws=sampler, metric=metric, notes=notes(found))


def summarise(found: Arrangement, *, draws: Draws, metric: str = "nll") -> pd.DataFrame:
    """One row per arm, the base model of each setting first: factors, costs (medians over replicates), forgetting and
    every metric with intervals, and whether the arm is on the Pareto front of trainable parameters against `metric`,
    with its probability.
    """
    rows = []
    for setting in found.settings:
        members = _membership(setting, metric, draws)
        for arm in ([setting.base] if setting.base else []) + setting.arms:
            row: dict[str, Any] = {
                "setting": setting.name,
                "model": setting.model,
                "dataset": setting.dataset,
                "arm": arm.label,
            }
            row |= {key: value for key, value in arm.factors.items() if key not in row} | _cost_columns(setting, arm)
            row |= _forgetting(arm, draws)
            for name in found.metrics:
                row |= _estimates(found, arm, name, draws)
            row |= members.get(arm.label, {})
            row["source"] = arm.runs["source"].iloc[0] if "source" in arm.runs else "study"
            rows.append(row | {"seeds": 0 if arm.is_base else len(arm.runs)})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["setting", "arm", "placement", "rank", "seeds"])


def _cost_columns(setting: Setting, arm: Arm) -> dict[str, float]:
    row = {"trainable_parameters": arm.parameters, "trainable_percent": 100 * arm.parameters / setting.total}
    for key in COSTS:
        known = not arm.is_base and key in arm.runs
        row[key] = float(pd.to_numeric(arm.runs[key], errors="coerce").median()) if known else np.nan
    return row | _solo_seconds(arm)


def _solo_seconds(arm: Arm) -> dict[str, float]:
    """95% t interval of the seconds that a run takes alone, over repeated timings of a step: over calibrations where
    the arm's runs have several, else over the repeats of the one."""
    if arm.is_base or "step_seconds_solo" not in arm.runs:
        return {}
    timed = [one for one in arm.runs["step_seconds_solo"] if isinstance(one, list | tuple) and len(one) > 1]
    distinct = sorted({tuple(map(float, one)) for one in timed})
    values = [float(np.median(one)) for one in distinct] if len(distinct) > 1 else list(distinct[0]) if distinct else []
    if len(values) < 2:
        return {}
    steps = float(pd.to_numeric(arm.runs["steps"]).median())
    mean = float(np.mean(values))
    half = float(special.stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / len(values) ** 0.5)
    low, high = steps * max(mean - half, min(values) / 2), steps * (mean + half)
    return {"train_seconds_solo_low": low, "train_seconds_solo_high": high}


def _forgetting(arm: Arm, draws: Draws) -> dict[str, float]:
    """Mean over replicates of each measure of forgetting, with its interval over seeds; 0 for the base model."""
    row: dict[str, float] = {}
    for key in (str(column) for column in arm.runs if str(column).startswith("forgetting")):
        values = pd.to_numeric(arm.runs[key], errors="coerce").dropna().to_numpy(dtype=float)
        if arm.is_base or not len(values):
            row[key] = 0.0 if arm.is_base else np.nan
            continue
        one = stats.interval(values[:, None], draws=draws)
        row |= {key: one.estimate, f"{key}_low": one.low, f"{key}_high": one.high}
    return row


def _estimates(found: Arrangement, arm: Arm, metric: str, draws: Draws) -> dict[str, float]:
    scores = arm.scores.get(metric)
    if scores is None:
        return {}
    one = stats.interval(scores.x_RE, scores.w_E, groups=scores.groups, seed_variance=scores.seed_variance)
    robust = one
    if len(scores.x_RE) > 3:
        robust = stats.interval(scores.x_RE, scores.w_E, draws=draws, statistic="iqm", groups=scores.groups)
    low, high = one.low, one.high
    if higher_is_better(metric) and scores.x_RE.min() >= 0 and scores.x_RE.max() <= 1:
        low, high = max(low, 0.0), min(high, 1.0)
    row = {metric: one.estimate, f"{metric}_low": low, f"{metric}_high": high, f"{metric}_iqm": robust.estimate}
    row |= {f"{metric}_iqm_low": robust.low, f"{metric}_iqm_high": robust.high}
    if metric == "nll":
        row |= {"perplexity": perplexity(one.estimate)}
        row |= {f"perplexity_{side}": perplexity(value) for side, value in (("low", low), ("high", high))}
    return row


def _oriented(metric: str) -> float:
    return -1.0 if higher_is_better(metric) else 1.0


def _membership(setting: Setting, metric: str, draws: Draws) -> dict[str, dict[str, Any]]:
    arms = [arm for arm in setting.arms if metric in arm.scores and arm.parameters > 0]
    if not arms:
        return {}
    loss_BA = _oriented(metric) * stats.joint_draws(
        [(arm.scores[metric].x_RE, arm.scores[metric].w_E) for arm in arms], draws=draws,
        groups=[arm.scores[metric].groups for arm in arms],
    )  # fmt: skip
    cost = np.array([arm.parameters for arm in arms])
    means = np.array([_mean(arm, metric) for arm in arms]) * _oriented(metric)
    known = all(arm.scores[metric].x_RE.size > 1 for arm in arms)  # else a draw would be the number itself
    chances = pareto.membership(cost, loss_BA) if known else np.full(len(arms), np.nan)
    members = pareto.front(cost, means)
    return {
        arm.label: {"on_front": bool(member), "front_probability": float(chance)}
        for arm, member, chance in zip(arms, members, chances, strict=True)
    }


def _mean(arm: Arm, metric: str) -> float:
    scores = arm.scores[metric]
    return float((scores.x_RE @ scores.w_E / scores.w_E.sum()).mean())


def across_settings(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """Mean over equally weighted tasks, by model and arm, for arms that every task of the model has."""
    rows = []
    models = {setting.model for setting in found.settings}
    for model in sorted(models):
        settings = [setting for setting in found.settings if setting.model == model]
        if len(settings) < 2:
            continue
        by_label = [
            {arm.label: arm for arm in ([one.base] if one.base else []) + one.arms if arm is not None}
            for one in settings
        ]
        for label in [key for key in by_label[0] if all(key in one for one in by_label)]:
            for metric in found.metrics:
                scores = [one[label].scores.get(metric) for one in by_label]
                if any(score is None for score in scores):
                    continue
                parts = [
                    stats.interval(s.x_RE, s.w_E, groups=s.groups, seed_variance=s.seed_variance)
                    for s in scores
                    if s is not None
                ]
                one = stats.combine(parts)
                names = {"model": model, "tasks": len(settings), "arm": label, "metric": metric}
                rows.append(names | {"estimate": one.estimate, "low": one.low, "high": one.high})
    return pd.DataFrame(rows, columns=["model", "tasks", "arm", "metric", "estimate", "low", "high"])


def hypervolumes(found: Arrangement, *, draws: Draws, metric: str = "nll") -> pd.DataFrame:
    """Hypervolume of each placement's ladder of ranks: the mean gain over the base model that log10 of trainable
    parameters buys, over the window of budgets that all ladders share. Percentile interval over joint draws.
    """
    rows = []
    for setting in found.settings:
        base = setting.base
        arms = [arm for arm in setting.arms if metric in arm.scores and arm.parameters > 0]
        ladders: dict[str, list[Arm]] = {}
        for arm in arms:
            if arm.factors["placement"] != FULL:  # one budget, that of the whole model
                ladders.setdefault(str(arm.factors["placement"]), []).append(arm)
        if base is None or metric not in base.scores or not ladders:
            continue
        sign, reference = _oriented(metric), _oriented(metric) * _mean(base, metric)
        start = max(min(arm.parameters for arm in group) for group in ladders.values())
        end = max(arm.parameters for group in ladders.values() for arm in group)
        window = (float(np.log10(start)), float(np.log10(end)))
        groups = {"all": [arm for group in ladders.values() for arm in group], **ladders}
        for name, group in groups.items():
            cost = np.log10([arm.parameters for arm in group])
            drawn = sign * stats.joint_draws(
                [(arm.scores[metric].x_RE, arm.scores[metric].w_E) for arm in group], draws=draws,
                groups=[arm.scores[metric].groups for arm in group],
            )  # fmt: skip
            volumes = [pareto.hypervolume(cost, losses, window, reference) for losses in drawn[:400]]
            losses = sign * np.array([_mean(arm, metric) for arm in group])
            point = pareto.hypervolume(cost, losses, window, reference)
            known = all(arm.scores[metric].x_RE.size > 1 for arm in group)
            low, high = np.quantile(volumes, [0.025, 0.975]) if known else (np.nan, np.nan)
            row: dict[str, Any] = {"setting": setting.name, "metric": metric, "placement": name, "arms": len(group)}
            row |= {"from_parameters": start, "to_parameters": end}
            rows.append(row | {"hypervolume": point, "low": low, "high": high})
    columns = ["setting", "metric", "placement", "arms", "from_parameters", "to_parameters", "hypervolume"]
    return pd.DataFrame(rows, columns=[*columns, "low", "high"])


def spectra_table(found: Arrangement) -> pd.DataFrame:
    """One row per arm with spectra: means over replicates, and each role's share of the energy."""
    rows = []
    for arm in found.arms:
        if "update_norm" not in arm.runs or arm.runs["update_norm"].isna().all():
            continue
        runs = arm.runs[arm.runs["update_norm"].notna()]
        means = {key: float(runs[key].mean()) for key in spectra.NUMBERS}
        by_role = [key for key in runs if str(key).startswith(spectra.ENERGY)]
        shares = {key.removeprefix(spectra.ENERGY): float(runs[key].mean()) for key in by_role}
        largest = sorted(((role, share) for role, share in shares.items() if share > 0), key=lambda pair: -pair[1])
        energy = ", ".join(f"{role} {share:.0%}" for role, share in largest)
        rows.append({"setting": arm.setting, "arm": arm.label, "runs": len(runs), **means, "energy": energy})
    return pd.DataFrame(rows, columns=["setting", "arm", "runs", *spectra.NUMBERS, "energy"])


def failures(study: Study) -> pd.DataFrame:
    """Every run that did not complete and every folder that could not be read. Columns: kind, where, message."""
    rows = []
    runs = study.runs
    for status in [status for status in STATUSES if status != "completed"]:
        for row in runs[runs["status"] == status].to_dict("records"):
            error = (
                f"{row.get('error')}: {row.get('error_message')}"
                if row.get("error")
                else f"after {row.get('steps')} steps"
            )
            where = f"{row['run_id']} {row.get('placement')} r{row.get('rank')} seed={row.get('seed')}"
            rows.append({"kind": status, "where": where, "message": error})
    rows += [{"kind": one.kind, "where": one.folder, "message": one.message} for one in study.problems]
    return pd.DataFrame(rows, columns=["kind", "where", "message"])


def notes(found: Arrangement) -> list[str]:
    """What a reader needs to interpret the numbers."""
    lines = [
        f"Scores are of the {found.split} split; NLL in nats per response token; perplexity = exp(NLL).",
        "Brackets are 95% intervals over seeds and independent groups of evaluation examples, t quantiles for few.",
        "Part of any arm's gain over the base model is the format of the answers, which the base model never saw.",
        "Scores that single examples do not have, such as macro F1, have intervals over seeds only.",
        "Seconds, memory and tokens/s are of a run alone on its device (solo calibration), never shares of a pack.",
        f"{BASE}: the model before training, on the same examples.",
    ]
    if cold := int(checks.cold_memory(found.runs[found.runs["chosen"]]).sum()):
        lines.append(f"Memory of {cold} runs was measured without a warm-up (see checks): read it to tens of MiB.")
    if found.tuned:
        lines.append(f"Tuned inside each arm on {found.select}: {', '.join(found.tuned)}; reported on {found.split}.")
    return [*lines, *lattice.notes(found)]
