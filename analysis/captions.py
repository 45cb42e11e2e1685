"""Captions: what each figure shows, of how many seeds and groups, and what its error bars are. They state no result."""

from collections.abc import Sequence
from pathlib import Path

from analysis.analyse import Analysis
from analysis.tables import DAGGER, tex, title
from sweeper.record import markdown_text

SUFFIXES = ("md", "tex")
WHAT = {
    "pareto": "Cost against performance; members of the front are filled and joined",
    "arms": "Every arm, best measured first",
    "forest": "Differences between arms at equal rank, first minus second; filled where significant after correction "
    "for all comparisons of the family",
    "rank": "Performance against rank, a line a placement (or method)",
    "heatmap": "Placement (or method) by rank",
    "detectable": "Smallest true difference that a study of so many seeds and groups of examples finds in 80% of "
    "cases; this study's own size is ringed",
    "performance_profile": "Share of runs, over tasks and seeds, that reach a normalised score, of the highest rank "
    "of each placement (or method)",
    "share_kept": "Share of the reference's gain over the base model kept, against the share of the model trained",
    "learning_rate": "Validation score against the learning rate; the chosen one is ringed",
    "training_curves": "Training loss, mean of seeds with their range",
    "learn_forget": "Learning against forgetting; larger points are larger ranks",
    "where_rank_went": "Rank by layer and role",
    "where_energy_went": "Share of the update's squared norm by layer and role",
    "importance": "Importance of each varied field for the validation score",
}
_SCORE = (
    "Bars and bands are 95% intervals of an arm's own score, over seeds and groups of examples; they hold the variance "
)
_SCORE += "of examples that all arms share, so whether two arms differ is for the forest to say"
BARS = {
    "pareto": _SCORE,
    "arms": _SCORE,
    "rank": _SCORE,
    "forest": "Bars are 95% intervals of the paired difference, over seeds and groups of examples",
    "performance_profile": "Bands are 95% pointwise intervals of a stratified bootstrap of seeds and groups",
    "share_kept": "Bars are 95% intervals of the share, over seeds and groups of examples",
    "learn_forget": "Bars are 95% intervals, over seeds and groups of examples, and of forgetting over seeds",
    "importance": "Bars are 1.96 bootstrap standard errors",
}


def kind(name: str) -> str:
    """The kind of a figure by the name of its file, which may go on with a metric."""
    return next((known for known in sorted(WHAT, key=len, reverse=True) if name.startswith(known)), "importance")


def alt(name: str) -> str:
    """What a figure shows, in a line."""
    rest = name.removeprefix(kind(name)).strip("_")
    return WHAT[kind(name)] + (f" ({title(rest)})" if rest else "")


def caption(analysis: Analysis, name: str) -> str:
    """The caption of a figure, as plain text."""
    sentences = [alt(name)]
    if bars := BARS.get(kind(name)):
        sentences.append(bars)
    sentences += _sample(analysis)
    if "seconds" in name:
        devices = sorted(set(analysis.found.runs["device"].dropna())) if "device" in analysis.found.runs else []
        sentences.append(f"Seconds are of a run alone{' on ' + ', '.join(devices) if devices else ''}")
    if any(arm.doubts for arm in analysis.found.arms):
        sentences.append(
            f"{DAGGER} Of some arms the choice of hyperparameters is at the edge of what was tried or not confirmed on "
            "fresh seeds (table tuned)"
        )
    return ". ".join(sentences) + "."


def write(analysis: Analysis, name: str, folder: Path) -> None:
    """Writes NAME.md and NAME.tex beside a figure."""
    text = caption(analysis, name)
    (folder / f"{name}.md").write_text(markdown_text(text) + "\n", encoding="utf-8")
    lines = [r"\begin{figure}[t]", r"\centering", rf"\includegraphics{{{name}.pdf}}", rf"\caption{{{tex(text)}}}"]
    lines += [rf"\label{{fig:{name.replace('_', '-')}}}", r"\end{figure}"]
    (folder / f"{name}.tex").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
