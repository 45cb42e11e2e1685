"""Captions: what each figure shows, of how many seeds and groups, and what its error bars are. They state no result."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sweeper.record import markdown_text

from . import contrasts, layout, shown
from .analyse import Analysis
from .arms import FULL
from .tables import DAGGER, tex, title
from .venues import DEFAULT, Venue

SUFFIXES = ("md", "tex")
WHAT = {
    "pareto": "Cost against performance; members of the front are filled and joined",
    "arms": "Every arm, best measured first",
    "forest": "Differences between arms at equal rank, first minus second; filled where significant after correction "
    "for all comparisons of the family",
    "rank": "Performance against rank, a line a placement (or method)",
    "heatmap": "Placement (or method) by rank; lighter is better",
    "detectable": "Smallest true difference that a study of so many seeds and groups of examples finds in 80% of "
    "cases; this study's own size is ringed, numbers are groups",
    "performance_profile": "Share of runs, over tasks and seeds, that reach a normalised score, of the highest rank "
    "of each placement (or method)",
    "share_kept": "Share of the reference's gain over the base model kept, against the share of the model trained",
    "learning_rate": "Validation score against the learning rate; the chosen one is ringed",
    "training_curves": "Training loss, mean of seeds with their range",
    "validation_curves": "Validation NLL while training, mean over seeds",
    "learn_forget": "Learning against forgetting; members of the front of both are filled and joined, larger points are"
    " larger ranks",
    "where_rank_went": "Rank by layer and role, of arms whose modules differ in rank",
    "where_energy_went": "Share of the update's squared norm by layer and role",
    "lattice": "Gain of every subset of roles over the base model by the number of parts; grey lines add one part, the "
    "blue line joins the best of each size, the worst is orange",
    "lattice_values": "What each part is worth (Shapley value of the gain, blue) and the strongest interactions of "
    "pairs (orange; above 0 worth more together than apart); filled where the interval leaves out 0",
    "importance": "Importance of each varied field for the validation score",
    "together": "What training with other tasks did to each task: together minus alone, otherwise the same arm; filled "
    "where significant after correction",
    "transfer": "Rise of each task's test NLL where its examples go through the blocks of another task, in nats a "
    "token, mean over seeds",
    "experts": "Mean gate of each expert by task, over tokens, modules and test examples, of the first seed",
    "conflict": "Cosine between the gradients of two tasks by role and layer, mean over pairs of tasks, steps and "
    "seeds; below 0 they pull apart",
    "conflict_curves": "Cosine between the gradients of two tasks over the whole adapter while it trains",
    "block_ranks": "Effective rank of each block's update by role, mean over layers and seeds; darker blocks spend "
    "more of the rank that they were given in a module",
    "library": "Rules over a library of adapters trained apart: test NLL less that of the best single member, in nats "
    "a token; filled where significant after correction",
    "forgetting_curves": "Test scores of each task while the tasks are learnt one after another, mean over seeds of "
    "the first order; dotted lines are where one ends and the next begins",
    "learning_forgetting": "What is gained on a task over the base model while it is learnt, against what is forgotten "
    "of it by the end, means over tasks; members of the front of both are filled and joined",
}
COSTS = {
    "seconds": "seconds",
    "flops": "training FLOPs",
    "tokens": "training tokens",
    "memory": "peak memory of a run alone",
}
PAIRED = ("pareto", "arms", "rank", "heatmap", "learn_forget")
"""Figures whose bars are of the paired difference to a reference arm."""
BARS = {
    "forest": "Bars are 95% intervals of the paired difference, over seeds and groups of examples",
    "performance_profile": "Bands are 95% pointwise intervals of a stratified bootstrap of seeds and groups",
    "share_kept": "Bars are 95% intervals of the share, over seeds and groups of examples",
    "validation_curves": "Bands are 95% intervals over seeds, whose variance is pooled over the arms; all are scored "
    "on the same examples, whose variance is not in them",
    "importance": "Bars are 1.96 bootstrap standard errors",
    "conflict_curves": "Bands are 95% intervals over seeds",
    "lattice_values": "Bars are 95% intervals over seeds and groups of examples",
    "library": "Bars are 95% intervals of the paired difference, over groups of examples",
    "together": "Bars are 95% intervals of the paired difference, over seeds and groups of examples",
    "learning_forgetting": "Bars are 95% intervals over the tasks' orders, or over seeds where there is one order, and "
    "may go beyond the axis; all are scored on the same examples, whose variance is not in them",
}
WITH_ARMS = (
    *PAIRED, "forest", "performance_profile", "share_kept", "learning_rate", "training_curves", "validation_curves",
    "where_rank_went", "where_energy_went",
)  # fmt: skip
BY_KIND = (
    "pareto", "rank", "learn_forget", "performance_profile", "share_kept", "learning_rate", "training_curves",
    "validation_curves",
)  # fmt: skip
"""Figures in which kinds of arms are told apart by their look."""


def kind(name: str) -> str:
    """The kind of a figure by the name of its file, which may go on with a metric."""
    return next((known for known in sorted(WHAT, key=len, reverse=True) if name.startswith(known)), "importance")


def alt(name: str) -> str:
    """What a figure shows, in a line."""
    rest = name.removeprefix(kind(name)).strip("_")
    return WHAT[kind(name)] + (f" ({COSTS.get(rest) or title(rest)})" if rest else "")


def caption(analysis: Analysis, name: str, venue: Venue = DEFAULT) -> str:
    """The caption of a figure, as plain text."""
    what = kind(name)
    sentences = [alt(name)]
    sentences += _paired(analysis, what) if what in PAIRED else [BARS[what]] if what in BARS else []
    sentences += _left_out(analysis, what, venue)
    if what == "pareto" and shown.ranks_written(shown.trained(analysis, analysis.metric)):
        sentences.append("Numbers beside points are ranks")
    if what in ("pareto", "rank", "arms") and _has_full(analysis):
        sentences.append(_full(what))
    sentences += _sample(analysis)
    if "seconds" in name:
        devices = sorted(set(analysis.found.runs["device"].dropna())) if "device" in analysis.found.runs else []
        sentences.append(f"Seconds are of a run alone{' on ' + ', '.join(devices) if devices else ''}")
    if what in WITH_ARMS and any(arm.doubts for arm in analysis.found.arms):
        sentences.append(DAGGERED + (", beside a name in the legend of all its arms" if what in BY_KIND else ""))
    return ". ".join(sentences) + "."


def write(analysis: Analysis, name: str, folder: Path, venue: Venue = DEFAULT) -> None:
    """Writes NAME.md and NAME.tex beside a figure."""
    text = caption(analysis, name, venue)
    (folder / f"{name}.md").write_text(markdown_text(text) + "\n", encoding="utf-8")
    lines = [r"\begin{figure}[t]", r"\centering", rf"\includegraphics{{{name}.pdf}}", rf"\caption{{{tex(text)}}}"]
    lines += [rf"\label{{fig:{name.replace('_', '-')}}}", r"\end{figure}"]
    (folder / f"{name}.tex").write_text("\n".join(lines) + "\n", encoding="utf-8")


DAGGERED = (
    f"{DAGGER}: the choice of the arm's hyperparameters is at the edge of what was tried, was not confirmed on fresh "
    "seeds or is in doubt for another reason (table tuned)"
)


def _paired(analysis: Analysis, what: str) -> list[str]:
    """What a bar is where it is of the difference to the reference arm, and which arm that is."""
    by_setting = {
        name: shown.named(analysis, name)[label][1].removesuffix(DAGGER)
        for name, label in contrasts.references(analysis.found, analysis.metric).items()
    }
    labels = list(dict.fromkeys(by_setting.values()))
    if not labels or analysis.tables["contrasts"].empty:
        return ["No arm could be paired with another, so there are no bars"]
    which = labels[0] if len(labels) == 1 else "; ".join(f"{label} on {name}" for name, label in by_setting.items())
    bar = "The number after ± is half of" if what == "heatmap" else "A bar is"
    text = (
        f"{bar} the 95% interval of the paired difference between an arm and the reference arm ({which}), on the same "
    )
    text += "seeds and examples, over seeds and groups of examples"
    text += ", of forgetting over seeds" if what == "learn_forget" else ""
    if what == "heatmap":
        tests = analysis.tables["contrasts"]
        count = int((tests["metric"] == analysis.metric).sum())
        return [
            text,
            f"The reference is framed; cells that do not differ from it at 5% after Holm's correction for {count} "
            f"comparison{'s' * (count != 1)} are hatched",
            "The colours span at least the difference that the study finds in 80% of cases, or, where that is not "
            "known, the median length of the intervals",
        ]
    text += ", drawn about the arm's own mean; the variance of examples that all arms share is not in it"
    level = "" if what == "learn_forget" else ", whose score is the thin dashed line,"
    own = f"The reference{level} has none"
    reach = (
        "" if what == "learn_forget" else "; where a bar does not reach that line the difference is significant at 5%, "
    )
    return [text, own + reach + ("" if what == "learn_forget" else "before correction for the number of arms")]


def _has_full(analysis: Analysis) -> bool:
    return any(arm.factors["placement"] == FULL for arm in analysis.found.arms)


def _full(what: str) -> str:
    text = "Full fine-tuning is a line, the same interval a band about it"
    return text + (
        "; where its cost lies far from the adapters', the number at the line is its cost" * (what == "pareto")
    )


def _left_out(analysis: Analysis, what: str, venue: Venue) -> list[str]:
    """Which arms or kinds are not shown, or not told apart."""
    kinds = shown.best_kinds(analysis)
    if what == "forest":
        return _cut(
            shown.comparisons(analysis), venue, layout.TEST, "comparisons", "smallest p, then largest difference"
        )
    if what == "arms":
        return _cut(shown.ranked_arms(analysis, analysis.metric), venue, layout.ARM, "arms", "best measured")
    if what == "heatmap":
        arms = shown.trained(analysis, analysis.metric)
        arms = arms[arms["rank"].notna()]
        total, panels = arms["placement"].nunique(), max(arms["setting"].nunique(), 1)
        room = layout.rows_that_fit(venue, panels, *layout.HEAT)
        return [f"Of {total} placements (or methods) the {room} best are shown"] if total > room else []
    if what in BY_KIND and len(kinds) > shown.MOST_KINDS:
        bare = ", without bars" if what in (*PAIRED, "share_kept") else ", without bands"
        text = (
            f"Of {len(kinds)} placements (or methods) the {shown.BEST_KINDS} whose best arms score best have a colour"
        )
        return [f"{text}, the others are grey{'' if what == 'learning_rate' else bare}"]
    return []


def _cut(table: pd.DataFrame, venue: Venue, rows: tuple[float, float], what: str, first: str) -> list[str]:
    if table.empty:
        return []
    room = min(shown.MOST_ARMS, layout.rows_that_fit(venue, table["setting"].nunique(), *rows))
    most = shown.most_of(table)
    return [f"Of up to {most:,} {what} a task the first {room} are shown: {first}"] if most > room else []


def _sample(analysis: Analysis) -> list[str]:
    """Seeds, examples and groups of each setting, on the split that is reported."""
    parts = []
    for setting in analysis.found.settings:
        scores = [arm.scores[analysis.metric] for arm in setting.arms if analysis.metric in arm.scores]
        if not scores:
            continue
        counts = [_span([len(one.seeds) for one in scores], "seed")]
        if scores[0].ids:
            examples, units = [len(one.ids) for one in scores], [one.units for one in scores]
            counts.append(_span(examples, f"{analysis.found.split} example"))
            counts += [f"in {_span(units, 'independent group')}"] if units != examples else []
        parts.append(f"{setting.name}: {', '.join(counts)}")
    return ["; ".join(parts)] if parts else []


def _span(values: Sequence[int], what: str) -> str:
    low, high = min(values), max(values)
    return f"{low:,}{'' if low == high else f' to {high:,}'} {what}{'' if high == 1 else 's'}"
