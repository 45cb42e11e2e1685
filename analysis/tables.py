"""Formatted tables: Markdown, LaTeX (booktabs), CSV. A best value is bold only if it is significantly best."""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from sweeper.record import csv_cell, markdown_text

from . import compare, manifest, provenance
from .analyse import Analysis
from .arms import BASE, FULL, higher_is_better

TITLES = {
    "setting": "task", "trainable_parameters": "trainable", "trainable_percent": "%", "train_flops": "FLOPs",
    "train_seconds_solo": "seconds", "peak_memory_solo_bytes": "peak memory", "tokens_per_second_solo": "tokens/s",
    "adapter_bytes": "adapter", "nll": "NLL", "p_holm": "Holm p", "effect": "d",
    "share_improved": "improved", "front_probability": "P(front)", "partial_eta2": "partial η²",
    "exact_match": "accuracy",
    "percent": "% of model", "percent_of_reference": "% of reference", "detectable": "difference found in 80%",
    "final_number": "accuracy", "hypervolume": "hypervolume",
    "update_norm": "|dW|", "energy": "energy by role",
}  # fmt: skip
CAPTIONS = {
    "efficiency": "Cost and performance of every arm.",
    "tests": "Paired tests between arms, B minus A, Holm-corrected within each family and metric.",
    "contrasts": "Every arm (B) minus the reference arm (A) of its task, Holm-corrected over all arms of a metric: the "
    "bars of the figures.",
    "matched_budget": "Placements at equal trainable parameters; an ellipsis stands between two interpolated ranks.",
    "share_kept": "Share of the reference's gain over the base model that each arm keeps.",
    "tuned": "Hyperparameters chosen on validation in each arm.",
    "failures": "Runs that did not complete and folders that could not be read.",
    "checks": "Checks: numbers that contradict each other and comparisons that may not be fair.",
    "anova": "Analysis of variance over what tells arms apart, seeds as blocks (type II), on these examples.",
    "slopes": "Change of the score for each doubling of the rank, on these examples.",
    "power": "Smallest true difference that a study of these seeds and groups of examples would find in 80% of cases.",
    "hypervolume": "Mean gain over the base model that trainable parameters buy, over the log10 budgets shared by all.",
    "scaling": "Change of the score per doubling of rank and of parameters; from 4 sizes a power law with a floor.",
    "aggregate": "Over tasks: normalised scores (0 base model, 1 mean gain of all arms), and the chance to beat the "
    "reference arm (Agarwal et al. 2021).",
    "mixed": "Linear mixed model: placement × rank fixed, seeds and groups random, restricted maximum likelihood.",
    "transfer": "Test NLL of each task through the blocks of another's path, and how far it lies above its own.",
    "routing": "Test scores of tasks with blocks of their own, where an example's task is known and where it is not.",
    "gains": "Share of what a task gains over the base model by itself that it gains with others; then the mean "
    "over tasks, and the worst of them.",
    "lattice": "What each role is worth (Shapley value of the gain over the base model) and which pairs are worth more "
    "together than apart (Shapley interaction index above 0), over all subsets; intervals over seeds and examples.",
    "lattice_best": "The best subset of each size, chosen on validation, and its gain over the base model.",
    "experts": "Mean gates of a learnt router by task, the most open expert first, with intervals over seeds; the "
    "share of examples whose likeliest expert is their task's own; the load-balancing loss, 1 where all have as much.",
    "conflict": "Cosines between the gradients of tasks while they train together, with intervals over seeds; the "
    "share below 0; means at the first and the last step that was looked at.",
    "conflict_by_layer": "Cosines between the gradients of tasks by role and layer, over pairs and steps.",
    "library": "Rules over a library of adapters trained apart: test scores, and the difference to the best single "
    "member on the same examples.",
    "continual": "Tasks one after another: average, backward and forward transfer, forgetting, learning; of NLL in "
    "nats, better positive but for the average and forgetting. On the front: no arm learns more and forgets less.",
    "importance": "Share of the variance of the validation score that each field explains.",
    "all_tasks": "Mean over tasks of equal weight.",
    "spectra": "What training changed: norm, ranks and new directions of the updates, and where their energy is.",
    "block_spectra": "Rank blocks: the ranks that each was given in a module, the effective rank of its update there, "
    "and its share of the energy.",
}
_BYTES = ("peak_memory_solo_bytes", "adapter_bytes")
_COUNTS = (
    "trainable_parameters", "parameters_a", "parameters_b", "seeds", "examples", "groups", "tests", "pairs", "trials",
    "runs", "df", "arms", "members",
)  # fmt: skip
_PS = ("p", "p_holm")
_CENTERS = (
    "difference", "share", "slope", "hypervolume", "estimate", "importance", "cosine", "effective_rank",
    "gate",
)  # fmt: skip
"""What `low` and `high` of a table are of."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value with its text; `value` is what sorting uses."""

    value: Any
    text: str
    bold: bool = False


