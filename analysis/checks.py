"""Checks a reviewer would make: numbers that contradict each other, and comparisons that are not fair."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from sweeper.record import perplexity, shortened

from . import compare, together
from .arms import Arm, Arrangement
from .load import Study

CHECK_COLUMNS = ["check", "subject", "message"]
ROLES: Mapping[str, tuple[str, ...]] = {
    "attn": ("attn_q", "attn_k", "attn_v", "attn_o"),
    "ff": ("ff_gate", "ff_up", "ff_down"),
}
ROLES = {**ROLES, "full": (*ROLES["attn"], *ROLES["ff"])}
FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "attn_qk": ("attn_q", "attn_k"),
    "attn_kv": ("attn_k", "attn_v"),
    "ff_gate_up": ("ff_gate", "ff_up"),
}
FEW_EXAMPLES = 100
FEW_GROUPS = 30
DIRTY = "+"  # what the commit of a tree with changes ends in
_MEMORY = ("peak_memory_solo_bytes", "memory_measured", "device_type", "source")
CONDITIONS = {
    "precision": "precision", "device_type": "device kind", "device": "device", "attention": "attention",
    "sandbox_python": "Python of the sandbox", "model.content": "model files", "dataset.content": "data version",
}  # fmt: skip
NUMBERLESS = ("hydra-core", "omegaconf")
UNEQUAL = 0.05
"""Share by which the examples that two arms trained on may differ without a finding."""
SHORTENED = 0.01
"""Share of a split's examples that may be left out or truncated without a finding."""


def check(study: Study, found: Arrangement) -> pd.DataFrame:
    """All findings, wrong numbers first. Columns: check, subject, message."""
    rows = [
        *_perplexities(study), *_unfinite(found), *_parameters(study), *_replicates(found), *_examples(study, found),
        *_conditions(found), *_shortened(study), *_fairness(found), *_together(found), *_choice(found), *_source(found),
        *_costs(found),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=CHECK_COLUMNS)


def _perplexities(study: Study) -> Iterator[tuple[str, str, str]]:
    """Stated perplexities that are not exp(NLL), to 1%."""
    for column in [name for name in study.runs if name.endswith("perplexity_stated")]:
        prefix = column.removesuffix("perplexity_stated")
        table = study.runs[["run_id", f"{prefix}nll", column]].dropna()
        stated = pd.to_numeric(table[column], errors="coerce")
        right = table[f"{prefix}nll"].map(perplexity)
        for index in table.index[(stated - right).abs() > 0.01 * right]:
            nll = table[f"{prefix}nll"][index]
            yield (
                "perplexity is not exp(NLL)", _subject(study.runs.loc[index]),
                f"{prefix}NLL {nll:.4g} gives perplexity {right[index]:.4g}, stated is {stated[index]:.6g}",
            )  # fmt: skip


def _unfinite(found: Arrangement) -> Iterator[tuple[str, str, str]]:
    """Completed runs without a finite score that other runs of their setting have."""
    for column in (f"{found.split}.{metric}" for metric in found.metrics):
        for name, runs in found.runs[found.runs["status"] == "completed"].groupby("setting"):
            scores = pd.to_numeric(runs[column], errors="coerce").replace([np.inf, -np.inf], np.nan)
            if scores.isna().any() and scores.notna().any():
                which = [f"{row['arm']} seed={row['seed']}" for row in runs[scores.isna()].to_dict("records")]
                text = f"{len(which)} of {len(runs)} completed runs have no finite {column}; they are in no mean"
                yield "score is no number", f"{name}: {_some(which)}", text


