"""Groups runs into arms: replicates together, hyperparameters tuned inside an arm selected on validation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .load import GROUPS, Problem, Study
from .seeds import SeedVariance, of_difference, pooled
from .stats import Array
from .together import CHOSEN

SETTING = ("model", "dataset")
ALWAYS = ("method", "placement", "allocation", "rank")
TUNED = ("optim.",)
BASE = "base model"
FULL = "full fine-tuning"
FULL_METHODS = ("full_ft", "full-finetuning", "full_finetuning")
UNRANKED = ("bitfit", *FULL_METHODS)  # methods that have no rank and no alpha, whatever the run's fields say
SELECT = "select"  # column of the score that trials are chosen by
NOT_METRICS = ("perplexity", "perplexity_stated", "tokens", "examples")


@dataclass(kw_only=True)
class Scores:
    """x_RE with example weights w_E, the seeds of its rows and the ids of its columns. Without per-example scores there
    is one column and `ids` is empty.

    `groups` has one entry a column: examples of one group (template, document, …) are not independent; () where each
    example is on its own. The seed variances are pooled over the arms of the setting that have the same seeds:
    `seed_variance` of the score itself, `contrast_variance` of its part in a difference of two such arms."""

    x_RE: Array
    w_E: Array
    seeds: tuple[Any, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...] = ()
    seed_variance: SeedVariance | None = None
    contrast_variance: SeedVariance | None = None

    @property
    def units(self) -> int:
        """Independent groups of examples."""
        return len(set(self.groups)) if self.groups else len(self.ids)


class Aligned(NamedTuple):
    """Two arms' scores on shared seeds and examples, with the weights and groups of the examples."""

    a_RE: Array
    b_RE: Array
    w_E: Array
    groups: tuple[str, ...]
    seed_variance: SeedVariance | None


@dataclass(kw_only=True)
class Arm:
    """A cell of the grid with its selected trial. `factors` distinguish it from other arms of its setting; `trial`
    holds the selected values; `runs` are the completed replicates of that trial, or its reruns on fresh seeds
    (`confirmed`); `tried` counts the trials; `search_doubts` are what its trials say against the choice."""

    setting: str
    label: str
    factors: dict[str, Any]
    trial: dict[str, Any]
    runs: pd.DataFrame
    tried: int = 1
    confirmed: bool = False
    edges: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    incomplete: int = 0
    search_doubts: list[str] = field(default_factory=list)

    @property
    def is_base(self) -> bool:
        return self.label == BASE

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the choice of hyperparameters may not be the arm's best, or its score flatters it; none if not tuned."""
        found = [f"{key.split('.')[-1]} {side}" for key, side in self.edges.items()]
        if self.tried > 1 and not self.confirmed:
            found.append("not confirmed on fresh seeds")
        return (*found, *self.search_doubts)

    @cached_property
    def roles(self) -> frozenset[str]:
        """Roles of the modules that it adapts; empty where they are chosen otherwise."""
        value = self.runs["placement.roles"].iloc[0] if "placement.roles" in self.runs else None
        return frozenset(value.split(",")) if isinstance(value, str) and value else frozenset()

    @cached_property
    def parameters(self) -> float:
        """Trainable parameters; 0 for the base model."""
        return 0.0 if self.is_base else float(self.runs["trainable_parameters"].median())


@dataclass(kw_only=True)
class Setting:
    """What is compared: one base model on one dataset. `total` are its parameters."""

    name: str
    model: str
    dataset: str
    total: float
    base: Arm | None
    arms: list[Arm]


@dataclass(kw_only=True)
class Arrangement:
    """All settings; `split` is the one that is reported, `select` the one that trials are chosen on."""

    settings: list[Setting]
    metrics: list[str]
    split: str
    select: str
    runs: pd.DataFrame
    tuned: list[str]

    @property
    def arms(self) -> list[Arm]:
        return [arm for setting in self.settings for arm in setting.arms]


def higher_is_better(metric: str) -> bool:
    """False for NLL, perplexity, loss, forgetting and the divergence from the base; True for task metrics."""
    return metric != "kl" and not any(word in metric for word in ("nll", "perplexity", "loss", "forgetting"))


