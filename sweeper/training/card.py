"""The README.md of an adapter: a model card that the hub reads, and whoever is given the folder.

Metadata are huggingface_hub's: base model, licence, datasets, and the run's scores as results of evaluations.
"""

import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sweeper import content, installation, methods, naming
from sweeper.models.files import base_reference, hub_id, licence
from sweeper.record import ADAPTER, Record, Score, markdown_text, write_atomically
from sweeper.spec import DatasetSpec, RunSpec, to_mapping

PROJECT = "LoRA Atlas"
TAGS = ("lora-atlas",)
DIGITS = 6  # of a score


def write(run: Path, spec: RunSpec, record: Record | None = None, *, note: str | None = None) -> None:
    """Writes the card beside the adapter of a folder, where it has one; arguments as of `card`."""
    folder = run / ADAPTER
    if folder.is_dir():
        base = str(base_reference(spec.model)["base_model_name_or_path"])
        write_atomically(folder / "README.md", str(card(run.name, spec, record, note=note, base=base)))


def card(
    name: str, spec: RunSpec, record: Record | None = None, *, base: str, repo: str | None = None,
    note: str | None = None, folder: str | None = None,
) -> ModelCard:  # fmt: skip
    """The model card of an adapter.

    Args:
        name: of the run's folder. spec: of the run; of one of its tasks, where the adapter is that task's.
        record: what the run left; None where nothing was trained. note: how the adapter was made, then.
        base: what its configuration names as the base model. repo: where it will lie on the hub; None beside the run.
        folder: of the adapter in that repository; None for its root.
    """
    refused = None if record is None else record.saved.get("peft")
    scores = {} if record is None else _scores(record, spec.dataset)
    known = hub_id(spec.model) if repo is None or spec.model.source == "random" else base
    data = ModelCardData(
        base_model=known,
        datasets=_hub_datasets(spec.dataset) or None,
        eval_results=_results(spec.dataset, scores) or None,
        library_name="peft",
        license=licence(spec.model),
        model_name=_title(spec),
        pipeline_tag="text-generation",
        tags=[spec.method.name, *TAGS],
    )
    lines = [
        f"# {_title(spec)}", "", note or _trained(name, spec, record), "",
        "## Use", "", *(_use(spec, repo, folder) if refused is None else _refused(str(refused), repo)), "",
        "## Base model", "", *_base(spec, base, repo), "",
        *(["## Scores", "", *_table(scores), ""] if scores else []),
        "## Training" if note is None else "## Adapter", "", *_facts(spec, record),
    ]  # fmt: skip
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _title(spec: RunSpec) -> str:
    words = naming.label(to_mapping(spec), [])
    return markdown_text(f"{spec.model.name} {spec.method.name} {words} on {spec.dataset.name}")


def _trained(name: str, spec: RunSpec, record: Record | None) -> str:
    if record is None:
        return f"Made of `{name}` with {PROJECT}."
    return f"Run `{record.run_id}` of the study `{record.study}`, trained with {PROJECT}."


def _use(spec: RunSpec, repo: str | None, folder: str | None) -> list[str]:
    where = repo or ADAPTER
    more = f', subfolder="{folder}"' if folder else ""
    if spec.model.source == "random" or folder:
        # AutoPeft would look for the base model in that folder of its own repository
        return [
            "```python", "from peft import PeftModel", "",
            f'model = PeftModel.from_pretrained(base_model, "{where}"{more})  # gives the logits that were scored',
            "```",
        ]  # fmt: skip
    trust = ", trust_remote_code=True" if spec.model.trust_remote_code else ""
    same = "  # gives the logits that were scored" if repo is None or spec.model.source == "hub" else ""
    return [
        "```python", "from peft import AutoPeftModelForCausalLM", "",
        f'model = AutoPeftModelForCausalLM.from_pretrained("{where}"{trust}){same}', "```",
    ]  # fmt: skip


def _refused(why: str, repo: str | None) -> list[str]:
    lines = [f"Stock PEFT does not give the logits that were scored: {markdown_text(why)}."]
    if repo is not None:
        return lines
    merge, evaluate = f"{installation.program_elsewhere('adapters')} merge", installation.program_elsewhere("evaluate")
    return [
        *lines, "",
        f"    {merge} RUN_FOLDER --out merged    # a plain transformers model that gives them", "",
        f"`RUN_FOLDER` is the folder above this one; `{evaluate} RUN_FOLDER` scores it as it is.",
    ]  # fmt: skip