def _replicates(found: Arrangement) -> Iterator[tuple[str, str, str]]:
    """Arms of one setting whose seeds differ, so that means, fronts and hypervolumes compare different samples; runs
    of one arm, trial and seed."""
    for setting in found.settings:
        seeds = {arm.label: frozenset(arm.runs["seed"]) for arm in setting.arms}
        if len(set(seeds.values())) > 1:
            shared = frozenset.intersection(*seeds.values())
            sizes = sorted({len(one) for one in seeds.values()})
            told = [f"{label}: {_numbers(one)}" for label, one in seeds.items()]
            text = f"arms have {' to '.join(map(str, sizes[:: max(len(sizes) - 1, 1)]))} seeds, " if sizes[1:] else ""
            text += f"of which all share {_numbers(shared)}" if shared else "none of which all share"
            yield (
                "different seeds", f"{setting.name}: {_some(told)}",
                f"{text}; a test uses the seeds that its two arms share, and none is made where they share none",
            )  # fmt: skip
        apart = [
            f"{a.label} and {b.label}"
            for a, b in combinations(setting.arms, 2)
            if not seeds[a.label] & seeds[b.label]
        ]  # fmt: skip
        if apart:
            text = f"{len(apart)} pairs of arms share no seed: they cannot be compared in pairs, and no test was made"
            yield "no shared seeds", f"{setting.name}: {_some(apart)}", text
    done = found.runs[found.runs["status"] == "completed"]
    if "search.purpose" in done:
        done = done.assign(purpose=done["search.purpose"])
    keys = [key for key in ("setting", "arm", "trial", "seed", "purpose") if key in done]
    again = done[done.duplicated(keys, keep=False)]
    if len(again):
        named = [f"{row['arm']} seed={row['seed']} ({row['run_id']})" for row in again.to_dict("records")]
        text = f"{len(again)} runs share arm, trial and seed with another; only the last by run id of each counts"
        yield "repeated run", _some(named), text


def _examples(study: Study, found: Arrangement) -> Iterator[tuple[str, str, str]]:
    """Arms that were scored on different examples, on few independent groups, or on examples of unknown grouping."""
    unnamed = set(study.ungrouped(split=found.split))
    for setting in found.settings:
        for metric in found.metrics:
            ids = {arm.label: arm.scores[metric].ids for arm in setting.arms if metric in arm.scores}
            counts = sorted({len(one) for one in ids.values()})
            if len({frozenset(one) for one in ids.values()}) > 1:
                shared = len(frozenset.intersection(*(frozenset(one) for one in ids.values())))
                text = f"{metric}: arms were scored on {counts[0]:,} to {counts[-1]:,} examples of which all share "
                text += f"{shared:,}; their means are of different examples, their tests of those that two arms share"
                yield "different examples", setting.name, text
        scored = [(arm, one) for arm in setting.arms for one in arm.scores.values() if one.ids]
        missing = [arm.label for arm, _ in scored if unnamed & set(arm.runs["run_id"])]
        if missing:
            text = f"predictions of {len(set(missing))} arms name no groups: each example counts as independent, and "
            text += "intervals are too narrow if several share a template, document or patient"
            yield "no groups", f"{setting.name}: {_some(missing)}", text
        units = [one.units for arm, one in scored if one.groups]
        if units and min(units) < FEW_GROUPS:
            examples = min(len(one.ids) for _, one in scored)
            text = f"{examples:,} examples of {min(units)} independent groups on {found.split}: "
            text += "the groups are the sample, and intervals use t with as many degrees of freedom less one"
            yield "few groups", setting.name, text


def _choice(found: Arrangement) -> Iterator[tuple[str, str, str]]:
    """Arms whose chosen trial was not confirmed on fresh seeds, and arms with more trials to choose from."""
    for setting in found.settings:
        tried = {arm.label: arm.tried for arm in setting.arms}
        chosen = [arm for arm in setting.arms if arm.tried > 1]
        if len(set(tried.values())) > 1:
            told = [f"{label}: {count}" for label, count in sorted(tried.items(), key=lambda pair: pair[1])]
            text = f"arms chose from {min(tried.values())} to {max(tried.values())} trials; more looks find a better "
            text += "score by chance"
            yield "unequal trials", f"{setting.name}: {_some([*told[:2], *told[-2:]])}", text
        unsure = [arm.label for arm in chosen if not arm.confirmed]
        if unsure:
            text = f"{len(unsure)} arms report the seeds that their trial was chosen on: their scores are optimistic; "
            text += "hydra.sweeper.confirm_seeds trains the choice again on fresh seeds"
            yield "not confirmed", f"{setting.name}: {_some(unsure)}", text