@dataclass(kw_only=True)
class Sheet:
    """A formatted table: header and cells. The note under it says where its numbers come from. Its texts are made once,
    for a file and for the report."""

    name: str
    caption: str
    header: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""

    @cached_property
    def markdown(self) -> str:
        return markdown(self)

    @cached_property
    def latex(self) -> str:
        return latex(self)


COMMONEST = "commonest answer"
SKEWED = 0.05
"""Share of its half width that an estimate may lie beside its interval's middle and still be shown with "±"."""
DAGGER = "†"
DAGGERED = f" {DAGGER}: the choice of hyperparameters is at the edge of what was tried or not confirmed (table tuned)."


def sheets(analysis: Analysis) -> list[Sheet]:
    """Every table with at least one row, in reading order."""
    found = [placement_rank(analysis, metric) for metric in analysis.found.metrics if analysis.found.arms]
    found += [efficiency(analysis)] if analysis.found.arms else []
    for name in CAPTIONS:
        table = analysis.tables.get(name)
        if name != "efficiency" and table is not None and len(table):
            found.append(plain(name, table))
    note = provenance.sentence(analysis)
    for sheet in found:
        sheet.note = note
    return found


def placement_rank(analysis: Analysis, metric: str) -> Sheet:
    """One row per placement (and method, if several), one column per rank; base model and commonest answer first."""
    arms = analysis.arms
    ranks = sorted(arms["rank"].dropna().unique())
    arms = arms.assign(rank=pd.to_numeric(arms["rank"]))
    extra = [key for key in _factors(analysis) if key not in ("placement", "rank", "alpha") and arms[key].nunique() > 1]
    several = arms["setting"].nunique() > 1
    header = [
        *(["task"] if several else []),
        "placement",
        *(title(key) for key in extra),
        *(f"r={rank:g}" for rank in ranks),
    ]
    best, marks = bold_arms(analysis, metric), daggers(analysis)
    rows: list[list[Cell]] = []
    for setting, group in arms.groupby("setting", sort=False):
        lead = [Cell(value=setting, text=str(setting))] if several else []
        for row in group[group["rank"].isna()].to_dict("records"):  # the base model, full fine-tuning
            if not ranks:
                continue
            whole = row["placement"] in (BASE, FULL)  # which has no method of adapters, no allocation
            keys = [
                Cell(value=None, text="") if whole else Cell(value=row[key], text=show("", row[key])) for key in extra
            ]
            cells = [_estimate(row, metric)] + [Cell(value=None, text="") for _ in ranks[1:]]
            rows.append([*lead, Cell(value=row["placement"], text=str(row["placement"])), *keys, *cells])
        commonest = _commonest(analysis, str(setting), metric)
        if ranks and commonest is not None:
            empty = [Cell(value=None, text="")]
            score, who = Cell(value=commonest, text=show(metric, commonest)), Cell(value=COMMONEST, text=COMMONEST)
            rows.append([*lead, who, *empty * len(extra), score, *empty * (len(ranks) - 1)])
        trained = group[group["rank"].notna()]
        for keys, ladder in trained.groupby(["placement", *extra], sort=False, dropna=False):
            by_rank = {row["rank"]: row for row in ladder.to_dict("records")}
            cells = [
                _estimate(
                    by_rank[rank],
                    metric,
                    (setting, by_rank[rank]["arm"]) in best,
                    marks.get((str(setting), by_rank[rank]["arm"]), ""),
                )
                if rank in by_rank
                else Cell(value=None, text="–")
                for rank in ranks
            ]
            rows.append([*lead, *(Cell(value=key, text=show("", key)) for key in keys), *cells])
    name = f"placement_rank_{metric}"
    direction = "higher" if higher_is_better(metric) else "lower"
    what = f"{title(metric)} on {analysis.found.split} by placement and rank"
    caption = f"{what} ({direction} is better), with 95% intervals: ± half of one where it is symmetric."
    caption += DAGGERED if marks else ""
    if len(ranks) > 1 and arms.loc[arms["arm"] != BASE, "rank"].isna().any():
        caption += " What has no rank stands in the first column."
    return Sheet(name=name, caption=caption, header=header, rows=rows)