def _base(spec: RunSpec, base: str, repo: str | None) -> list[str]:
    """What the adapter belongs to, and how what it was scored on differs from what `base` names."""
    model, known = spec.model, hub_id(spec.model)
    if model.source == "random":
        return [f"Random weights, made for tests (`model={model.name}`): no file of them exists."]
    if model.source == "hub":
        revision = base_reference(model)["revision"]
        lines = [f"`{model.location}`" + (f" at revision `{revision}`." if revision else ".")]
    elif model.source == "path":
        lines = [f"`{base}`" + (", a folder on the machine that trained it." if repo is None else ".")]
    else:
        lines = _dequantised(model.location, base, known, repo)
    if methods.find(spec.method.name).quantised:
        lines += ["", "While the adapter trained, the base was quantised to 4 bits (bitsandbytes)."]
    return lines


def _dequantised(location: str, base: str, known: str | None, repo: str | None) -> list[str]:
    """Of a GGUF: which of two models the configuration names, and which the scores are of."""
    lines = [
        f"Trained and scored on the GGUF `{Path(location).name}`, dequantised: its weights are values of few bits, not "
        "those of the model on the hub.", "",
    ]  # fmt: skip
    if repo is not None:
        return [
            *lines, f"`adapter_config.json` names the model that it was quantised from, `{base}`. On that one the "
            "adapter's scores may differ a little from those below.",
        ]  # fmt: skip
    lines.append(
        f"`adapter_config.json` names the folder of the dequantised model on this machine, `{base}`, which gives the "
        "scores below."
    )
    return [*lines, "", f"On the hub, the model that it was quantised from is `{known}`."] if known else lines


def _scores(record: Record, dataset: DatasetSpec) -> dict[str, Mapping[str, Score]]:
    """Split -> phase -> score; those of one task of the run, where the adapter is that task's."""
    whole = record.spec.get("dataset", {}).get("name") == dataset.name
    end = "" if whole else f"/{dataset.name}"
    found = {
        split.removesuffix(end): phases
        for split, phases in record.scores.items()
        if "after" in phases and (whole or split.endswith(end))
    }
    return dict(sorted(found.items()))


def _values(score: Score) -> dict[str, float]:
    values = {"nll": score.nll, "perplexity": score.perplexity, **score.metrics}
    return {name: float(f"{value:.{DIGITS}g}") for name, value in values.items() if math.isfinite(value)}


def _results(dataset: DatasetSpec, scores: Mapping[str, Mapping[str, Score]]) -> list[EvalResult]:
    """The scores after training as the hub lists them."""
    on_hub = _hub_datasets(dataset)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=on_hub[0] if len(on_hub) == 1 else dataset.name,
            dataset_name=dataset.name,
            dataset_split=split,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for split, phases in scores.items()
        for metric, value in _values(phases["after"]).items()
    ]


def _hub_datasets(dataset: DatasetSpec) -> list[str]:
    """The ids on the hub among a dataset's sources."""
    paths = {one.path for one in dataset.parts or (dataset,) if one.family == "hub" and one.path}
    return sorted(path for path in paths if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists())


def _table(scores: Mapping[str, Mapping[str, Score]]) -> list[str]:
    lines = ["| split | examples | metric | base model | with the adapter |", "| --- | --- | --- | --- | --- |"]
    for split, phases in scores.items():
        before = _values(phases["before"]) if "before" in phases else {}
        for metric, value in _values(phases["after"]).items():
            was = before.get(metric, "–")
            lines.append(f"| {split} | {phases['after'].examples:,} | {metric} | {was} | {value} |")
    return [*lines, "", "`nll` is in nats a token of the response; `perplexity` is its exponential."]


def _facts(spec: RunSpec, record: Record | None) -> list[str]:
    """How the adapter came about, as a table."""
    rows = {"method": spec.method.name, "placement": spec.placement.name, "rank": spec.rank, "alpha": spec.alpha}
    if record is not None:
        rows |= {
            "modules": len(record.modules), "trainable parameters": f"{record.trainable_parameters:,}",
            "dataset": spec.dataset.name, "steps": record.steps, "batch size": spec.trainer.batch_size,
            "learning rate": f"{spec.optim.lr:g}", "seed": spec.seed, "precision": record.environment.get("precision"),
            "run": record.run_id, "commit": record.environment.get("git_commit"),
            **(record.environment.get("versions") or {}),
        }  # fmt: skip
    else:
        rows |= {"dataset": spec.dataset.name, "peft": importlib.metadata.version("peft")}
    if (spec.model.content or "").startswith(content.COMMIT):
        rows["base commit"] = (spec.model.content or "").removeprefix(content.COMMIT)
    return _rows([(name, value) for name, value in rows.items() if value not in (None, "")])


def _rows(pairs: Sequence[tuple[str, object]]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {markdown_text(str(value))} |" for name, value in pairs)]