def varying(runs: pd.DataFrame, fields: Sequence[str]) -> list[str]:
    """Fields that vary between runs of one model and dataset (or are those), and are not determined by the option
    chosen for their group (alpha: by rank). A field that only one source of runs has does not count as varying.
    """
    if runs.empty:
        return []
    known = [key for key in fields if key in runs]
    groups = runs[known].groupby([runs[key].astype(str).rename(f"_{key}") for key in SETTING])
    counts = groups.nunique(dropna=False).max()
    differing = [key for key in known if counts[key] > 1 or (key in SETTING and runs[key].nunique() > 1)]

    def follows(key: str) -> bool:
        leader = "rank" if key == "alpha" else key.split(".")[0]
        if leader == key or leader not in differing or leader not in (*GROUPS, "rank"):
            return False
        return bool((runs.groupby(leader, dropna=False)[key].nunique(dropna=False) <= 1).all())

    return [key for key in differing if not follows(key)]


def kinds(arms: pd.DataFrame) -> pd.Series:
    """What distinguishes trained arms besides rank: placement, method, or both, whichever vary, and the allocation
    where arms would otherwise be ambiguous; full fine-tuning is a kind of its own. A kind has the same look in all
    figures and the report.
    """
    whole = arms["placement"] == FULL  # of which the placement is that of no adapter
    found = arms["placement"]
    if arms.loc[~whole, "method"].nunique() > 1:
        both = arms["placement"].nunique() - whole.any() > 1
        found = found + " " + arms["method"] if both else arms["method"]
    alike = pd.DataFrame({"setting": arms["setting"], "kind": found, "rank": arms["rank"]}).duplicated()
    if "allocation" in arms and (alike & ~whole).any() and arms["allocation"].nunique() > 1:
        found = found + " " + arms["allocation"].fillna("")
    return arms["placement"].where(whole, found.str.strip())


def arrange(study: Study, *, tuned: Iterable[str] = (), metric: str = "nll") -> Arrangement:
    """Groups completed runs into settings and arms, selects each arm's trial and reads its per-example scores.

    A trial is selected by its mean `metric` on validation among the trials with the most completed replicates, and
    reported on test. If the best trial was rerun on fresh seeds, only those runs count. Runs that did not complete
    never enter a mean; the tables count them.

    Raises:
        ValueError: no run has `metric`, or a field of `tuned`.
    """
    runs = study.runs.copy()
    full, unranked = runs["method"].isin(FULL_METHODS), runs["method"].isin(UNRANKED)
    runs["rank"] = pd.to_numeric(runs["rank"]).mask(unranked)
    if "alpha" in runs:
        runs["alpha"] = runs["alpha"].mask(unranked)
    runs["placement"] = runs["placement"].mask(full, FULL)  # it has no LoRA placement
    split = reported_split(runs)
    fields = [key for key in _told_apart_by(runs, study.fields) if not key.startswith("evaluation") and key != "seed"]
    tuned = list(tuned)
    for key in tuned:
        if key not in study.fields:
            raise ValueError(f"--tuned {key}: no such field. Of this study vary {', '.join(fields) or 'none'}.")
    select = f"validation.{metric}"
    if select in runs:  # a run of several tasks is chosen as a whole
        whole = runs.get(f"{CHOSEN}{select}")
        runs[SELECT] = runs[select] if whole is None else whole.fillna(runs[select])
    listed = runs["search.tuned"].dropna() if "search.tuned" in runs else ()
    searched = {key for keys in listed for key in str(keys).split(",")}  # lists are text there
    chosen_inside = [key for key in fields if key.startswith(TUNED) or key in {*tuned, *searched}]
    setting_fields = [*SETTING, *(k for k in fields if k.split(".")[0] in SETTING and k not in SETTING)]
    arm_fields = [*ALWAYS, *(k for k in fields if k not in (*setting_fields, *chosen_inside, *ALWAYS))]
    apart = [key for key in arm_fields if key not in searched]
    for keys, name in ((setting_fields, "setting"), (apart, "arm"), (chosen_inside, "trial")):
        runs[name] = _labels(runs, keys, fields if name != "trial" else keys)
    runs["chosen"] = False
    found = Arrangement(
        settings=[], metrics=_metrics(runs, split), split=split, select=select, runs=runs,
        tuned=chosen_inside,
    )  # fmt: skip
    if found.metrics and metric not in found.metrics:
        raise ValueError(f"metric {metric}: no such score. Choose from {', '.join(found.metrics)}.")
    for name, rows in runs.groupby("setting", sort=True):
        arms = [
            arm
            for label, group in rows.groupby("arm", sort=False)
            if (arm := _arm(study, found, str(name), str(label), group, arm_fields)) is not None
        ]
        arms.sort(key=lambda arm: tuple(_sortable(arm.factors[key]) for key in arm_fields))
        for arm in arms:
            arm.scores = _scores(study, found, arm)
        share_variances(arms)
        total = rows["total_parameters"].max()
        base = _base(study, found, str(name), rows)
        found.settings.append(
            Setting(
                name=str(name), model=str(rows["model"].iloc[0]), dataset=str(rows["dataset"].iloc[0]),
                total=float(total), base=base, arms=arms,
            )
        )  # fmt: skip
    return found