def _source(found: Arrangement) -> Iterator[tuple[str, str, str]]:
    """Runs of several commits, of a working tree with changes, or of none that is known."""
    runs = found.runs[found.runs["chosen"]]
    if "git_commit" not in runs or "source" not in runs:
        return
    commits = runs.loc[runs["source"] == "study", "git_commit"]
    known = sorted(set(commits.dropna().astype(str)))
    dirty = [one for one in known if one.endswith(DIRTY)]
    if dirty:
        count = int(commits.isin(dirty).sum())
        yield "uncommitted changes", _some(dirty), f"{count} of {len(commits)} runs are of a tree with changes"
    if commits.isna().any():
        text = f"{int(commits.isna().sum())} of {len(commits)} runs do not say of which commit they are"
        yield "unknown commit", "study", text
    if len(known) > 1:
        yield "several commits", _some(known), f"the runs compared are of {len(known)} commits"


def _numbers(seeds: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "none"


def _parameters(study: Study) -> Iterator[tuple[str, str, str]]:
    """Trainable parameters and adapted roles that do not match the placement; each kind of run is checked once."""
    runs = (
        study.runs[study.runs["trainable_parameters"].notna()] if "trainable_parameters" in study.runs else study.runs
    )
    seen: set[tuple[Any, ...]] = set()
    for row in runs.to_dict("records"):
        key = tuple(
            str(row.get(name)) for name in ("layout", "placement", "rank", "trainable_parameters", "method", "model")
        )
        if key in seen:
            continue
        seen.add(key)
        modules = study.layouts.get(row.get("layout") or 0) or []
        stated, name = int(row["trainable_parameters"]), "parameters do not match the placement"
        if modules:
            yield from ((name, _subject(row), text) for text in _against_modules(row, modules, stated))
            continue
        expected = expected_parameters(row)
        if expected is not None and expected != stated:
            likely = [other for other in ROLES if expected_parameters({**row, "placement": other}) == stated]
            hint = f"; that is the count of {likely[0]}" if likely else ""
            yield (
                name,
                _subject(row),
                f"{row['placement']} at rank {row['rank']:g} has {expected:,}, stated is {stated:,}{hint}",
            )


def _against_modules(row: Mapping[str, Any], modules: list[dict[str, Any]], stated: int) -> Iterator[str]:
    counted = sum(int(module["parameters"]) for module in modules)
    if counted != stated and str(row.get("method")) == "lora":
        yield f"the modules have {counted:,} trainable parameters together, the record states {stated:,}"
    roles = [role for role in str(row.get("placement.roles") or "").split(",") if role]
    allowed = {*roles, *(fused for fused, parts in FUSED.items() if set(parts) & set(roles))}
    strangers = sorted({str(module["role"]) for module in modules} - allowed - {"embedding", "head"})
    if roles and strangers:
        yield f"placement {row['placement']} adapts {', '.join(roles)}, but {', '.join(strangers)} modules have ranks"


def _shortened(study: Study) -> Iterator[tuple[str, str, str]]:
    """Datasets of which more than `SHORTENED` of a split was left out or cut to `dataset.max_length`, by model."""
    runs = study.runs
    counts = [name for name in map(str, runs) if name.startswith("data.") and not name.endswith(".texts")]
    if not counts:
        return
    seen: set[tuple[str, str]] = set()
    for row in runs[["dataset", "model", *counts]].drop_duplicates().to_dict("records"):
        data: dict[str, dict[str, int]] = {}
        for name in counts:
            _, split, key = name.split(".", 2)
            if not pd.isna(row[name]):
                data.setdefault(split, {})[key] = int(row[name])
        text = shortened(data, above=SHORTENED)
        subject = f"{row['dataset']} on {row['model']}"
        if text is not None and (subject, text) not in seen:
            seen.add((subject, text))
            yield "shortened examples", subject, text


def expected_parameters(row: Mapping[str, Any]) -> int | None:
    """LoRA's count r·(in + out) summed over the placement, from the shape in `model.config.*`; None where that is not
    known. Shapes: GPT-2 (fused query, key and value) and Llama (grouped keys and values, three feed-forward matrices).
    """
    roles, rank = ROLES.get(str(row.get("placement"))), row.get("rank")
    if roles is None or rank is None or pd.isna(rank) or str(row.get("method")) not in ("lora", "rslora"):
        return None
    if row.get("placement.layers", "all") != "all":
        return None

    def size(name: str) -> float | None:
        value = row.get(f"model.config.{name}")
        return None if value is None or pd.isna(value) else float(value)

    width, layers = size("n_embd"), size("n_layer")
    if width is not None and layers is not None:
        wide = size("n_inner") or 4 * width
        per_layer = (4 * width + 2 * width) * ("attn_q" in roles) + 2 * (width + wide) * ("ff_down" in roles)
        return int(rank * layers * per_layer)
    width, layers, heads = size("hidden_size"), size("num_hidden_layers"), size("num_attention_heads")
    inner = size("intermediate_size")
    if width is None or layers is None or heads is None or inner is None:
        return None
    head = size("head_dim") or width / heads
    groups = size("num_key_value_heads") or heads
    per_layer = (2 * (width + heads * head) + 2 * (width + groups * head)) * ("attn_q" in roles)
    return int(rank * layers * (per_layer + 3 * (width + inner) * ("ff_down" in roles)))


def _together(found: Arrangement) -> Iterator[tuple[str, str, str]]:
    """Tasks that were trained with others on another number of their own examples than alone."""
    for setting in found.settings:
        for pair in compare.from_alone(setting):
            alone, others = _seen(pair.a), _seen(pair.b)
            if abs(np.log(others / alone)) > np.log1p(UNEQUAL):
                text = f"{others:,.0f} examples of it were trained on, {alone:,.0f} in the arm of the task alone: "
                yield "unequal training", f"{setting.name}: {pair.b.label}", f"{text}company is not all that differs"


def _seen(arm: Arm) -> float:
    """Examples of its task that an arm's runs trained on, repeats counted; NaN where their records do not say."""
    runs = arm.runs
    if (runs[together.FIELD] == together.ALONE).all():
        passes = runs["trainer.accumulation"].fillna(1) if "trainer.accumulation" in runs else 1
        return float((runs["steps"] * runs["trainer.batch_size"] * passes).median())
    return float(runs["data.train.seen"].median()) if "data.train.seen" in runs else np.nan


def _fairness(found: Arrangement) -> Iterator[tuple[str, str, str]]:
    """Too few seeds or examples, learning rates that were not tuned or not far enough, budgets that differ."""
    arms = found.arms
    if not arms:
        return
    if found.split != "test":
        yield (
            "no test split",
            "study",
            "trials are chosen and reported on validation: the reported scores are optimistic",
        )
    named = [
        (f"{setting.name}: {arm.label}" if len(found.settings) > 1 else arm.label, arm)
        for setting in found.settings
        for arm in setting.arms
    ]
    single = [name for name, arm in named if len(arm.runs) == 1]
    if single:
        text = f"{len(single)} of {len(arms)} arms have one seed: their intervals say nothing of other seeds"
        yield "one seed", _some(single), text
    metric = found.select.removeprefix("validation.")
    whole = [name for name, arm in named if metric in arm.scores and not arm.scores[metric].ids]
    if whole:
        text = f"{len(whole)} of {len(arms)} arms have no {metric} of single examples: "
        text += "their intervals say nothing of other examples"
        yield "no scores of single examples", _some(whole), text
    if not any(key.endswith(".lr") for key in found.tuned):
        yield (
            "one learning rate",
            "study",
            "every arm ran at one learning rate; arms may differ in which one suits them",
        )
    edges = [f"{name} ({key} {side})" for name, arm in named for key, side in arm.edges.items()]
    if edges:
        text = f"the chosen value is at the edge of what was tried in {len(edges)} arms; a better one may lie outside"
        yield "tuned to the edge", _some(edges), text
    for setting in found.settings:
        counts = [len(scores.ids) for arm in setting.arms for scores in arm.scores.values() if scores.ids]
        if counts and min(counts) < FEW_EXAMPLES:
            yield (
                "few evaluation examples",
                setting.name,
                f"{min(counts)} examples on {found.split}; see the power table",
            )
        yield from _budgets(setting.name, setting.arms)
        base = setting.base
        if base is not None and "nll" in base.scores:
            reference = float(base.scores["nll"].x_RE[0] @ base.scores["nll"].w_E / base.scores["nll"].w_E.sum())
            worse = [arm.label for arm in setting.arms if arm.runs[f"{found.split}.nll"].mean() > reference]
            if worse:
                text = f"{len(worse)} arms have a higher NLL than the base model ({reference:.4g})"
                yield "worse than the base model", f"{setting.name}: {_some(worse)}", text
    incomplete = [name for name, arm in named if arm.incomplete]
    if incomplete:
        text = f"{len(incomplete)} arms have replicates of the chosen trial that failed, diverged or were pruned"
        yield "missing replicates", _some(incomplete), text


def _conditions(found: Arrangement) -> Iterator[tuple[str, str, str]]:
    """Conditions that differ between runs of one comparison. A record without the field counts as equal."""
    for setting in found.settings:
        runs = pd.concat([arm.runs for arm in setting.arms]) if setting.arms else pd.DataFrame()
        labels = {index: arm.label for arm in setting.arms for index in arm.runs.index}
        for column in [name for name in runs if str(name).startswith("made_with.")]:
            what = _condition(str(column).removeprefix("made_with."))
            known = runs[column].dropna().astype(str)
            values = known.value_counts()
            if what is None or len(values) < 2:
                continue
            told = []
            for value, count in values.items():
                arms = list(dict.fromkeys(labels[index] for index in known.index[known == value]))
                told.append(f"{_shown(value)} in {count} run{'' if count == 1 else 's'} ({_some(arms, most=3)})")
            yield f"different {what}", setting.name, "; ".join(told)


def _condition(name: str) -> str | None:
    """What a column of `analysis.load.made_with` is called; None for versions that change no number."""
    kind, _, package = name.partition(".")
    if kind != "versions":
        return CONDITIONS.get(name)
    return None if package in NUMBERLESS else f"library version ({package})"


def _shown(value: Any) -> str:
    text = str(value)
    return text[:19] if text.startswith("sha256:") else text


def _budgets(setting: str, arms: list[Any]) -> Iterator[tuple[str, str, str]]:
    sizes: dict[str, list[float]] = {}
    for arm in arms:
        if not pd.isna(arm.factors["rank"]):
            rest = repr({key: str(value) for key, value in arm.factors.items() if key != "placement"})
            sizes.setdefault(rest, []).append(arm.parameters)
    ratios = {rest: max(found) / min(found) for rest, found in sizes.items() if min(found) > 0}
    if ratios and max(ratios.values()) > 1.05:
        text = f"placements at equal rank differ up to {max(ratios.values()):.2f} times in trainable parameters; "
        yield "unequal budgets", setting, text + "read the matched-budget comparison beside the tests at equal rank"


def _costs(found: Arrangement) -> Iterator[tuple[str, str, str]]:
    runs = found.runs[found.runs["chosen"]]
    if runs.empty or "train_seconds_solo" not in runs:
        return
    missing = int(runs["train_seconds_solo"].isna().sum())
    if missing:
        text = f"{missing} of {len(runs)} runs have no solo calibration: seconds and memory stay empty, never a pack's"
        yield "no solo cost", "study", text
    devices = runs.loc[runs["train_seconds_solo"].notna(), "device"].dropna().unique() if "device" in runs else []
    if len(devices) > 1:
        yield (
            "several devices",
            ", ".join(map(str, devices)),
            "seconds and memory come from different devices: do not compare",
        )

    cold = int(cold_memory(runs).sum())
    if cold:
        text = f"the peak memory of {cold} of {len(runs)} runs was measured by a former version: on CUDA the arm that "
        text += "was measured first has its process's one-off allocations (work spaces, tens of MiB) in it; "
        text += "memory is that much off" if cold == len(runs) else "do not compare it with that of the others"
        yield "memory measured cold", "study", text


def cold_memory(runs: pd.DataFrame) -> pd.Series:
    """Which runs have a solo peak memory on CUDA from before it was measured after a warm-up."""
    known = {name: runs[name] if name in runs else pd.Series(None, index=runs.index) for name in _MEMORY}
    peak, how, device, source = (known[name] for name in _MEMORY)
    return peak.notna() & how.isna() & (device == "cuda") & (source == "study")


def _subject(row: Any) -> str:
    rank = row.get("rank")
    words = [str(row.get("experiment") or row.get("placement")), "" if rank is None or pd.isna(rank) else f"r{rank:g}"]
    return " ".join(word for word in words if word) + f" ({row['run_id']})"


def _some(names: list[str], most: int = 4) -> str:
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:most]) + (f" and {len(distinct) - most} more" if len(distinct) > most else "")