def _commonest(analysis: Analysis, setting: str, metric: str) -> float | None:
    """The score of always giving the commonest training answer, if the records have it."""
    runs, column = analysis.found.runs, f"{analysis.found.split}.majority.{metric}"
    if column not in runs:
        return None
    known = runs.loc[runs["setting"] == setting, column].dropna()
    return float(known.iloc[0]) if len(known) else None


def efficiency(analysis: Analysis) -> Sheet:
    """One row per arm: its costs and scores."""
    arms, metrics = analysis.arms, analysis.found.metrics
    several = arms["setting"].nunique() > 1
    forgetting = [column for column in arms if column == "forgetting"]
    costs = [
        "trainable_parameters", "trainable_percent", "train_flops", "train_seconds_solo", "peak_memory_solo_bytes",
        "tokens_per_second_solo", "adapter_bytes",
    ]  # fmt: skip
    costs = [key for key in costs if key in arms and arms[key].notna().any()]
    scores = [name for metric in metrics for name in ([metric, "perplexity"] if metric == "nll" else [metric])]
    header = [*(["task"] if several else []), "arm", *map(title, costs), *map(title, scores), *map(title, forgetting)]
    bold = {metric: overall_best(analysis, metric) for metric in metrics}
    marks = daggers(analysis)
    rows = []
    for row in arms.to_dict("records"):
        cells = [Cell(value=row["setting"], text=row["setting"])] if several else []
        cells.append(Cell(value=row["arm"], text=row["arm"] + marks.get((row["setting"], row["arm"]), "")))
        cells += [_cost(row, key) for key in costs]
        cells += [_estimate(row, key, (row["setting"], row["arm"]) in bold.get(key, set())) for key in scores]
        cells += [_estimate(row, key) for key in forgetting]
        rows.append(cells)
    caption = CAPTIONS["efficiency"] + (DAGGERED if marks else "")
    return Sheet(name="efficiency", caption=caption, header=header, rows=rows)


def daggers(analysis: Analysis) -> dict[tuple[str, str], str]:
    """A dagger for each (setting, arm) whose choice of hyperparameters is in doubt."""
    return {(arm.setting, arm.label): DAGGER for arm in analysis.found.arms if arm.doubts}


def plain(name: str, table: pd.DataFrame) -> Sheet:
    """Any table as it is; an estimate and its interval become one column."""
    columns = [key for key in table if key not in ("low", "high", "significant")]
    said = ("placement", "rank") if "arm" in columns else ("family",) if name in ("matched_budget", "contrasts") else ()
    columns = [key for key in columns if key not in said]
    if "setting" in table and table["setting"].nunique() == 1:
        columns.remove("setting")
    spread = "low" in table
    center = next((key for key in _CENTERS if key in table), "")

    def cell(row: dict[str, Any], key: str) -> Cell:
        between = spread and key == center
        return Cell(
            value=row[key], text=_between(row[key], row["low"], row["high"]) if between else show(key, row[key])
        )

    rows = [[cell(row, key) for key in columns] for row in table.to_dict("records")]
    return Sheet(name=name, caption=CAPTIONS.get(name, name), header=[title(key) for key in columns], rows=rows)


def bold_arms(analysis: Analysis, metric: str) -> set[tuple[str, str]]:
    """(setting, arm) of arms that significantly beat all arms of their rank that differ in one factor; an arm that
    could not be tested against one of them is never bold."""
    tests = analysis.tables["tests"]
    tests = tests[(tests["metric"] == metric) & ~tests["family"].isin(("rank", BASE, FULL))]
    rivals = _rivals(analysis, without=("rank", BASE, FULL))
    found = set()
    for setting, group in tests.groupby("setting"):
        made, won = Counter([*group["a"], *group["b"]]), Counter(group["better"])
        found |= {(str(setting), arm) for arm, count in made.items() if count == rivals[str(setting), arm] == won[arm]}
    return found


def _rivals(analysis: Analysis, without: tuple[str, ...] = ()) -> Counter[tuple[str, str]]:
    """How many arms each (setting, arm) is to be tested against, in families but these."""
    pairs = [pair for pair in compare.pairs(analysis.found) if pair.family not in without]
    return Counter((pair.setting.name, arm.label) for pair in pairs for arm in (pair.a, pair.b))


