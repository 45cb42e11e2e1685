"""Adapters put on the hub: what PEFT reads and a model card, in one commit.

One adapter lies at the root of the repository, several in a folder each, with a card at the root that lists them. What
names a folder of this machine, the base model's, is replaced by what others can load.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper import installation, naming, record
from sweeper.errors import DataError, SpecError, gist
from sweeper.models.files import hub_id, licence
from sweeper.record import COMBINED, RECORD, SEARCHES, TASKS, Record
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved
from sweeper.spec import to_mapping

CARD, CONFIG = "README.md", "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CLIENTS = ("httpx", "httpx2", "requests")  # whose errors the hub's versions let through
MESSAGE = "Adapters trained with LoRA Atlas"


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """One adapter as it will lie on the hub.

    Attributes:
        folder: in the repository; empty for its root. base: the base model's id, which its configuration will name.
        record: what its run left; None for what was combined of several.
    """

    run: Saved
    folder: str
    base: str
    record: Record | None


def find(paths: Sequence[Path]) -> list[Saved]:
    """The adapters of run folders; of a study, those of its runs, and of its tuned arms only what the search chose.

    Raises:
        DataError: as `rescore.find`, or a run that left weights of the model itself and no adapter.
    """
    found: dict[Path, Saved] = {}
    for path in paths:
        runs = rescore.find([path])
        found |= {run.folder: run for run in _chosen(path, runs)}
    for run in found.values():
        if not (run.adapter / WEIGHTS).is_file():
            merge = f"{installation.program('adapters')} merge {run.folder} --out merged"
            raise DataError(
                f"{run.folder}: the run trained weights of the model and has no adapter: `{merge}`, then "
                "`hf upload REPO merged`"
            )
    return list(found.values())


def parcels(runs: Sequence[Saved], repo: str, *, base: str | None = None) -> list[Parcel]:
    """The adapters as they will lie in a repository.

    Args:
        base: id on the hub of the base model of all of them; None where the runs say it.

    Raises:
        SpecError: no name of a repository, or a base model that only this machine has.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    for flag, name in (("repo", repo), ("base", base)):
        try:
            if name is not None:
                validate_repo_id(name)
        except HFValidationError:
            raise SpecError(f"--{flag} {name}: no name on the hub, which are NAME or USER/NAME") from None
    fields = naming.varying([to_mapping(run.spec) for run in runs])
    found = []
    for run in runs:
        words = naming.label(to_mapping(run.spec), fields)
        folder = re.sub(r"[^\w.-]+", "-", f"{words}-{_run_id(run)}") if len(runs) > 1 else ""
        found.append(Parcel(run=run, folder=folder, base=_base(run, base), record=_record(run)))
    return found


@contextmanager
def staged(wanted: Sequence[Parcel], repo: str) -> Iterator[Path]:
    """A folder that holds, and goes with the context, what will lie in the repository."""
    with tempfile.TemporaryDirectory(prefix="push-") as temporary:
        root = Path(temporary)
        for one in wanted:
            _stage(one, root / one.folder, repo)
        if any(one.folder for one in wanted):
            record.write_atomically(root / CARD, _index(wanted, repo))
        yield root


