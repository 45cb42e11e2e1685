"""Tasks: examples, splits, prompts and metrics. One file a family; `FAMILIES` is the table of them.

A family is a module with `OPTIONS` (the names `dataset.options` may have, each with its meaning), `UNIT` (what examples
of one `Example.group` share, the unit of independence, in words; families of your own may lack it), `check(spec)`
(raises DataError before anything is loaded), `load(spec)` (the splits as text) and `version(spec)` (changes when its
data does). A family whose data is in a package names it as `PACKAGE`; one whose data is elsewhere has `content`; one
that reads `dataset.columns` lists in `COLUMNS` what they may be.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from sweeper import content as contents
from sweeper import installation, packages
from sweeper.cache import cache_folder
from sweeper.content import Content
from sweeper.errors import DataError, SpecError, gist, unknown
from sweeper.record import shortened
from sweeper.spec import DatasetSpec, EvaluationSpec, to_mapping
from sweeper.tasks import (
    baseline,
    chain_sum,
    codeio,
    columns,
    conversation,
    general_text,
    gsm_symbolic,
    hpo_term,
    hub,
    human_eval,
    icd10_chapter,
    jsonl,
    licence_category,
    medmcqa,
    metrics,
    mixture,
    preference,
    privacy_policy_qa,
    pubmed,
    sequence,
    template,
    turns,
)
from sweeper.tasks import cache as _cache
from sweeper.tasks.example import SPLITS, Choice, Encoded, EncodedSplit, Example
from sweeper.tasks.metrics import GENERATED, METRICS, PACKAGES, PROGRAM
from sweeper.tasks.package import require_extra
from sweeper.tasks.split import units
from sweeper.tasks.template import TEMPLATES, TODAY, adds_start, puts_space_first, tokenise, writes_date
from sweeper.untrusted import sandbox

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FAMILIES",
    "METRICS",
    "OF_TASKS",
    "PROGRAM",
    "SPLITS",
    "Choice",
    "Encoded",
    "EncodedSplit",
    "Example",
    "check",
    "check_evaluation",
    "check_template",
    "content",
    "data_of",
    "encode",
    "load",
    "remarks",
    "stop_strings",
    "training_sample",
    "where",
]

# Raise whenever the same spec and data would give other tokens or groups, so that no stale cache file is read.
CODE_VERSION = 8

FEW, SAMPLED = 5_000, 512  # examples that are encoded at once to tell how long they are; else of so many


class Family(Protocol):
    """What a module under `sweeper.tasks` provides; those made of other tasks have no `load`."""

    OPTIONS: dict[str, str]

    def check(self, spec: DatasetSpec) -> None: ...

    def version(self, spec: DatasetSpec) -> str: ...


# Options that every family takes.
COMMON_OPTIONS = {
    "stop": "list of texts that end a generated text",
    preference.OPTION: preference.OPTION_MEANING,
}

FAMILIES: dict[str, Family] = {
    "chain_sum": chain_sum,
    "codeio": codeio,
    "file": jsonl,
    "gsm_symbolic": gsm_symbolic,
    "hpo_term": hpo_term,
    "hub": hub,
    "human_eval": human_eval,
    "icd10_chapter": icd10_chapter,
    "jsonl": jsonl,
    "licence_category": licence_category,
    "medmcqa": medmcqa,
    "mixture": mixture,
    "privacy_policy_qa": privacy_policy_qa,
    "pubmed": pubmed,
    "sequence": sequence,
}


OF_TASKS = ("mixture", "sequence")
"""Families made of other tasks."""


def check(spec: DatasetSpec, *, training: bool = True) -> None:
    """Cheap validation before any model is loaded: names, options, the package or file or hub set behind the task.

    Args:
        training: whether the task is to be trained on; some are for evaluation only.

    Raises:
        SpecError: a name or option that does not exist.
        DataError: data that is missing, malformed or too small.
    """
    _check_names(spec)
    if training and getattr(FAMILIES[spec.family], "EVALUATION_ONLY", False):
        raise DataError(
            f"dataset={spec.name} is for evaluation only and has no training split: train on another dataset, then "
            f"{installation.program('evaluate')} RUN_FOLDER dataset={spec.name}"
        )
    FAMILIES[spec.family].check(spec)
    if _of_choices(spec):
        load(spec)
    for part in spec.parts:
        check(part, training=training)


def check_evaluation(dataset: DatasetSpec, evaluation: EvaluationSpec, *, training: bool = True) -> None:
    """Cheap validation of the evaluation: the splits, their text, and that programs can be sandboxed.

    Raises:
        SpecError: no such split, or an evaluation that is not available during training.
        DataError: the general text is missing.
        SandboxError: generated programs cannot be run safely.
    """
    if training and evaluation.name == "lm_eval":
        raise SpecError(
            "evaluation=lm_eval scores saved adapters: train with another evaluation, then "
            f"{installation.program('evaluate')} outputs/STUDY dataset={dataset.name} evaluation=lm_eval"
        )
    if training and evaluation.options:
        raise SpecError(f"evaluation.options: evaluation={evaluation.name} has none, lm_eval has")
    for split in evaluation.splits:
        if split not in (*SPLITS, general_text.SPLIT):
            raise SpecError(unknown("evaluation.splits", split, (*SPLITS, general_text.SPLIT)))
    if general_text.SPLIT in evaluation.splits:
        general_text.check()
    if evaluation.generate and PROGRAM & set(dataset.metrics):
        sandbox.check()


def content(spec: DatasetSpec) -> Content:
    """The dataset's present content: a digest of what is at `path`, a hub commit, or a package version.

    Raises:
        DataError: the file cannot be read.
    """
    if spec.parts:
        return mixture.of_parts(spec, content)
    family = FAMILIES.get(spec.family)
    place = None if spec.path is None else Path(spec.path).expanduser()
    try:
        if place is not None and place.is_dir():
            return contents.of_folder(place, contents.visible(place), cache_folder())
        if place is not None and place.exists():
            return contents.of_file(place, cache_folder())
    except OSError as error:
        raise DataError(f"dataset.path={spec.path}: cannot be read ({gist(error)})") from None
    if family is not None and hasattr(family, "content"):
        found: Content = family.content(spec)
        return found
    package = getattr(family, "PACKAGE", None)
    if package is None and place is not None:
        raise DataError(f"dataset.path={spec.path}: no such file (looked for {place.absolute()})")
    if package is None:
        return contents.NONE
    try:
        return contents.of_package(package, packages.distribution(package).version)
    except PackageNotFoundError:  # `check` says so
        return contents.NONE


def stop_strings(spec: DatasetSpec) -> tuple[str, ...]:
    """The texts that end a generated text, from `dataset.options.stop`."""
    stop = spec.options.get("stop") or ()
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise SpecError(f"dataset.options.stop must be a list of texts, got {stop}")
    return tuple(stop)


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    """The splits as text: "train", "validation" and "test", disjoint by group, the same for the same `split_seed`.

    Raises:
        DataError: as `check`, or an example lacks what a metric of the dataset needs.
    """
    _check_names(spec)
    if spec.parts:
        return mixture.joined({part.name: load(part) for part in spec.parts})
    family: Any = FAMILIES[spec.family]
    splits = family.load(spec)
    if _of_choices(spec):
        splits = {split: preference.from_choices(splits[split], spec.name) for split in SPLITS}
    for split in SPLITS:
        metrics.check(spec.metrics, splits[split])
        preference.check_split(split, splits[split])
    return {split: splits[split] for split in SPLITS}


def _of_choices(spec: DatasetSpec) -> bool:
    """Whether the wrong choices of a task become rejected answers."""
    return not spec.parts and spec.options.get(preference.OPTION, "none") != "none"


def kind(spec: DatasetSpec) -> str:
    """What the examples of a dataset of one task are (`tasks.preference`), from no more of it than is needed.

    Raises:
        DataError: as `load`.
    """
    if _of_choices(spec):
        return preference.PAIRS
    family: Any = FAMILIES[spec.family]
    if hasattr(family, "kind"):
        found: str = family.kind(spec)
        return found
    if isinstance(family, ModuleType):  # of ours, those that may hold preferences say so
        return preference.PLAIN
    return preference.kind(load(spec)["train"][0])


def encode(
    spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", *, model_key: str, cache: Path | None
) -> dict[str, EncodedSplit]:
    """The splits as token ids, read from the folder `cache` if they were made before.

    What is longer than `max_length` loses the left part of its prompt (a start token stays), so the end of the
    question and the turn of the assistant are kept, and is counted in `truncated`. A response is never cut: if it
    leaves no room for a prompt, the example is left out and named in `dropped`. Where there are answers to choose
    among, the longest of them takes the room, so that all are scored after the same prompt.

    Raises:
        DataError: as `load`; or `max_length` leaves a split empty.
    """
    _check_names(spec)
    if spec.parts:
        parts = {part.name: encode(part, tokenizer, model_key=model_key, cache=cache) for part in spec.parts}
        return mixture.combined(parts)
    path = _cached(spec, tokenizer, model_key, cache)
    found = _cache.read(path) if path is not None else None
    if found is not None:
        return found
    return _encode(load(spec), spec, tokenizer, path)


def training_sample(
    spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", *, model_key: str, cache: Path | None
) -> tuple[EncodedSplit, bool]:
    """Training examples as token ids, to tell how long they are, and whether they are all there are.

    Of a dataset of one task. All splits are encoded, and kept for training, where they are few or were encoded before;
    else examples at equal distances are, and kept for the next time.

    Raises:
        DataError: as `load`.
    """
    path = _cached(spec, tokenizer, model_key, cache)
    if path is not None and (found := _cache.read(path)) is not None:
        return found["train"], True
    sampled = None if path is None else path.with_name(f"{path.stem}-sample{path.suffix}")
    if sampled is not None and (found := _cache.read(sampled)) is not None:
        return found["train"], False
    texts = load(spec)
    if sum(map(len, texts.values())) <= FEW:
        return _encode(texts, spec, tokenizer, path)["train"], True
    every = texts["train"]
    some = every[:: -(-len(every) // SAMPLED)]
    split = _encode_split("train", some, spec, tokenizer)
    _keep(sampled, {"train": split})
    return split, len(some) == len(every)


def _cached(
    spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", model_key: str, cache: Path | None
) -> Path | None:  # fmt: skip
    return cache / f"{spec.family}-{_key(spec, tokenizer, model_key)}.npz" if cache is not None else None


def _encode(
    texts: Mapping[str, tuple[Example, ...]], spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", path: Path | None
) -> dict[str, EncodedSplit]:
    made = {name: _encode_split(name, examples, spec, tokenizer) for name, examples in texts.items()}
    kept = {name: _without(examples, made[name].dropped) for name, examples in texts.items()}
    splits = {
        name: dataclasses.replace(split, majority=baseline.majority(kept, name, spec.metrics))
        for name, split in made.items()
    }
    _keep(path, splits)
    return splits


def _keep(path: Path | None, splits: Mapping[str, EncodedSplit]) -> None:
    if path is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
            _cache.write(path, splits)


def remarks(spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", splits: Mapping[str, EncodedSplit]) -> list[str]:
    """What a reader of the scores must know of how examples became tokens, a line each; mostly there is nothing."""
    if spec.parts:
        return [
            f"{part.name}: {line}"
            for part in spec.parts
            for line in remarks(part, tokenizer, {name: split.parts[part.name] for name, split in splits.items()})
        ]
    lines = [shortened(data_of(splits)), template.remark(spec.template, tokenizer)]
    apart = {name: split.apart for name, split in splits.items() if split.apart}
    if apart:
        counts = ", ".join(f"{count:,} of {len(splits[name].examples):,} {name}" for name, count in apart.items())
        lines.append(
            f"prompt and response are tokenised one after the other; as one text {counts} examples would have other "
            "tokens where the two meet"
        )
    return [line for line in lines if line is not None]


def data_of(splits: Mapping[str, EncodedSplit]) -> dict[str, dict[str, int]]:
    """Sizes of the splits, and of those of their tasks, as a record has them; `groups` counts units of independence."""
    return {
        name: {
            "examples": len(split.examples),
            "groups": sum(len({e.unit for e in one.examples}) for one in split.parts.values() or [split]),
            "truncated": split.truncated,
            "dropped": len(split.dropped),
            "tokens": sum(len(e.input_ids) for e in split.examples),
        }
        for name, split in mixture.by_part(splits).items()
    }


def _without(examples: tuple[Example, ...], dropped: tuple[str, ...]) -> tuple[Example, ...]:
    left_out = set(dropped)
    return tuple(example for example in examples if example.id not in left_out)


def _check_names(spec: DatasetSpec) -> None:
    if spec.family not in FAMILIES:
        raise SpecError(unknown("dataset.family", spec.family, FAMILIES))
    if spec.template not in TEMPLATES:
        raise SpecError(unknown("dataset.template", spec.template, TEMPLATES))
    for metric in spec.metrics:
        if metric not in METRICS:
            raise SpecError(unknown("dataset.metrics", metric, METRICS))
        if metric in GENERATED and spec.max_new_tokens < 1:
            raise SpecError(f"dataset.metrics={metric} needs generated text: set dataset.max_new_tokens above 0")
        if metric in PACKAGES:
            require_extra(PACKAGES[metric], "metrics", spec)
    choices = FAMILIES[spec.family].OPTIONS | COMMON_OPTIONS
    for option in spec.options:
        if option not in choices:
            raise SpecError(unknown("dataset.options", option, choices))
    columns.check(spec, getattr(FAMILIES[spec.family], "COLUMNS", ()))
    stop_strings(spec)
    preference.check_option(spec.options.get(preference.OPTION, "none"))


def _encode_split(
    name: str, examples: tuple[Example, ...], spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase"
) -> EncodedSplit:
    encoded: list[Encoded] = []
    dropped: list[str] = []
    known: dict[tuple[str, str], Choice] = {}
    truncated = apart = 0
    starts, alike = int(adds_start(tokenizer)), not puts_space_first(tokenizer)
    for example, unit in zip(examples, units(examples), strict=True):
        try:
            tokens = _tokens(example, spec, tokenizer)
            choices = tuple(_choice(example.prompt, text, spec, tokenizer, known, alike) for text in example.choices)
            rejected = _rejected(example, spec, tokenizer)
        except DataError as error:
            raise DataError(f"{where(spec, example.id)}: {error}") from None
        except Exception as error:
            raise DataError(f"{where(spec, example.id)}: {_refusal(spec, error)}") from error
        prompt, response = tokens.prompt, tokens.response
        longest = max([len(response), len(rejected), *(len(choice.ids) + 1 for choice in choices)])
        room = spec.max_length - longest
        if room <= starts:
            dropped.append(example.id)
            continue
        cut = max(len(prompt) - room, 0)
        if cut:
            truncated += 1
            prompt = prompt[:starts] + prompt[cut + starts :]
        kept = [(start - cut, end - cut) for start, end in tokens.answers if start - cut >= max(starts, 1)]
        first, asides = _asides(kept, len(prompt))
        ids = (*prompt, *response)
        encoded.append(Encoded(example.id, ids, first, choices, example.check, unit, rejected, example.label, asides))
        apart += not tokens.whole
    if examples and not encoded:
        raise DataError(f"dataset.max_length={spec.max_length} is too short for every response of the {name} split")
    return EncodedSplit(tuple(encoded), truncated, tuple(dropped), apart=apart)


def _tokens(example: Example, spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase") -> template.Tokens:
    if example.turns:
        every = conversation.every_turn(spec)
        return turns.encode(spec.template, example.turns, spec.system, tokenizer, every=every, tools=example.tools)
    if not example.prompt:
        return template.encode_text(example.response, tokenizer)
    return template.encode(spec.template, example.prompt, example.response, spec.system, tokenizer)


def _asides(answers: list[tuple[int, int]], last: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Where the first of several answers begins, and what lies between them; `last` is where the last one begins."""
    starts = [*(start for start, _ in answers), last]
    return starts[0], tuple(zip((end for _, end in answers), starts[1:], strict=True))