def overall_best(analysis: Analysis, metric: str) -> set[tuple[str, str]]:
    """(setting, arm) of the best arm, if it wins all its tests and its interval overlaps with that of no arm it was not
    tested against (those that differ in two factors)."""
    arms = analysis.arms[analysis.arms["arm"] != BASE]
    tests, rivals = analysis.tables["tests"], _rivals(analysis)
    found = set()
    for setting, group in arms.groupby("setting"):
        if metric not in group or group[metric].notna().sum() < 2:
            continue
        up = higher_is_better(metric)
        best = group.loc[group[metric].idxmax() if up else group[metric].idxmin()]
        mine = tests[(tests["setting"] == setting) & (tests["metric"] == metric)]
        mine = mine[(mine["a"] == best["arm"]) | (mine["b"] == best["arm"])]
        tested = set(mine["a"]) | set(mine["b"])
        others = group[~group["arm"].isin(tested)]
        edge = (
            best[f"{metric}_low"] > others[f"{metric}_high"] if up else best[f"{metric}_high"] < others[f"{metric}_low"]
        )
        tested_all = len(mine) == rivals[str(setting), str(best["arm"])]
        if tested_all and (mine["better"] == best["arm"]).all() and bool(edge.all()):
            found.add((str(setting), str(best["arm"])))
    return found


def write(analysis: Analysis, folder: Path, made: Sequence[Sheet] | None = None) -> list[Path]:
    """Writes each table as .md, .tex and .csv, the raw tables as .csv, and all.tex, which compiles them all.

    Tables that a former analysis wrote there and this one does not have are removed.

    Args:
        made: the tables, where they are made already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, shown = [], sheets(analysis) if made is None else made
    for sheet in shown:
        written += [folder / f"{sheet.name}.md", folder / f"{sheet.name}.tex"]
        written[-2].write_text(sheet.markdown + "\n", encoding="utf-8")
        written[-1].write_text(sheet.latex, encoding="utf-8")
        if sheet.name.startswith("placement_rank"):
            frame = pd.DataFrame([[cell.text for cell in row] for row in sheet.rows], columns=sheet.header)
            written.append(folder / f"{sheet.name}.csv")
            to_csv(frame, written[-1])
    for name, table in analysis.tables.items():
        written.append(folder / f"{name}.csv")
        to_csv(table, written[-1])
    written.append(folder / "all.tex")
    written[-1].write_text(document(sheet.name for sheet in shown), encoding="utf-8")
    manifest.update(folder, written)
    return written


def to_csv(table: pd.DataFrame, path: Path) -> None:
    """Writes a table as CSV; no text in it is a formula to a spreadsheet (`sweeper.record.csv_cell`)."""
    table.map(csv_cell).rename(columns=csv_cell).to_csv(path, index=False)


def markdown(sheet: Sheet) -> str:
    """A Markdown table with its caption above and its note below."""

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"

    body = [line(f"**{cell.text}**" if cell.bold else cell.text for cell in row) for row in sheet.rows]
    under = ["", sheet.note] if sheet.note else []
    lines = [sheet.caption, "", line(sheet.header), line("---" for _ in sheet.header), *body, *under]
    return markdown_text("\n".join(lines))


def latex(sheet: Sheet) -> str:
    """A booktabs table, scaled to the text width if it is wide; a longtable if it does not fit on a page, in landscape
    if it is wide. Sentences wrap."""
    columns, letters, sentences = _layout(sheet)
    head = " & ".join(tex(text) for text in sheet.header) + r" \\"
    body = [
        " & ".join(rf"\textbf{{{tex(cell.text)}}}" if cell.bold else tex(cell.text) for cell in row) + r" \\"
        for row in sheet.rows
    ]
    caption, label = tex(sheet.caption), sheet.name.replace("_", "-")
    under = rf"\par\smallskip\raggedright\scriptsize {tex(sheet.note)}" if sheet.note else ""
    if len(body) > 45:
        opening, closing = (r"\begin{landscape}", r"\end{landscape}") if letters > 125 else ("", "")
        size = r"\tiny" if letters > 175 else r"\scriptsize"
        lines = [opening, rf"{{{size}\setlength{{\tabcolsep}}{{3pt}}", rf"\begin{{longtable}}{{{columns}}}"]
        lines += [rf"\caption{{{caption}}}\label{{tab:{label}}}\\", r"\toprule", head, r"\midrule", r"\endhead"]
        lines += [r"\bottomrule", r"\endfoot", *body, r"\end{longtable}", under, "}", closing]
        return "\n".join(line for line in lines if line) + "\n"
    wide = letters > 110 and not sentences
    opening, closing = (r"\resizebox{\textwidth}{!}{%", "}") if wide else ("", "")
    lines = [r"\begin{table}[t]", r"\centering\small", rf"\caption{{{caption}}}", rf"\label{{tab:{label}}}", opening]
    lines += [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(line for line in [*lines, closing, under, r"\end{table}"] if line) + "\n"


def _layout(sheet: Sheet) -> tuple[str, int, bool]:
    """LaTeX column types of a sheet, its approximate width in letters, and whether sentences wrap within the width that
    the other columns leave."""
    texts = zip(sheet.header, *([cell.text for cell in row] for row in sheet.rows), strict=True)
    widths = [max(map(len, column)) for column in texts]
    long = [width > 45 for width in widths]
    rest = 0.97 - sum(0.025 + 0.01 * width * (width <= 45) for width in widths)
    sentences = any(long) and rest > 0.25
    columns = ""
    for i, one in enumerate(long):
        number = all(_is_number(row[i].value) for row in sheet.rows)
        columns += rf"p{{{rest / sum(long):.2f}\textwidth}}" if one and sentences else "r" if number else "l"
    return columns, sum(min(width, 45) + 2 for width in widths), sentences


def document(names: Iterable[str]) -> str:
    """A LaTeX document with every table, for reading and as a check that they compile."""
    packages = [rf"\usepackage{{{name}}}" for name in ("booktabs", "longtable", "graphicx", "pdflscape")]
    inputs = [rf"\input{{{name}}}" + "\n" + r"\clearpage" for name in names]
    head = [r"\documentclass{article}", r"\usepackage[margin=2cm]{geometry}", *packages]
    return "\n".join([*head, r"\begin{document}", *inputs, r"\end{document}"]) + "\n"


_TEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "…": r"\ldots{}",
    "−": "$-$",
    "†": r"$\dagger$",
    "–": "--", "η": r"$\eta$", "²": "$^2$", "→": r"$\to$", "<": "$<$", ">": "$>$", "|": r"$|$", '"': "''", "\n": " ",
})  # fmt: skip


def tex(text: str) -> str:
    """Escapes text for LaTeX; letters that pdfLaTeX lacks become their ASCII form or a question mark."""

    def plain(letter: str) -> str:
        return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"

    return "".join(letter if letter.isascii() else plain(letter) for letter in text.translate(_TEX))


def title(key: str) -> str:
    """A column's display name; a configuration field keeps its own."""
    return TITLES.get(key, key if "." in key else key.replace("_", " "))