def _told_apart_by(runs: pd.DataFrame, fields: Sequence[str]) -> list[str]:
    """Fields that tell arms apart. Imported runs have names for that, so they change no name of ours beside them."""
    named = runs["experiment"].notna() if "experiment" in runs else pd.Series(False, index=runs.index)
    if not named.any():
        return varying(runs, fields)
    found = varying(runs[~named] if not named.all() else runs, fields)
    several = [key for key in SETTING if runs[key].nunique() > 1]
    return list(dict.fromkeys([*several, "experiment", *found]))


def reported_split(runs: pd.DataFrame) -> str:
    """The split whose scores are reported: test, or validation where no run has a score on test."""
    return "test" if _metrics(runs, "test") else "validation"


def main_metric(runs: pd.DataFrame) -> str:
    """What the main figures show where nobody says: NLL where runs have it, else the first score that they have."""
    known = _metrics(runs, reported_split(runs))
    return "nll" if "nll" in known or not known else known[0]


def share_variances(arms: Sequence[Arm]) -> None:
    """Pools the variance between seeds over the arms of one setting, by metric and set of seeds."""
    for metric in dict.fromkeys(metric for arm in arms for metric in arm.scores):
        pool([arm.scores[metric] for arm in arms if metric in arm.scores])


def pool(scores: Sequence[Scores]) -> None:
    """Sets the pooled variances between seeds of scores of one metric, over those of the same seeds."""
    families: dict[tuple[Any, ...], list[Scores]] = {}
    for one in scores:
        families.setdefault(one.seeds, []).append(one)
    for family in families.values():
        rows_AR = np.stack([one.x_RE @ one.w_E / one.w_E.sum() for one in family])
        own, contrast = pooled(rows_AR, blocks=False), pooled(rows_AR, blocks=True)
        for i, one in enumerate(family):
            one.seed_variance = own[i] if own is not None else None
            one.contrast_variance = contrast[i] if contrast is not None else None


def aligned(a: Scores, b: Scores) -> Aligned | None:
    """Both score matrices on their shared seeds and examples; None if they share none.

    Scores without seeds (the base model) are paired with every seed of the other.
    """
    if bool(a.ids) != bool(b.ids):
        return None
    if a.ids == b.ids and a.seeds and a.seeds == b.seeds:  # as nearly all arms of a grid
        return Aligned(a.x_RE, b.x_RE, a.w_E, a.groups or b.groups, _of_contrast(a, b))
    if a.ids == b.ids:
        columns_a = columns_b = np.arange(len(a.w_E))
    else:
        place = {name: i for i, name in enumerate(b.ids)}
        columns_a = np.array([i for i, name in enumerate(a.ids) if name in place], dtype=int)
        columns_b = np.array([place[a.ids[i]] for i in columns_a], dtype=int)
    if not len(columns_a):
        return None
    seeds = [seed for seed in a.seeds if seed in b.seeds] if a.seeds and b.seeds else list(a.seeds or b.seeds)
    if not seeds and a.seeds:
        return None

    def rows(scores: Scores) -> Array:
        place = {seed: i for i, seed in enumerate(scores.seeds)}
        picks = [place[seed] for seed in seeds] if scores.seeds else [0] * max(len(seeds), 1)
        return scores.x_RE[picks]

    variance = None
    if not a.seeds or not b.seeds:
        variance = (a if a.seeds else b).seed_variance
    elif a.seeds == b.seeds:
        variance = _of_contrast(a, b)
    groups, columns = (a.groups, columns_a) if a.groups else (b.groups, columns_b)
    named = tuple(groups[i] for i in columns) if groups else ()
    return Aligned(rows(a)[:, columns_a], rows(b)[:, columns_b], a.w_E[columns_a], named, variance)


def _of_contrast(a: Scores, b: Scores) -> SeedVariance | None:
    known = a.contrast_variance is not None and b.contrast_variance is not None
    return of_difference(a.contrast_variance, b.contrast_variance) if known else None  # type: ignore[arg-type]