def upload(root: Path, repo: str, *, private: bool) -> str:
    """Puts a folder on the hub, as one commit in a repository that is made where there is none; returns its address.

    Raises:
        DataError: no token, no network, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise DataError("push: no token of the hub here: `hf auth login`, or HF_TOKEN; --dry-run needs none")
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=root, commit_message=MESSAGE)
    except HfHubHTTPError as error:
        raise DataError(f"push: the hub refuses {repo}: {gist(error)}") from error
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise DataError(f"push: the hub cannot be reached ({gist(error)}); --dry-run needs no network") from error
    return str(made)


def _chosen(path: Path, runs: Sequence[Saved]) -> list[Saved]:
    """The runs of a study without the trials that its searches tried and did not choose."""
    try:
        searches = record.read_json(record.read_text(path / SEARCHES))
        best: dict[str, Any] = {key: one["best"] for key, one in searches.items() if isinstance(one["best"], dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return list(runs)
    kept = []
    for run in runs:
        known = _record(run)
        wanted = best.get(str(known.search.get("arm"))) if known is not None else None
        values = naming.flat(to_mapping(run.spec))
        if wanted is None or all(values.get(name) == value for name, value in wanted.items()):
            kept.append(run)
    return kept


def _record(run: Saved) -> Record | None:
    folder = run.folder.parent.parent if run.folder.parent.name == TASKS else run.folder
    return record.read_record(folder) if (folder / RECORD).is_file() else None


def _run_id(run: Saved) -> str:
    task = run.folder.parent.name == TASKS
    return f"{run.folder.parent.parent.name}-{run.folder.name}" if task else run.folder.name


def _base(run: Saved, given: str | None) -> str:
    """What the configuration will name: an id of the hub; of random weights the bare name, as nobody has them."""
    model = run.spec.model
    found = given or hub_id(model)
    if found is None and model.source != "random":
        raise SpecError(
            f"push: the base model of {run.folder.name} is {model.location}, which only this machine has: --base "
            "USER/NAME says under which id others load it"
        )
    return found or model.name


def _stage(one: Parcel, folder: Path, repo: str) -> None:
    """Copies an adapter's files, with a configuration and a card for others."""
    shutil.copytree(one.run.adapter, folder, dirs_exist_ok=True, ignore=lambda _, names: {CARD, CONFIG} & set(names))
    config = rescore.read_config(one.run.folder)
    model = one.run.spec.model
    config = {**config, "base_model_name_or_path": one.base}
    if model.source != "hub" or model.location != one.base:
        config["revision"] = None  # of another model
    record.write_atomically(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    record.write_atomically(folder / CARD, card_of(one, repo))


def card_of(one: Parcel, repo: str) -> str:
    """The model card of an adapter in a repository."""
    from sweeper.training import card

    spec, note = one.run.spec, None
    if one.record is None:
        made = record.read_json(record.read_text(one.run.folder / COMBINED))
        parts = ", ".join(f"`{part['run_id'] if isinstance(part, Mapping) else part}`" for part in made["from"])
        note = f"`{made['method']}` of the runs {parts}, made with {card.PROJECT}."
    return str(
        card.card(one.run.folder.name, spec, one.record, base=one.base, repo=repo, note=note, folder=one.folder or None)
    )


def _index(wanted: Sequence[Parcel], repo: str) -> str:
    """The card of a repository of several adapters."""
    from huggingface_hub import ModelCard, ModelCardData

    from sweeper.training import card

    bases = sorted({one.base for one in wanted if one.run.spec.model.source != "random"})
    licences = {licence(one.run.spec.model) for one in wanted}
    data = ModelCardData(
        base_model=(bases if len(bases) > 1 else bases[0]) if bases else None,
        library_name="peft",
        license=licences.pop() if len(licences) == 1 else None,
        pipeline_tag="text-generation",
        tags=[*sorted({one.run.spec.method.name for one in wanted}), *card.TAGS],
    )
    lines = [
        f"# {len(wanted)} adapters", "", f"A folder each, with a card of its own. Trained with {card.PROJECT}.", "",
        "```python", "from peft import PeftModel", "",
        f'model = PeftModel.from_pretrained(base_model, "{repo}", subfolder="{wanted[0].folder}")', "```", "",
        "| folder | base model | trainable parameters | test NLL |", "| --- | --- | --- | --- |",
        *(f"| [`{one.folder}`]({one.folder}) | {one.base} | {_size(one.record)} | {_nll(one)} |" for one in wanted),
    ]  # fmt: skip
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def _size(known: Record | None) -> str:
    return "–" if known is None else f"{known.trainable_parameters:,}"


def _nll(one: Parcel) -> str:
    if one.record is None:
        return "–"
    split = f"test/{one.run.folder.name}" if one.run.folder.parent.name == TASKS else "test"
    score = one.record.scores.get(split, {}).get("after")
    return "–" if score is None else f"{score.nll:.4f}"


def listing(root: Path) -> list[tuple[str, int]]:
    """Name and bytes of every file of a folder."""
    return [(str(path.relative_to(root)), path.stat().st_size) for path in sorted(root.rglob("*")) if path.is_file()]