def show(key: str, value: Any) -> str:
    """Text of a value; a dash if it is missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not _is_number(value):
        return str(value)
    if key in _BYTES:
        return size(float(value))
    if key in _COUNTS:
        return f"{value:,.0f}"
    if key in _PS:
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    if key == "train_flops":
        return f"{value:.2e}" if value else "0"
    return number(float(value))


def number(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits, in fixed notation where that is short."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-4 <= abs(value) < 1e6:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        text = f"{value:,.{decimals}f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
    return f"{value:.{digits - 1}g}".replace("-", "−")


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 1000 else f"{count:.0f} GiB"


def _cost(row: dict[str, Any], key: str) -> Cell:
    """A cost; with the interval of its repeated measurements where there are such."""
    if math.isnan(row.get(f"{key}_low", math.nan)):
        return Cell(value=row[key], text=show(key, row[key]))
    return Cell(value=row[key], text=_between(row[key], row[f"{key}_low"], row[f"{key}_high"]))


def _estimate(row: dict[str, Any], metric: str, bold: bool = False, mark: str = "") -> Cell:
    value = row.get(metric)
    if value is None or math.isnan(value):
        return Cell(value=None, text="–")
    low, high = row.get(f"{metric}_low", math.nan), row.get(f"{metric}_high", math.nan)
    half = (high - low) / 2
    if not math.isfinite(half) or half <= 0:
        return Cell(value=value, text=number(value) + mark, bold=bold)
    if abs(value - (low + high) / 2) > SKEWED * half:  # "±" would state an interval that it is not
        return Cell(value=value, text=_between(value, low, high) + mark, bold=bold)
    decimals = min(max(1 - math.floor(math.log10(half)), 0), 5)
    return Cell(value=value, text=f"{value:,.{decimals}f} ± {half:,.{decimals}f}{mark}", bold=bold)


def _between(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "–"
    if math.isnan(low) or low == high:
        return number(value)
    half = (high - low) / 2
    decimals = min(max(1 - math.floor(math.log10(half)), 0), 6) if half > 0 else 4
    texts = [f"{one:,.{decimals}f}".replace("-", "−") for one in (value, low, high)]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _factors(analysis: Analysis) -> Sequence[str]:
    arms = analysis.found.arms
    return list(arms[0].factors) if arms else []


def _is_number(value: Any) -> bool:
    return value is None or value is pd.NA or (hasattr(value, "__float__") and not isinstance(value, str | bool))