def _labels(runs: pd.DataFrame, keys: Sequence[str], shown: Sequence[str]) -> pd.Series:
    """A short name per row, unique to the values of `keys`: those that vary, or model and dataset if none do."""
    if not keys:
        return pd.Series("", index=runs.index)
    distinct = runs[list(keys)].drop_duplicates()
    texts = []
    for values in distinct.to_dict("records"):
        if "experiment" in shown and "experiment" in keys and not pd.isna(values["experiment"]):
            words = [str(values["experiment"])]
        elif "placement" in keys:
            rank = "" if pd.isna(values.get("rank")) else f" r{values['rank']:g}"
            head = "" if pd.isna(values["placement"]) else f"{values['placement']}{rank}"
            groups = [k for k in ("method", "allocation") if k in shown and values["placement"] != FULL]
            words = [head, *(str(values[k]) for k in groups if not pd.isna(values[k]))]
            words += [_word(k, values[k]) for k in keys if k in shown and k not in ALWAYS and not pd.isna(values[k])]
        elif "dataset" in keys:
            words = [str(values[k]) for k in SETTING if k in shown] or [str(values["dataset"])]
            words += [_word(k, values[k]) for k in keys if k not in SETTING and not pd.isna(values[k])]
        else:
            words = [_word(k, v) for k, v in values.items()]
        texts.append(" ".join(word for word in words if word) or "run")
    for text in {text for text in texts if texts.count(text) > 1}:  # one name for several experiments
        for i, values in enumerate(distinct.to_dict("records")):
            if texts[i] == text:
                more = [_word(k, values[k]) for k in keys if k != "experiment" and not pd.isna(values[k])]
                texts[i] = " ".join([text, *more])
    keyed = distinct.assign(_text=texts)
    return runs[list(keys)].merge(keyed, on=list(keys), how="left")["_text"].set_axis(runs.index)


def _word(key: str, value: Any) -> str:
    return f"{key.split('.')[-1]}={value:g}" if isinstance(value, float) else f"{key.split('.')[-1]}={value}"


def _sortable(value: Any) -> tuple[int, float, str]:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return (2, 0.0, "")
    return (0, float(value), "") if isinstance(value, int | float | np.number) else (1, 0.0, str(value))


def _metrics(runs: pd.DataFrame, split: str) -> list[str]:
    names = [column.removeprefix(f"{split}.") for column in runs if column.startswith(f"{split}.")]
    found = [name for name in names if "." not in name and name not in NOT_METRICS]
    columns = {name: runs[f"{split}.{name}"] for name in found}
    return [name for name, one in columns.items() if pd.api.types.is_numeric_dtype(one) and one.notna().any()]


def _arm(
    study: Study, found: Arrangement, setting: str, label: str, rows: pd.DataFrame, fields: Sequence[str]
) -> Arm | None:
    reported = [f"{found.split}.{name}" for name in found.metrics]
    done = rows[(rows["status"] == "completed") & rows[reported].notna().any(axis=1)]
    if done.empty:
        message = f"{label}: none of its {len(rows)} runs completed with a score on {found.split}; it is in no table"
        study.note(Problem(folder=setting, kind="arm without a completed run", message=message))
        return None
    again = done[done["search.purpose"] == "confirm"] if "search.purpose" in done else done.iloc[:0]
    counted = done if again.empty else again
    columns = [key for key in ("seed", SELECT) if key in counted]
    trials: dict[str, pd.DataFrame] = dict(iter(counted.groupby("trial", sort=True)[columns]))
    name = next(iter(trials))
    if len(trials) > 1:
        most = max(group["seed"].nunique() for group in trials.values())
        means = {
            trial: group[SELECT].mean()
            for trial, group in trials.items()
            if group["seed"].nunique() == most and SELECT in group
        }
        means = {trial: mean for trial, mean in means.items() if not pd.isna(mean)}
        if not means:
            message = f"{label}: several trials and no {found.select} to choose by; left out of the tables"
            study.note(Problem(folder=setting, kind="arm without a choice", message=message))
            return None
        pick = max if higher_is_better(found.select) else min
        name = pick(means, key=lambda trial: means[trial])
    best = counted.loc[trials[name].drop_duplicates("seed", keep="last").sort_values("seed").index]
    found.runs.loc[best.index, "chosen"] = True
    first = best.iloc[0]
    return Arm(
        setting=setting,
        label=label,
        factors={key: first[key] for key in fields},
        trial={key: first[key] for key in found.tuned},
        runs=best,
        tried=int(rows["trial"].nunique()),
        confirmed=not again.empty,
        edges={key: side for key in found.tuned if (side := _edge(first[key], rows[key]))},
        incomplete=int((rows.loc[rows["trial"] == name, "status"] != "completed").sum()),
    )