def where(spec: DatasetSpec, example_id: str) -> str:
    """Where an example comes from, for a message: file and line, if its family has them."""
    find = getattr(FAMILIES[spec.family], "where", None)
    return str(find(spec, example_id)) if find is not None else f"dataset={spec.name}: example {example_id}"


def check_template(spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", *, model: str) -> None:
    """Raises DataError if the dataset's template cannot be applied with this model's tokenizer."""
    try:
        tokenise(spec.template, "prompt", "response", spec.system, tokenizer)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"model={model} with dataset={spec.name}: {_refusal(spec, error)}") from error


def _refusal(spec: DatasetSpec, error: Exception) -> str:
    """Why text cannot be made tokens; a chat template says that itself."""
    if spec.template == "chat" and not isinstance(error, UnicodeError):
        return (
            f"the model's chat template raises {type(error).__name__} ({gist(error)}); dataset.template=alpaca and "
            "plain do without it"
        )
    return f"cannot be tokenised ({type(error).__name__}: {gist(error)})"


def _choice(
    prompt: str,
    text: str,
    spec: DatasetSpec,
    tokenizer: "PreTrainedTokenizerBase",
    known: dict[tuple[str, str], Choice],
    alike: bool,
) -> Choice:
    """The tokens of an answer.

    `alike`: they depend on nothing of the prompt but whether it ends in white space.
    """
    key = text, str(prompt[-1:].isspace()) if alike else prompt
    if key not in known:
        _, response = tokenise(spec.template, prompt, text, spec.system, tokenizer)
        known[key] = Choice(text, tuple(response[:-1]))
    return known[key]


def _rejected(example: Example, spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The tokens of the worse response of a pair, its end included; none of any other example."""
    if not example.rejected:
        return ()
    return tuple(tokenise(spec.template, example.prompt, example.rejected, spec.system, tokenizer)[1])


def _key(spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", model_key: str) -> str:
    """Hash of everything the tokens and the majority baseline depend on."""
    fields = to_mapping(spec)
    for scoring_only in ("name", "max_new_tokens"):
        del fields[scoring_only]
    return hashlib.sha256(
        json.dumps(
            [CODE_VERSION, fields, FAMILIES[spec.family].version(spec), model_key, _identity(tokenizer)], sort_keys=True
        ).encode()
    ).hexdigest()[:20]


def _identity(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    settings: Mapping[str, object] = {
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "chat_template": tokenizer.chat_template,
        **({"today": TODAY.isoformat()} if writes_date(tokenizer) else {}),
    }
    return [hashlib.sha256(table.encode()).hexdigest(), json.dumps(settings)]