def _edge(value: Any, tried: pd.Series) -> str:
    """Whether the selected value is at the edge of those tried, so that the optimum may lie outside."""
    values = sorted(tried.dropna().unique()) if pd.api.types.is_numeric_dtype(tried) else []
    if len(values) < 2 or value not in (values[0], values[-1]):
        return ""
    return "lowest tried" if value == values[0] else "highest tried"


def _scores(study: Study, found: Arrangement, arm: Arm) -> dict[str, Scores]:
    seeds = tuple(arm.runs["seed"])
    columns = [
        study.example_columns(run_id, split=found.split, phase="after") if isinstance(folder, str) else {}
        for run_id, folder in zip(arm.runs["run_id"], arm.runs.get("folder", seeds), strict=True)
    ]
    scores = {}
    for metric in found.metrics:
        if metric.startswith("forgetting"):
            continue
        examples = _matrix(columns, metric, seeds)
        level = arm.runs[f"{found.split}.{metric}"].to_numpy(dtype=float)
        if examples is not None:
            scores[metric] = examples
            _check(study, arm, metric, examples, level)
        elif not np.isnan(level).any():
            scores[metric] = Scores(x_RE=level[:, None], w_E=np.ones(1), seeds=seeds, ids=())
    return scores


def _matrix(columns: Sequence[dict[str, list[Any]]], metric: str, seeds: tuple[Any, ...]) -> Scores | None:
    if not columns or not all(metric in one and "id" in one for one in columns):
        return None
    ids = [str(name) for name in columns[0]["id"]]
    rows, weights = [], None
    for one in columns:
        values = np.array(one[metric], dtype=float)
        tokens = np.array(one["tokens"], dtype=float) if metric == "nll" else np.ones(len(values))
        if len(values) != len(ids) or [str(name) for name in one["id"]] != ids:
            place = {str(name): i for i, name in enumerate(one["id"])}
            if set(place) != set(ids):
                return None
            order = [place[name] for name in ids]
            values, tokens = values[order], tokens[order]
        rows.append(values / tokens if metric == "nll" else values)
        weights = tokens if weights is None else weights
    x_RE = np.stack(rows)
    keep = np.isfinite(x_RE).all(axis=0)
    if weights is None or not keep.any():
        return None
    # Sorted by id, so that a seeded bootstrap draws the same examples whatever the order of the lines.
    kept = sorted(np.flatnonzero(keep), key=lambda i: ids[i])
    # Every run of a setting has the same examples, so the first that names their groups does for all.
    first = next((one for one in columns if "group" in one), None)
    group = {} if first is None else dict(zip(map(str, first["id"]), first["group"], strict=True))
    # an example without a group is its own; the prefixes keep its id from being taken for a group's name
    names = [f"example {ids[i]}" if group.get(ids[i]) is None else f"group {group[ids[i]]}" for i in kept]
    return Scores(
        x_RE=x_RE[:, kept], w_E=weights[kept], seeds=seeds, ids=tuple(ids[i] for i in kept),
        groups=tuple(names) if group else (),
    )  # fmt: skip


def _check(study: Study, arm: Arm, metric: str, scores: Scores, level: Array) -> None:
    means = scores.x_RE @ scores.w_E / scores.w_E.sum()
    for run_id, mean, stated in zip(arm.runs["run_id"], means, level, strict=True):
        if not np.isnan(stated) and abs(mean - stated) > 1e-3 * max(1.0, abs(stated)):
            message = f"{metric} of the record is {stated:.6g}, its predictions give {mean:.6g}"
            study.note(Problem(folder=str(study.folder(run_id)), kind="predictions do not match", message=message))


def _base(study: Study, found: Arrangement, setting: str, rows: pd.DataFrame) -> Arm | None:
    """The model before training. It is the same for all runs of a setting, so the first run that measured it counts."""
    column = f"{found.split}.before.nll"
    if column not in rows or not rows[column].notna().any():
        return None
    runs = rows[rows[column].notna()].iloc[:1]
    arm = Arm(setting=setting, label=BASE, factors={"placement": BASE}, trial={}, runs=runs)
    folder = runs["folder"].iloc[0]
    columns = (
        study.example_columns(runs["run_id"].iloc[0], split=found.split, phase="before")
        if isinstance(folder, str)
        else {}
    )
    for metric in found.metrics:
        level = runs.get(f"{found.split}.before.{metric}")
        scores = _matrix([columns], metric, ())
        if scores is None and level is not None and not pd.isna(level.iloc[0]):
            scores = Scores(x_RE=level.to_numpy(dtype=float)[:, None], w_E=np.ones(1), seeds=(), ids=())
        if scores is not None:
            arm.scores[metric] = scores
    return arm
